import ast
import itertools
from pathlib import Path

import pytest
import torch
from benchmarks import train_digits as train
from safetensors import safe_open

from shrinkkit.tasks import bundled, checks, loader, modules
from shrinkkit.tasks.bundled import TASKS, TEMPLATE, digits
from shrinkkit.tasks.bundled.digits import BATCH_SIZE, MODELS, SIZES, WEIGHTS
from shrinkkit.tasks.loader import BUNDLED
from shrinkkit.tasks.task import batches


@pytest.fixture(scope="module", params=BUNDLED)
def task(request):
    return loader.load(request.param)


def test_a_bundled_task_keeps_every_rule(task):
    checks.check(task)


def test_a_bundled_model_is_right_on_97_of_100_test_images(task):
    with torch.inference_mode():
        scores = torch.cat([task.score(task.model(*x), y) for x, y in batches(task.test, 100)])
    assert len(scores) == 800
    assert scores.mean() >= 0.97
    with safe_open(WEIGHTS / f"{task.name}.safetensors", "pt") as file:
        assert abs(float(file.metadata()["test_accuracy"]) - scores.mean().item()) < 0.003


def test_weights_say_how_they_were_made_and_are_small(task):
    path = WEIGHTS / f"{task.name}.safetensors"
    with safe_open(path, "pt") as file:
        assert {"task", "seed", "epochs", "validation_accuracy", "test_accuracy", "torch"} <= file.metadata().keys()
    assert path.stat().st_size <= 3_500_000


def test_splits_have_their_sizes_and_every_class_in_the_same_share():
    whole = torch.cat([labels for _, labels in digits.splits().values()]).bincount() / 1797
    for split, (images, labels) in digits.splits().items():
        assert len(images) == SIZES[split]
        assert (labels.bincount(minlength=10) / len(labels) - whole).abs().max() < 0.02


def test_no_image_is_in_two_splits_or_twice_in_one():
    images = torch.cat([images for images, _ in digits.splits().values()]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 1797


def test_patches_hold_the_pixels_of_the_image_row_by_row():
    images = torch.rand(2, 1, 32, 32)
    patches = digits.as_patches(images)
    assert torch.equal(patches[:, 9], digits.as_images(images)[:, 0, 4:8, 4:8].flatten(1))


def test_augmented_images_keep_shape_and_range_and_follow_the_generator():
    images = digits.enlarge(digits.splits()["train"][0][:6])
    one, same, other = (train.augment(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert one.shape == images.shape
    assert one.min() >= 0
    assert one.max() <= 1
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.slow
def test_training_writes_weights_that_the_model_loads(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    train.main(["digits-lstm", "--epochs", "1", "--out", str(tmp_path)])
    torch.set_num_threads(threads)
    monkeypatch.setattr(digits, "WEIGHTS", tmp_path)
    assert digits.task("digits-lstm").name == "digits-lstm"


def test_the_template_runs_as_it_is_and_keeps_every_rule():
    task = loader.load(TEMPLATE)
    checks.check(task)
    assert len({name.split(".")[0] for name in modules.layers(task.model)}) == 3


def test_the_list_of_tasks_needs_no_torch():
    tree = ast.parse(Path(bundled.__file__).read_text())
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imported] == ["pathlib"]
    assert tuple(TASKS) == tuple(MODELS) == BUNDLED


def test_the_example_is_a_batch_of_the_data(task):
    inputs, _ = next(batches(task.calibration, BATCH_SIZE))
    assert all(torch.equal(a, b) for a, b in itertools.zip_longest(task.example, inputs))
