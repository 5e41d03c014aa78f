"""Marks that skip with their reason, and settings that every test shares."""

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile
from contextlib import ExitStack

import lab
import pytest
import torch

from shrinkkit.core import warm
from shrinkkit.pipeline import plan, steps


def pytest_configure(config):
    # One for all tests, because what was compiled is looked up there for as long as the process lives.
    folder = tempfile.mkdtemp(prefix="shrinkkit-inductor-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


SLOW = (
    *("test_runner", "test_lab", "test_coverage", "adversarial", "test_notebooks", "test_packaging", "test_techniques"),
    *("runtimes", "test_variants", "test_session", "test_pages", "test_unseen", "test_verify", "test_sweep"),
    *("test_peak_memory", "test_steps", "test_cards", "test_export", "test_bundled", "test_portability"),
    *("test_set_metric", "test_pruning", "test_quantization", "test_copies", "test_output", "test_transformers"),
    *("test_adapters", "test_every_transform", "test_equalize"),
)
"""Files and folders of slow tests, longest first. They start first, so that no worker is left with one at the end."""


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(SLOW)}
    ranks = {item: min(rank.get(name, len(SLOW)) for name in (item.path.stem, item.path.parent.name)) for item in items}
    items.sort(key=ranks.__getitem__)
    for item in items:
        if ranks[item] < len(SLOW):
            item.add_marker(pytest.mark.slow)
    reasons = {
        "gpu": "" if torch.cuda.is_available() else "torch sees no GPU",
        "browser": "" if lab.browser() else "Chromium is not installed",
    }
    for item in items:
        for mark, reason in reasons.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


_modules = 0


def pytest_runtest_setup():
    """Leave libraries out of garbage collection, which takes 0.3 s with them, ten times as a model file is built."""
    global _modules
    if len(sys.modules) > _modules:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def one_registry():
    """Have torch read its table of ONNX operators once, and not for each of hundreds of exports."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="module")
def opened():
    """A headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=lab.browser(), args=lab.ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="session")
def warm_start():
    """What the steps of all runs with one thread are forked from: starting it takes longer than most runs."""
    kinds = [plan.Planned(name, name, "", {}, (), "left") for name in ("1-baseline", "3-quantize", plan.BENCHMARK)]
    with ExitStack() as stack:
        yield steps.WarmStart(kinds, 1, stack)


@pytest.fixture(scope="session")
def warm_address(warm_start):
    """The address of the process that `warm_start` forks notebooks from."""
    return warm_start.addresses(plan.Planned("3-quantize", "3-quantize", "", {}, (), "left"), lambda *_: None)[0]


@pytest.fixture
def warm_memory(warm_start, monkeypatch):
    """Fork what measures memory from the process that is shared for it."""
    step = plan.Planned(plan.BENCHMARK, plan.BENCHMARK, "", {}, (), "left")
    monkeypatch.setenv(warm.VARIABLE, warm_start.addresses(step, lambda *_: None)[1])


@pytest.fixture
def same_threads():
    """Undo what a test changes of torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """Compute with one thread: those that wait for each other on a busy machine take the time of everything."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
