import os
import signal
import sys

import pytest
import torch
from torch import nn

from shrinkkit.core import warm
from shrinkkit.core.measurement import Memory
from shrinkkit.measure import peak_memory
from shrinkkit.pipeline import steps
from shrinkkit.runtimes.onnx import export as onnx_export
from shrinkkit.runtimes.torch import build as torch_build

MB = 2**20


class Holding(nn.Module):
    """Holds `held` MB of weights, and fills `used` MB in each call."""

    def __init__(self, held: int, used: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(held * MB // 4))
        self.used = used * MB // 4

    def forward(self, x):
        filled = x.sum().expand(self.used).contiguous()
        return x + filled[:1] + self.weight[:1]


INPUTS = (torch.ones(2, 3),)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    found = {}
    for name, sizes in {"small": (1, 1), "held": (96, 1), "used": (1, 128), "both": (96, 128)}.items():
        folder = tmp_path_factory.mktemp(name)
        found[name], _, _ = torch_build.write(Holding(*sizes).eval(), INPUTS, folder)
    broken = tmp_path_factory.mktemp("broken") / "model.pt2"
    broken.write_bytes(b"not a model")
    return found | {"broken": broken}


@pytest.fixture(scope="module")
def peaks(paths):
    return peak_memory.measure(paths, runtime="torch", inputs=INPUTS, threads=1)


def test_weights_and_what_a_call_fills_are_counted_to_a_few_per_cent(peaks):
    base = peaks["small"].peak_bytes
    assert peaks["held"].peak_bytes - base == pytest.approx(95 * MB, rel=0.05)
    assert peaks["used"].peak_bytes - base == pytest.approx(127 * MB, rel=0.05)
    assert peaks["both"].peak_bytes - base == pytest.approx(222 * MB, rel=0.05)


def test_what_loading_takes_is_told_apart_from_what_a_call_does(peaks):
    assert peaks["used"].load_bytes < 30 * MB
    assert peaks["held"].load_bytes > 90 * MB
    assert all(p.load_bytes <= p.peak_bytes for p in peaks.values() if isinstance(p, Memory))


def test_the_runtime_is_not_counted_as_the_files(peaks):
    assert peaks["small"].runtime_bytes > 50 * MB
    assert peaks["small"].peak_bytes < 40 * MB
    assert peaks["small"].method == "resident"


def test_a_file_that_cannot_be_loaded_says_why_and_keeps_nothing_from_the_others(peaks):
    assert "model.pt2" in peaks["broken"]
    assert sum(isinstance(peak, Memory) for peak in peaks.values()) == 4


@pytest.mark.usefixtures("warm_memory")
def test_files_of_onnx_runtime_are_counted_too(tmp_path):
    onnx_export.write(Holding(64, 1).eval(), INPUTS, tmp_path / "held.onnx")
    found = peak_memory.measure({"held": tmp_path / "held.onnx"}, runtime="onnxruntime", inputs=INPUTS, threads=2)
    assert found["held"].peak_bytes > 60 * MB


@pytest.mark.skipif(not warm.AVAILABLE, reason="processes start warm on Linux only")
def test_a_warm_start_counts_the_same(paths, peaks, monkeypatch):
    with warm.server(steps.MEMORY_IMPORTS, {}) as ready:
        monkeypatch.setenv(warm.VARIABLE, ready(lambda _: None))
        started = []
        monkeypatch.setattr(warm, "Child", lambda *a, made=warm.Child, **k: started.append(made(*a, **k)) or started[0])
        found = peak_memory.measure(paths, runtime="torch", inputs=INPUTS, threads=1)
    assert len(started) == 1
    for name in ("held", "used", "both"):
        assert found[name].peak_bytes == pytest.approx(peaks[name].peak_bytes, rel=0.03)
        assert found[name].runtime_bytes == pytest.approx(peaks[name].runtime_bytes, rel=0.03)


def test_a_process_that_ends_early_is_a_reason(paths, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    found = peak_memory.measure({"small": paths["small"]}, runtime="torch", inputs=INPUTS, threads=1)
    assert found == {"small": "the process that counts it ended early: status 1"}


@pytest.mark.usefixtures("warm_memory")
def test_a_model_that_needs_more_than_there_is_says_so(tmp_path):
    path, _, _ = torch_build.write(Holding(1, 10**9).eval(), INPUTS, tmp_path)
    found = peak_memory.measure({"huge": path}, runtime="torch", inputs=INPUTS, threads=1)
    assert "memory" in found["huge"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGKILL, "its process was ended by SIGKILL, as for want of memory"),
        (signal.SIGTERM, "its process was ended by SIGTERM"),
    ],
)
def test_a_child_that_is_ended_is_a_reason(number, reason):
    assert peak_memory._in_child(lambda: os.kill(os.getpid(), number)) == reason


def test_a_child_that_takes_too_long_is_a_reason(monkeypatch):
    monkeypatch.setattr(peak_memory, "TIMEOUT_S", 1)
    assert peak_memory._in_child(signal.pause) == "loading and calling it took longer than 1 s"


def test_a_child_that_fails_says_why_and_one_that_does_not_answers():
    assert peak_memory._in_child(lambda: {"bytes": 3}) == {"bytes": 3}
    assert "invalid literal" in peak_memory._in_child(lambda: int("three"))


@pytest.mark.usefixtures("warm_memory")
def test_inputs_so_large_that_torch_copies_them_in_parallel_do_not_stop_a_model_of_two_threads(tmp_path, monkeypatch):
    # What tests share has one thread.
    monkeypatch.delenv(warm.VARIABLE, raising=False)
    inputs = (torch.ones(8, 3, 48, 48),)
    path, _, _ = torch_build.write(nn.Conv2d(3, 32, 3).eval(), inputs, tmp_path)
    found = peak_memory.measure({"conv": path}, runtime="torch", inputs=inputs, threads=2)
    assert isinstance(found["conv"], Memory), found


def test_inputs_that_share_memory_are_counted_like_others(paths):
    whole = torch.ones(2, 3)
    found = peak_memory.measure({"small": paths["small"]}, runtime="torch", inputs=(whole[:],), threads=1)
    assert found["small"].peak_bytes < 40 * MB


def test_elsewhere_than_on_linux_the_reason_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "status")
    found = peak_memory.measure({"a": tmp_path / "a.pt2"}, runtime="torch", inputs=INPUTS, threads=1)
    assert found == {"a": "it is counted by Linux's /proc, which this system does not have"}


def test_nothing_to_measure_is_nothing(tmp_path):
    assert peak_memory.measure({}, runtime="torch", inputs=INPUTS, threads=1) == {}
