"""Names of machines: what the hardware calls itself, without what tells nothing and without whose it is."""

import dataclasses
import platform
import re

import examples
import pytest

from shrinkkit.core import machines
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.target import Place, Target


@pytest.mark.parametrize(
    ("hardware", "cores", "short"),
    [
        ("Intel(R) Xeon(R) Platinum 8488C", 2, "xeon-8488c-2-cores"),
        ("Intel(R) Xeon(R) CPU E5-2686 v4 @ 2.30GHz", 8, "xeon-e5-2686-v4-8-cores"),
        ("13th Gen Intel(R) Core(TM) i9-13900K", 24, "core-i9-13900k-24-cores"),
        ("AMD EPYC 7R13 Processor", 1, "epyc-7r13-1-core"),
        ("AMD Ryzen 9 5950X 16-Core Processor", 16, "ryzen-9-5950x-16-cores"),
        ("AMD Ryzen 7 PRO 5850U with Radeon Graphics", 8, "ryzen-7-pro-5850u-8-cores"),
        ("NVIDIA A100-SXM4-80GB", 16, "a100-sxm4-80gb-16-cores"),
        ("Apple M2 Pro", 10, "apple-m2-pro-10-cores"),
        ("CPU", 4, "cpu-4-cores"),
        ("", 4, "unknown-4-cores"),
        ("../../etc", 4, "etc-4-cores"),
    ],
)
def test_a_name_keeps_the_model_and_drops_the_noise(hardware, cores, short):
    assert machines.name(hardware, cores) == short


@pytest.mark.parametrize(
    "hardware", ["NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "x" * 200, "Größe \n/ %"]
)
def test_a_name_is_short_and_fit_for_a_folder_whatever_the_hardware_says(hardware):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-128-cores", machines.name(hardware, 128))
    assert len(machines.name(hardware, 128)) <= 40


def test_this_machine_has_the_name_that_its_records_give_it():
    assert machines.this_machine(Target("cpu", "torch")) == machines.this_machine(Target("cpu", "onnxruntime"))
    assert machines.this_machine(Target("cpu", "torch")) == machines.names(machines.environment(1, packages=()))[0]
    assert machines.this_machine(Target("cpu", "torch")).endswith(
        f"-{machines.cores()}-core{'s' * (machines.cores() > 1)}"
    )
    assert platform.node() not in machines.this_machine(Target("cpu", "torch"))


def test_a_machine_without_a_gpu_goes_by_its_processor(monkeypatch):
    monkeypatch.setattr(machines, "_gpus", tuple)
    assert machines.this_machine(Target("cuda", "torch")) == machines.this_machine(Target("cpu", "torch"))


def test_a_machine_with_gpus_goes_by_its_processor_and_by_the_first_of_them():
    both = dataclasses.replace(examples.ENVIRONMENT, cpu="AMD EPYC 9654", gpu="NVIDIA H200, NVIDIA T4", cores=16)
    assert machines.names(both) == ("epyc-9654-16-cores", "h200-16-cores")


def test_a_place_is_a_target_on_a_machine_and_is_read_back_from_its_text():
    torch = Target("cpu", "torch")
    away = Place(torch, "epyc-7r13-8-cores")
    assert str(away) == "cpu/torch @ epyc-7r13-8-cores"
    assert str(Place(torch)) == "cpu/torch"
    assert [Place.parse(str(place)) for place in (away, Place(torch))] == [away, Place(torch)]


def test_two_machines_never_share_a_record():
    paths = {
        RunFolder("").measurement(t, m).as_posix()
        for t in ("cpu/torch", "cuda/torch")
        for m in ("a-1-core", "b-1-core")
    }
    assert len(paths) == 4
    assert "measurements/a-1-core/cpu-torch.json" in paths


@pytest.mark.parametrize(
    ("flags", "slow"),
    [
        ("fma avx2 f16c", {"float16", "bfloat16"}),
        ("avx2 avx512_bf16", {"float16"}),
        ("avx512_fp16 amx_bf16", set()),
        ("asimd asimdhp bf16", set()),
        ("", set()),  # hidden by the system
    ],
)
def test_half_precision_is_slow_where_no_instruction_computes_in_it(flags, slow):
    precisions = ("float32", "static-int8", "float16", "bfloat16")
    assert {name for name in precisions if machines.lacks(name, flags.split())} == slow
