import pytest
import torch
from tiny import task as tiny_task
from torch import nn

from shrinkkit import Task
from shrinkkit.core.robustness import SEVERITIES
from shrinkkit.errors import InvalidInput, InvalidTask
from shrinkkit.measure import corruptions


class Last(nn.Module):
    """Takes any inputs and returns numbers of the first one."""

    def forward(self, x, *others):
        return x.float().flatten(1)[:, :2]


def task_of(*inputs, **fields):
    count = len(inputs[0])
    splits = [(tuple(x[i] for x in inputs), torch.tensor(0)) for i in range(count)]
    example = tuple(x[:4] for x in inputs)
    score = lambda output, target: torch.ones(len(output))  # noqa: E731
    loss = lambda output, target: output.sum()  # noqa: E731
    names = ("train", "calibration", "validation", "test")
    return Task(Last(), example, "kinds", **dict.fromkeys(names, splits), score=score, loss=loss, **fields)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(*shape, seed=0):
    """Return walks along the dimension after the batch, and along what follows the channels of images."""
    x = drawn(*shape, seed=seed)
    for dim in range(2 if x.dim() == 4 else 1, 2 if len(shape) < 4 else 4):
        x = x.cumsum(dim)
    return x


def words(*shape, seed=0):
    return torch.randint(5, 90, shape, generator=torch.Generator().manual_seed(seed))


KINDS = {
    "gray images": lambda: (smooth(16, 1, 12, 12),),
    "colour images": lambda: (smooth(16, 3, 16, 20),),
    "steps": lambda: (smooth(16, 40, 5),),
    "waveforms": lambda: (smooth(16, 400),),
    "features": lambda: (drawn(16, 12),),
    "texts": lambda: (words(16, 30), torch.ones(16, 30, dtype=torch.long)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_stronger_corruptions_change_inputs_more(kind):
    task = task_of(*KINDS[kind]())
    inputs = KINDS[kind]()
    before = [x.clone() for x in inputs]
    found, why = corruptions.of_task(task)
    assert found
    assert not why
    for corruption in found:
        changed = [corruption(inputs, severity, seed=3) for severity in SEVERITIES]
        distances = [float((one[0].double() - inputs[0].double()).abs().mean()) for one in changed]
        assert distances[0] > 0, corruption.name
        assert distances[-1] > 1.1 * distances[0], corruption.name
        for one in changed:
            assert [(x.shape, x.dtype) for x in one] == [(x.shape, x.dtype) for x in inputs]
            assert all(torch.isfinite(x).all() for x in one if x.is_floating_point())
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_corruptions_are_the_same_for_the_same_seed_and_others_for_another(kind):
    inputs = KINDS[kind]()
    for corruption in corruptions.of_task(task_of(*inputs))[0]:
        first, again, other = (corruption(inputs, 3, seed=seed)[0] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        if corruption.name not in ("blur", "contrast", "brightness", "JPEG", "gain"):
            assert not torch.equal(first, other), corruption.name


def test_images_keep_their_range_of_values():
    images = 5 + 3 * torch.rand(16, 3, 16, 16)
    for corruption in corruptions.of_task(task_of(images))[0]:
        changed = corruption((images,), 5, seed=0)[0]
        assert changed.min() >= images.min() - 1e-4, corruption.name
        assert changed.max() <= images.max() + 1e-4, corruption.name


def test_texts_lose_or_swap_their_own_tokens_and_masks_stay():
    texts, mask = words(16, 30), torch.ones(16, 30, dtype=torch.long)
    dropped, swapped = corruptions.of_task(task_of(texts, mask))[0]
    for corruption in (dropped, swapped):
        changed, kept = corruption((texts, mask), 5, seed=0)
        assert torch.equal(kept, mask)
        assert all(set(row.tolist()) <= set(text.tolist()) for row, text in zip(changed, texts, strict=True))
    assert torch.equal(swapped((texts, mask), 5, seed=0)[0].sort(1).values, texts.sort(1).values)


def test_a_shift_moves_an_image_by_the_share_of_its_side():
    images = torch.zeros(32, 1, 40, 40)
    images[:, :, 18:22, 18:22] = 1.0
    shift = next(c for c in corruptions.of_task(task_of(images))[0] if c.name == "shift")
    moved = shift((images,), 5, seed=0)[0]
    rows, columns = (moved * torch.arange(40).view(shape) for shape in ((1, 1, 40, 1), (1, 1, 1, 40)))
    mass = moved.sum((1, 2, 3))
    away = torch.stack([x.sum((1, 2, 3)) / mass - 19.5 for x in (rows, columns)]).norm(dim=0)
    assert torch.allclose(away, torch.full_like(away, 0.15 * 40), atol=0.1)


def test_a_task_adds_a_corruption_in_a_line():
    task = task_of(drawn(16, 12), corruptions={"sign": lambda inputs, severity: (-inputs[0] * severity,)})
    *_, own = corruptions.of_task(task)[0]
    assert own.name == "sign"
    assert torch.equal(own((torch.ones(2, 12),), 3, seed=0)[0], torch.full((2, 12), -3.0))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda inputs, severity: (inputs[0][:, :5],), "same shapes"),
        (lambda inputs, severity: inputs[0].double(), "same shapes and types"),
        (lambda inputs, severity: inputs[0] / 0, "finite"),
    ],
)
def test_a_corruption_of_the_tasks_own_that_breaks_a_rule_is_named(change, problem):
    *_, own = corruptions.of_task(task_of(drawn(16, 12), corruptions={"mine": change}))[0]
    with pytest.raises(InvalidTask, match=f"'mine'.*{problem}.*at severity 2"):
        own((torch.ones(2, 12),), 2, seed=0)


def test_a_corruption_of_the_tasks_own_replaces_the_built_in_one_of_its_name():
    task = task_of(drawn(16, 12), corruptions={"noise": lambda inputs, severity: inputs[0] + 1})
    noise, _ = corruptions.of_task(task)[0]
    assert torch.equal(noise((torch.ones(2, 12),), 3, seed=0)[0], torch.full((2, 12), 2.0))


@pytest.mark.parametrize("severity", [0, 6])
def test_a_severity_out_of_range_is_refused(severity):
    corruption = corruptions.of_task(tiny_task())[0][0]
    with pytest.raises(InvalidInput, match="1, 2, 3, 4 or 5"):
        corruption(tiny_task().example, severity, seed=0)


def test_inputs_of_no_known_kind_are_said_to_have_no_corruptions():
    found, why = corruptions.of_task(task_of(torch.ones(16, 3, dtype=torch.bool)))
    assert not found
    assert "Task(corruptions=" in why
