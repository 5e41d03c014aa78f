"""Depth pruning: whole blocks go by measured loss, and what cannot go says why."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from shrinkkit.core.stages import DropBlocks, settings_of, stage
from shrinkkit.errors import InvalidInput, NothingToPrune
from shrinkkit.tasks.task import Task
from shrinkkit.transforms import checkpoint
from shrinkkit.transforms.transform import apply_stage

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self, scale, stride=1):
        super().__init__()
        self.inner, self.scale, self.stride = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), scale, stride

    def forward(self, x):
        skipped = x if self.stride == 1 else x[..., :: self.stride]
        return skipped + self.scale * self.inner(x)[..., :: self.stride]


def blocks(*scales):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Sequential(*map(Block, scales)), nn.Linear(16, 3)).eval()


def task_of(model, inputs=None):
    inputs = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)) if inputs is None else inputs
    return Task(model.eval(), (inputs[:4],), inputs=list(inputs))


def dropped(task, **settings):
    return apply_stage(task.model, task, stage("drop-blocks", {"calibration_examples": 16} | settings))


def test_those_go_first_that_change_the_outputs_least(tmp_path):
    task = task_of(blocks(1.0, 0.1, 0.5, 0.2))
    model, history = dropped(task, count=2)
    assert [type(layer) for layer in model[1]] == [Block, nn.Identity, Block, nn.Identity]
    with torch.no_grad():
        x = torch.randn(5, 16)
        inner = task.model[1]
        torch.testing.assert_close(model(x), task.model[2](inner[2](inner[0](task.model[0](x)))))
    assert [note.split(":")[1] for note in history.notes[:2]] == [" dropped 1.1", " dropped 1.3"]
    assert "without which outputs differ by more" in history.left_alone["1.0.inner.0"]
    checkpoint.save(tmp_path, task, model, history)
    rebuilt, _ = checkpoint.load(task, tmp_path)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), model(x))


def test_the_error_in_the_notes_is_that_of_the_outputs():
    task = task_of(blocks(1.0, 0.1))
    model, history = dropped(task, count=1, calibration_examples=12)
    with torch.no_grad():
        x = torch.stack([task.calibration[i][0][0] for i in range(12)])
        wanted = task.model(x)
        share = float((model(x) - wanted).norm() / wanted.norm())
    assert f"differ by {100 * share:.1f} %" in history.notes[0]


def test_ratio_is_the_share_of_blocks_and_skip_keeps_some():
    task = task_of(blocks(1.0, 0.1, 0.5, 0.2))
    model, history = dropped(task, ratio=0.5, skip=["1.1", "1.3"])
    assert [type(layer) for layer in model[1]] == [Block, Block, nn.Identity, Block]
    assert history.left_alone["1.3.inner.0"] == "is in `skip`"


def test_blocks_that_change_the_shape_or_are_called_twice_stay():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.steps = nn.ModuleList([Block(1.0), Block(1.0, stride=2), Block(1.0)])
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.steps[1](self.steps[0](self.steps[0](self.steps[2](x)))))

    model, history = dropped(task_of(Twice()), count=1)
    assert [type(layer) for layer in model.steps] == [Block, Block, nn.Identity]
    assert "2 times" in history.left_alone["steps.0.inner.0"]
    assert "another shape" in history.left_alone["steps.1.inner.0"]


def test_layers_within_residual_blocks_are_no_blocks():
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))
    result, history = dropped(task_of(model, torch.randn(32, 3, 32, 32)), count=3)
    stages = result.resnet.encoder.stages
    assert [isinstance(layer, nn.Identity) for stage in stages for layer in stage.layers] == [True, True, False, True]
    assert "another shape" in history.left_alone["resnet.encoder.stages.1.layers.0.shortcut.convolution"]


def test_layers_of_a_block_are_no_blocks():
    with pytest.raises(NothingToPrune, match="it has no residual blocks"):
        dropped(task_of(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))), count=1)


def test_more_blocks_than_there_are_is_refused():
    with pytest.raises(InvalidInput, match="`count` must be at most 2"):
        dropped(task_of(blocks(1.0, 0.1)), count=3)
    with pytest.raises(InvalidInput, match="One of `count`, `ratio` must be given"):
        settings_of(DropBlocks)


@pytest.mark.parametrize("kind", ["BERT", "Llama", "ViT", "torch"])
def test_layers_of_transformers_go_and_the_model_is_rebuilt(kind, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    if kind == "BERT":
        config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, **sizes)
        model, layers = transformers.BertForSequenceClassification(config), "bert.encoder.layer"
    elif kind == "Llama":
        config = transformers.LlamaConfig(vocab_size=50, use_cache=False, **sizes)
        model, layers = transformers.LlamaForCausalLM(config), "model.layers"
    elif kind == "ViT":
        config = transformers.ViTConfig(image_size=16, patch_size=4, **sizes)
        model, layers = transformers.ViTForImageClassification(config), ""
    else:
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        model, layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), "layers"
    inputs = torch.randint(0, 50, (32, 8))
    inputs = {"ViT": torch.randn(32, 3, 16, 16), "torch": torch.randn(32, 6, 16)}.get(kind, inputs)
    task = task_of(model, inputs)
    result, history = dropped(task, count=1)
    before, after = (sum(p.numel() for p in one.parameters()) for one in (task.model, result))
    assert after < before
    checkpoint.save(tmp_path, task, result, history)
    if layers:
        kept = [name for name, m in result.get_submodule(layers).named_children() if not isinstance(m, nn.Identity)]
        assert len(kept) == 2


def test_a_block_that_the_model_needs_says_so():
    class Needing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Block(1.0), Block(1.0)])

        def forward(self, x):
            return functional.linear(self.layers[1](self.layers[0](x)), self.layers[0].inner[0].weight)

    model, history = dropped(task_of(Needing()), count=1)
    assert "fails without it: AttributeError" in history.left_alone["layers.0.inner.0"]
    assert isinstance(model.layers[1], nn.Identity)
