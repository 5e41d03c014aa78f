"""Attention heads and hidden units of Hugging Face models, called as tasks call them: tensors in, a dict out."""

import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset

from shrinkkit.core.stages import PruneChannels
from shrinkkit.core.variant import History
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import checkpoint, finetune, groups, prune, surgery

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 64, "max_position_embeddings": 16}
GROUPED = SIZES | {"num_key_value_heads": 2, "use_cache": False}
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 16}
GPT = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "use_cache": False}
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT |= {"image_size": 16, "patch_size": 4}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
KINDS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", SIZES),
    "BERT, tied": ("BertForMaskedLM", "BertConfig", SIZES),
    "DistilBERT": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES | {"use_cache": False}),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Qwen3, tied": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "T5 encoder": ("T5EncoderModel", "T5Config", T5),
    "ViT": ("ViTForImageClassification", "ViTConfig", VIT),
    "Swin": ("SwinForImageClassification", "SwinConfig", SWIN),
}
WHOLE = ("BERT", "BERT, tied", "DistilBERT", "GPT-2", "GPT-NeoX", "Llama", "Qwen3, tied", "ViT")
"""Those that lose whole heads; a table of positions for each head keeps the others from it."""


class Wrapped(nn.Module):
    def __init__(self, model, names):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *tensors):
        output = self.model(**dict(zip(self.names, tensors, strict=True)))
        return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def made(kind):
    cls, config, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    if "image_size" in sizes:
        return Wrapped(model, ["pixel_values"]).eval(), (torch.randn(2, 3, sizes["image_size"], sizes["image_size"]),)
    example = (torch.randint(0, 50, (2, 8)), torch.ones(2, 8, dtype=torch.int64))
    return Wrapped(model, ["input_ids", "attention_mask"]).eval(), example


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_heads_and_hidden_units_of_every_block_go(kind):
    model, example = made(kind)
    pruned = prune.prune_channels(model, example, PruneChannels(ratio=0.5, scope="layer", round_to=4))
    inner = ("query", "q_", "c_attn", ".q", "intermediate", "lin1", "c_fc", "fc1", "gate_proj", ".wi", "h_to_4h")
    before, after = groups.widths(model), groups.widths(pruned.model)
    halved = [name for name in before if any(part in name for part in inner) and "output" not in name]
    assert len(halved) >= 4
    assert {after[name] / before[name] for name in halved} == {0.5}
    assert parameters(pruned.model) < 0.6 * parameters(model)
    shapes = [[t.shape for t in surgery.run(one, example)] for one in (model, pruned.model)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_heads_go(kind):
    model, example = made(kind)
    group = next(g for g in groups.groups(model, example) if g.alternatives)
    ways = [g for g in (group, *group.alternatives) if not surgery.disproof(model, surgery.cut_of([(g, [0])]), example)]
    assert ways[0].units[0] == tuple(range(8))


def test_attributes_that_count_heads_follow_and_keys_keep_their_queries():
    model, example = made("BERT")
    pruned = prune.channels(model, example, ratio=0.5, scope="layer", round_to=4)
    attention = pruned.model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (2, 8, 16)
    model, example = made("Llama")
    pruned = prune.channels(model, example, ratio=0.5, scope="layer", round_to=4)
    attention = pruned.model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.v_proj.out_features) == (16, 8, 8)
    assert (attention.num_key_value_groups, attention.head_dim) == (2, 8)
    model, example = made("GPT-2")
    attention = prune.channels(model, example, ratio=0.5, scope="layer").model.transformer.h[0].attn
    assert (attention.num_heads, attention.split_size, attention.c_attn.nf, attention.c_proj.nx) == (2, 16, 48, 16)


def test_a_head_whose_keys_are_wrongly_assigned_is_disproved():
    model, example = made("Llama")
    group = next(g for g in groups.groups(model, example) if g.alternatives)
    edits = tuple(
        groups.Edit(e.name, e.handler, e.dim, e.out, e.idxs, tuple(i % 16 for i in e.idxs), e.shrinks)
        if "q_proj" in e.name
        else e
        for e in group.edits
    )
    wrong = groups.Group(group.layers, edits, group.units, False)
    assert surgery.disproof(model, surgery.cut_of([(wrong, [1])]), example) != ""


def test_an_output_layer_tied_to_the_embedding_says_so():
    model, example = made("GPT-2")
    why = prune.prune_channels(model, example, PruneChannels(ratio=0.5)).why["model.lm_head"]
    assert why.startswith("makes the model's outputs: ")
    assert "share one weight" in why


class Tokens(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        tokens = torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(i))
        return (tokens, torch.ones(8, dtype=torch.int64)), tokens


@pytest.mark.parametrize("kind", ["GPT-2", "BERT, tied"])
def test_tied_weights_stay_tied_through_pruning_training_and_the_checkpoint(kind, tmp_path):
    model, example = made(kind)
    data = Tokens()

    def loss(output, target):
        return nn.functional.cross_entropy(output["logits"].flatten(0, 1), target.flatten())

    def score(output, target):
        return (output["logits"].argmax(-1) == target).double().mean(1)

    splits = dict.fromkeys(("train", "calibration", "validation", "test"), data)
    task = Task(name="tokens", model=model, example=example, **splits, score=score, loss=loss)
    pruned = prune.channels(model, example, ratio=0.5, scope="layer")
    result = finetune.run(pruned, task, epochs=1, batch_size=8)
    names = [n for n, p in result.model.named_parameters(remove_duplicate=False) if p is _embedding(result.model)]
    assert len(names) == 2
    assert not torch.equal(_embedding(result.model), _embedding(pruned))
    checkpoint.save(tmp_path, task, result.model, History())
    rebuilt, _ = checkpoint.load(task, tmp_path)
    assert len([p for p in rebuilt.parameters() if p.shape == _embedding(rebuilt).shape]) == 1
    for a, b in zip(surgery.run(result.model, example), surgery.run(rebuilt, example), strict=True):
        torch.testing.assert_close(a, b)


def _embedding(model):
    return model.model.get_input_embeddings().weight
