"""Targets: what can run here, why not, and what this machine is."""

import dataclasses
import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from shrinkkit.core import machines, store
from shrinkkit.core.machines import Environment
from shrinkkit.core.target import Target
from shrinkkit.errors import InvalidInput, Unsupported
from shrinkkit.runtimes import registry, spec


def test_the_targets_are_those_that_recipes_know():
    assert tuple(registry.available()) == registry.targets()


def test_a_target_is_written_device_and_runtime():
    assert str(Target("cpu", "onnxruntime")) == "cpu/onnxruntime"


@pytest.mark.parametrize("name", ["cpu/torch", "cpu/onnxruntime"])
def test_cpu_targets_can_run_wherever_shrinkkit_is_installed(name):
    assert registry.available()[name] == ""
    assert str(registry.resolve(name)) == name


def test_an_unknown_target_is_told_the_nearest_one():
    with pytest.raises(InvalidInput, match=r"got 'cpu/onnxrutime'\. Did you mean `cpu/onnxruntime`\?"):
        registry.resolve("cpu/onnxrutime")


def test_a_known_target_that_cannot_run_here_says_why_and_what_helps():
    if not (reason := registry.available()["cuda/torch"]):
        pytest.skip("this machine can run cuda/torch")
    assert "Use `cpu/torch`" in reason
    with pytest.raises(Unsupported) as caught:
        registry.resolve("cuda/torch")
    assert str(caught.value) == f"`target` names 'cuda/torch', but {reason}."


def test_available_agrees_with_torch_about_cuda():
    import torch

    assert (registry.available()["cuda/torch"] == "") == torch.cuda.is_available()


def test_listing_targets_imports_neither_torch_nor_a_runtime():
    code = (
        "import sys; from shrinkkit.core import machines; from shrinkkit.runtimes import registry;"
        "registry.available(); machines.environment(1, packages=());"
        "sys.exit(bool({'torch', 'onnxruntime'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_hardware_has_a_name():
    assert machines.hardware(Target("cpu", "torch")) == machines.hardware(Target("cpu", "onnxruntime")) != ""


def test_the_environment_survives_the_way_to_a_file_and_back(tmp_path):
    environment = machines.environment(2, packages=registry.packages())
    store.write(tmp_path / "environment.json", environment)
    assert store.read(tmp_path / "environment.json", Environment) == environment
    assert (environment.threads, environment.cores) == (2, machines.cores())
    assert environment.memory_bytes > 2**28
    assert {"torch", "onnxruntime", "numpy", "shrinkkit"} <= set(environment.versions)


def test_the_environment_keeps_thread_settings_but_no_names_and_no_paths(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("KMP_TOOL", "/home/someone/tool.so")
    monkeypatch.setenv("SECRET", "secret")
    environment = machines.environment(1, packages=())
    assert environment.variables["OMP_NUM_THREADS"] == "2"
    assert environment.variables["KMP_TOOL"] == "(a path)"
    text = json.dumps(dataclasses.asdict(environment))
    assert not any(word in text for word in ("secret", "someone", str(Path.home()) + "/"))
    assert platform.node() not in text.split('"')


def test_only_flags_that_matter_to_arithmetic_are_kept():
    flags = ["fpu", "avx2", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "i8mm", "sve", "hypervisor", "avx2"]
    assert machines._relevant(flags) == ("amx_int8", "asimd", "avx2", "avx512_vnni", "avx_vnni", "i8mm", "sve")


def test_an_environment_with_no_thread_is_invalid():
    with pytest.raises(InvalidInput, match="`threads` must be >= 1, got 0"):
        machines.environment(0, packages=())


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is a matter of Linux")
def test_cores_are_those_that_affinity_allows():
    allowed = os.sched_getaffinity(0)
    # In a process of its own, whose only thread it is that is bound.
    code = (
        f"import os; os.sched_setaffinity(0, {{{min(allowed)}}});"
        "from shrinkkit.core import machines; print(machines.cores())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"
    assert 1 <= machines.cores() <= len(allowed)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is a matter of Linux")
def test_a_thread_that_is_bound_to_a_core_does_not_bind_the_process():
    code = (
        "import os, threading; done = threading.Event(); threading.Thread(target=done.wait).start();"
        "every = os.sched_getaffinity(0); os.sched_setaffinity(0, {min(every)});"
        "from shrinkkit.core import machines; print(machines.cores() == len(every)); done.set()"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "True"


@pytest.mark.parametrize(
    ("files", "groups", "expected"),
    [
        ({"cpu.max": "150000 100000"}, "0::/", 1.5),
        ({"cpu.max": "max 100000"}, "0::/", float("inf")),
        ({"a/cpu.max": "200000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 2.0),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "100000 100000"}, "0::/a/b", 1.0),
        ({"cpu.max": "300000 100000"}, "0::/not/seen/from/inside", 3.0),
        (
            {"cpu/x/cpu.cfs_quota_us": "50000", "cpu/x/cpu.cfs_period_us": "100000"},
            "4:memory:/y\n3:cpu,cpuacct:/x\n0::/",
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "3:cpu:/", float("inf")),
        ({}, "", float("inf")),
    ],
)
def test_the_quota_is_the_smallest_of_the_control_groups_around_the_process(tmp_path, files, groups, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert machines._quota(tmp_path, groups) == expected


def test_use_threads_sets_torch_s_threads_and_returns_them():
    import torch

    before = torch.get_num_threads()
    try:
        assert registry.use_threads(1) == 1 == torch.get_num_threads()
        assert registry.use_threads(0) == machines.cores() == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_use_threads_refuses_less_than_none():
    with pytest.raises(InvalidInput, match=r"must be >= 0 .*, got -1"):
        registry.use_threads(-1)


def test_a_missing_extra_is_told_with_the_command_that_installs_it(monkeypatch):
    found = find_spec
    monkeypatch.setattr(spec, "find_spec", lambda name: None if name == "nncf" else found(name))
    assert registry.available()["cpu/openvino"] == (
        'nncf is not installed. Install it: pip install "shrinkkit[openvino]"'
    )
    with pytest.raises(Unsupported, match=r"`target` names 'cpu/openvino', but nncf is not installed"):
        registry.resolve("cpu/openvino")


def test_inductor_needs_a_compiler_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no g++ or clang++" in registry.available()["cpu/inductor"]
    compiler = tmp_path / "clang++"
    compiler.touch(mode=0o755)
    assert registry.available()["cpu/inductor"] == ""


def test_an_onnxruntime_without_cuda_says_which_package_has_it():
    import onnxruntime

    reason = registry.available()["cuda/onnxruntime"]
    assert ("onnxruntime-gpu" in reason) == ("CUDAExecutionProvider" not in onnxruntime.get_available_providers())
