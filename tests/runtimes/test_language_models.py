"""Causal language models with their cache as inputs: one file reads a prompt and generates token by token."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from shrinkkit.core.stages import stage
from shrinkkit.errors import NothingToPrune
from shrinkkit.runtimes import files
from shrinkkit.tasks import adapters, checks, outputs
from shrinkkit.transforms import variants
from shrinkkit.transforms.transform import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")

RUNTIMES = ("torch", "onnxruntime", "openvino")
WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
TEXTS = [" ".join(WORDS[(i + j * (1 + i // 10)) % 10] for j in range(5 + i % 8)) for i in range(60)]
GPT = {"vocab_size": 12, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 32}
LLAMA = {"vocab_size": 12, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
KINDS = {"GPT2": ("GPT2LMHeadModel", GPT), "Llama": ("LlamaForCausalLM", LLAMA)}


def tokenizer():
    of_words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}, unk_token="[UNK]"))
    of_words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=of_words, unk_token="[UNK]", pad_token="[PAD]")


def task(kind, **options):
    """The task of a model trained until it predicts the next word."""
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**sizes))
    ids = tokenizer()(TEXTS, padding=True, return_tensors="pt")
    ids = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        model(**ids, labels=torch.where(ids["attention_mask"] > 0, ids["input_ids"], -100)).loss.backward()
        optimizer.step()
    return adapters.from_transformers(model.eval(), TEXTS, tokenizer=tokenizer(), batch_size=4, **options)


@pytest.fixture(scope="module", params=KINDS)
def made(request):
    return task(request.param)


def logits(call, inputs, *, prompt):
    """Return the logits of a call on a prompt, and of each further token with the cache that the call before gave."""
    ids, mask, *cache = inputs
    steps = [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]
    parts = []
    for start, end in steps:
        first, *cache = outputs.tensors(call(ids[:, start:end], mask[:, :end], *cache))
        parts.append(first)
    return torch.cat(parts, 1)


def test_its_score_is_that_of_whole_texts_and_reading_and_generating_are_workloads(made):
    checks.check(made)
    assert made.metric == "log-likelihood per token"
    assert all(x.shape[2] == 0 for x in made.example[2:])
    shapes = {
        name: [x.shape[d] for x, d in zip(inputs[:3], (1, 1, 2), strict=True)]
        for name, inputs in made.workloads.items()
    }
    assert shapes == {
        "prefill 6 tokens (time to first token)": [6, 6, 0],
        "decode 1 token after 6": [1, 7, 6],
        "prefill 6 tokens after 6": [6, 12, 6],
    }


@pytest.mark.parametrize(("precision", "limit"), [("float32", 1e-5), ("static-int8", 0.15)])
def test_a_file_fed_its_own_cache_gives_the_outputs_of_the_original_on_the_whole(made, tmp_path, precision, limit):
    settings = {precision: {"calibration_examples": 16}} if "static" in precision else precision
    variant = variants.write(tmp_path / "v", made, made.model, precision=settings, runtimes=RUNTIMES)
    assert [file.runtime for file in variant.files] == list(RUNTIMES)
    like, inputs = variants.output_of(made), (made.example[0], torch.ones_like(made.example[1]), *made.example[2:])
    expected = made.model(*inputs)["logits"]
    for file in variant.files:
        loaded = files.load(tmp_path / "v" / file.path, runtime=file.runtime, like=like)
        for prompt in (8, inputs[0].shape[1]):
            error = (logits(loaded, inputs, prompt=prompt) - expected).norm() / expected.norm()
            assert error < limit, (file.runtime, prompt)


def test_layers_whose_cache_is_an_output_are_not_dropped(made):
    with pytest.raises(NothingToPrune, match="such as the cache of a language model"):
        apply_stage(made.model, made, stage("drop-blocks", {"count": 1}))


def test_a_model_whose_cache_is_no_keys_and_values_says_so_and_goes_without():
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)).eval()
    plain = adapters.from_transformers(mamba, TEXTS, tokenizer=tokenizer())
    assert any("cache cannot be its inputs, so whole texts are computed" in note for note in plain.notes)
    assert (len(plain.example), plain.workloads) == (2, {})
