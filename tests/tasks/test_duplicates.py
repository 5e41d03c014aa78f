"""Examples that repeat, with and without noise, in data of several kinds."""

import pytest
import torch

from shrinkkit.tasks.duplicates import Sketches

KINDS = {
    "images": lambda n, g: torch.rand(n, 1, 16, 16, generator=g),
    "sparse images": lambda n, g: torch.rand(n, 1, 16, 16, generator=g) * (torch.rand(n, 1, 16, 16, generator=g) > 0.9),
    "large images": lambda n, g: torch.rand(n, 3, 40, 40, generator=g),
    "tables": lambda n, g: torch.randn(n, 20, generator=g),
    "tables of unlike columns": lambda n, g: torch.randn(n, 20, generator=g) * 10.0 ** torch.arange(-10, 10),
    "tables with an offset": lambda n, g: torch.randn(n, 20, generator=g) + 1000,
    "small tables": lambda n, g: torch.randn(n, 4, generator=g),
}


def sketched(**splits):
    sketches = Sketches((next(iter(splits.values())),))
    for name, inputs in splits.items():
        for x in inputs:
            sketches.add(name, [x])
    return sketches


def drawn(kind, n, seed):
    return KINDS[kind](n, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_unlike_examples_are_no_duplicates(kind):
    sketches = sketched(train=drawn(kind, 400, 1), test=drawn(kind, 300, 2))
    assert not sketches.equal()
    assert not sketches.near()
    assert sketches.repeats("test") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_examples_are_counted(kind):
    test = drawn(kind, 100, 2)
    sketches = sketched(train=torch.cat([drawn(kind, 200, 1), test[:30]]), test=test)
    assert sketches.equal() == {("train", "test"): 30}
    assert sketched(test=torch.cat([test, test[:30], test[:10]])).repeats("test") == 40


@pytest.mark.parametrize("noise", [1e-7, 1e-6])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_hides_no_copy(kind, noise):
    test = drawn(kind, 100, 2)
    other = test + noise * test.std(0) * torch.randn(test.shape, generator=torch.Generator().manual_seed(3))
    sketches = sketched(validation=other[torch.randperm(100)], test=test)
    assert sketches.near()[("validation", "test")] >= 95


@pytest.mark.parametrize("kind", ["images", "sparse images", "large images", "tables"])
def test_larger_noise_hides_no_copy_of_many_numbers(kind):
    test = drawn(kind, 100, 2)
    sketches = sketched(validation=test + 1e-4 * torch.randn(test.shape), test=test)
    assert sketches.near()[("validation", "test")] >= 60


@pytest.mark.parametrize("kind", ["images", "tables"])
def test_one_near_copy_is_enough_to_be_found(kind):
    test = drawn(kind, 100, 2)
    sketches = sketched(train=torch.cat([drawn(kind, 300, 1), test[7:8] + 1e-5]), test=test)
    assert sketches.near() == {("train", "test"): 1}


def test_neighbours_on_a_dense_line_are_no_copies():
    grid = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    assert not sketched(train=grid[:2000], test=grid[2000:]).near()


def test_tokens_must_be_the_same_to_be_copies():
    tokens = torch.randint(0, 30_000, (200, 32), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 5] += 1
    sketches = sketched(validation=other, test=tokens)
    assert not sketches.equal()
    assert not sketches.near()
    assert sketched(validation=tokens[:50], test=tokens).equal() == {("validation", "test"): 50}


def test_one_example_far_off_or_not_finite_hides_no_copy():
    test = drawn("images", 60, 2)
    test[3], test[4, 0, 0, 0] = 1e38, float("nan")
    assert sketched(validation=test + 1e-6, test=test).near()[("validation", "test")] >= 57


def test_identical_examples_are_counted():
    same = torch.ones(20, 3)
    assert sketched(test=same).repeats("test") == 19
