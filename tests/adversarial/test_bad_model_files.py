"""Model files that prove nothing, hang, or crash whatever opens them."""

import contextlib
import json
import shutil
import subprocess
import sys
import time

import onnx
import pytest
import torch
from attacks import contents, edited, every, packed
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file
from tiny import task as tiny_task

from shrinkkit import cli
from shrinkkit.core import store
from shrinkkit.errors import InvalidInput, ModelFileError
from shrinkkit.results import cards
from shrinkkit.runtimes import base, files
from shrinkkit.runtimes.base import UnsafeContent
from shrinkkit.runtimes.torch import build as torch_build
from shrinkkit.runtimes.torch import scan as torch_scan
from shrinkkit.transforms import variants

INF, NAN = float("inf"), float("nan")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, task = tmp_path_factory.mktemp("run") / "baseline", tiny_task()
    variants.write(folder, task, task.model, runtimes=["torch", "onnxruntime"])
    return folder


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A good `.pt2` file."""
    task = tiny_task()
    return torch_build.write_program(task.model, task.example, tmp_path_factory.mktemp("program"))[0]


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "baseline")


def verify(folder, *options):
    """Return the exit status of the command, and its findings by target."""
    call = [sys.executable, "-m", "shrinkkit.cli", "verify", str(folder), "--json", "--threads", "1", *options]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, {one["target"]: one for one in json.loads(done.stdout)["findings"]}


def rewrite(folder, name):
    """Make the record fit a file that was changed."""
    examples = {"sha256": store.sha256(folder / name), "size_bytes": (folder / name).stat().st_size}
    record = json.loads((folder / "variant.json").read_text())
    for file in record["files"]:
        file |= examples if file["path"] == name else {}
    (folder / "variant.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "expected",
    [[NAN, 1.0], [INF, 1.0], [-INF, 1.0], [NAN, NAN], [], [[], []]],
    ids=str,
)
@pytest.mark.parametrize("found", [[1.0, 2.0], [NAN, 1.0], []], ids=str)
def test_no_output_deviates_by_a_number_from_outputs_that_prove_nothing(expected, found):
    with pytest.raises(ModelFileError):
        base.max_relative_error(torch.tensor(expected), torch.tensor(found))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loaded_file_that_is_not_finite_deviates_by_no_number(value):
    with pytest.raises(ModelFileError, match="finite"):
        base.max_relative_error(torch.ones(2), torch.tensor([1.0, value]))


def change_reference(folder, change):
    stored = load_file(folder / "reference.safetensors")
    save_file(
        {name: change(name, value).contiguous() for name, value in stored.items()}, folder / "reference.safetensors"
    )


CHANGES = {
    "outputs are NaN": lambda name, x: x if "input" in name else x * NAN,
    "one output is NaN": lambda name, x: x if "input" in name else x.index_fill(1, torch.tensor([0]), NAN),
    "outputs are infinite": lambda name, x: x if "input" in name else x / 0,
    "inputs are NaN": lambda name, x: x * NAN if "input" in name else x,
    "the batch is empty": lambda name, x: x[:0],
    "only the outputs are empty": lambda name, x: x if "input" in name else x[:0],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_reference_that_proves_nothing_is_damage(folder, change):
    from shrinkkit.measure import verify

    change_reference(folder, change)
    found = verify.check(folder, only=["cpu/torch", "cpu/onnxruntime"], threads=1, seconds=0.02)
    assert not found.verified
    assert {one.state for one in found.findings} == {"damaged"}
    assert {one.max_relative_error for one in found.findings} == {None}


@pytest.mark.parametrize("value", [NAN, INF, -INF, 7.0])
def test_weights_that_were_changed_are_never_verified(folder, value):
    from shrinkkit.measure import verify

    name = "model.torchscript.pt"
    script = torch.jit.load(folder / name)
    with torch.no_grad():
        next(p for name, p in script.named_parameters() if name.endswith("head_bias")).fill_(value)
    script.save(folder / name)
    torch_build._make_reproducible(folder / name)
    rewrite(folder, name)
    found = verify.check(folder, only=["cpu/torch"], threads=1, seconds=0.02)
    assert found.findings[0].state == "differs"


SIZES = (
    "Mod(Pow(9,Pow(9,Pow(9,9))),7)",
    "Pow(Integer(9),Pow(Integer(9),Integer(99)))",
    "Pow(9,99999999999)",
    "Pow('9','99999999999')",
    "Pow(Pow(Pow(Pow(Pow(9,99),99),99),99),99)",
    "Pow(b=9,e=Pow(9,99))",
    "PowByNatural(9,Pow(9,9))",
    "FloatPow(9,Pow(9,99))",
    "LShift(1,99999999999)",
    "LShift(1,LShift(1,64))",
    "Mul(Pow(2,8000),Pow(2,8000),Pow(2,8000))",
    "Max(1,Pow(9,Pow(9,9)))",
    "Pow(Symbol('s0', integer=True),Pow(9,9))",
    "Pow(2,Mul(Symbol('s0', integer=True),Integer(1000000000000)))",
    "Integer(1e999)",
    "Float('0.5', precision=1000000000)",
    "Add(" + "1," * 5000 + "1)",
    "Add(" * 3000 + "1" + ")" * 3000,
)  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=lambda text: text[:30])
def test_a_size_that_would_be_computed_without_end_is_refused_at_once(program, tmp_path, size):
    entries = contents(program)
    with edited(entries) as stated:
        for holder in every(stated, "expr_str"):
            holder["expr_str"] = size
    start = time.monotonic()
    with pytest.raises(ModelFileError):
        files.load(packed(tmp_path / "model.pt2", entries), runtime="torch")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "guard",
    ["L['x'].size()[0] < 9 ** 9 ** 9 ** 9", "1 << 99999999999 > 1", "9 ** L['x'].size()[0] > 1", "Pow(9,Pow(9,9)) > 1"],
)
def test_a_guard_that_would_be_computed_without_end_is_refused_at_once(guard):
    with pytest.raises(UnsafeContent, match="endless guard"):
        torch_scan._guard(guard)


@pytest.mark.parametrize(
    "size",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Mul(Integer(2), Symbol('s77', integer=True)), Integer(1))",
        "Pow(Symbol('s77', integer=True), Integer(2))",
        "FloorDiv(Mul(Symbol('s0'), Integer(-32)), Integer(4))",
        "Mul(Rational(1, 2), Pow(Symbol('s0', integer=True), Integer(-1)))",
        "Pow(Symbol('s0', integer=True), Float('0.5', precision=53))",
        "Max(Integer(1), Mod(Symbol('s0', integer=True), Integer(9223372036854775807)))",
    ],
)
def test_sizes_that_models_have_are_let_through(size):
    torch_scan._expression(size)


@pytest.mark.parametrize(
    "guard", ["L['x'].size()[0] == 8", "2 * L['x'].size()[0] % 3 != 0", " and ".join(["L['x'].dim() >= 1"] * 60)]
)
def test_guards_that_models_have_are_let_through(guard):
    torch_scan._guard(guard)


def endless_loop(path, batch=4):
    """Write an ONNX model of the ports of the tiny one that adds a number 2^62 times."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    kept, one = (helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("kept", "more"))
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("on", "go")]
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["go"]), helper.make_node("Add", ["kept", "kept"], ["more"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), flags[0], kept],
        [flags[1], one],
    )
    numbers = [
        helper.make_tensor("rounds", TensorProto.INT64, [], [1 << 62]),
        helper.make_tensor("yes", TensorProto.BOOL, [], [True]),
        helper.make_tensor("dims", TensorProto.INT64, [1], [1]),
    ]
    nodes = [helper.make_node("Loop", ["rounds", "yes", "x"], ["y"], body=body)]
    graph = helper.make_graph(nodes, "endless", [x], [y], numbers[:2])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def test_files_that_hang_or_are_whole_get_a_finding_each_in_time(folder):
    endless_loop(folder / "model.onnx")
    rewrite(folder, "model.onnx")
    start = time.monotonic()
    status, found = verify(folder, "--timeout", "12", "--target", "cpu/torch", "--target", "cpu/onnxruntime")
    assert status == 1
    assert (found["cpu/torch"]["state"], found["cpu/onnxruntime"]["state"]) == ("ok", "fails")
    assert "12 s" in found["cpu/onnxruntime"]["why"]
    assert time.monotonic() - start < 90


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
def test_a_time_limit_that_is_none_is_refused(made, capsys, value):
    assert cli.main(["verify", str(made), f"--timeout={value}"]) == 2
    assert "timeout" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "-3", "100000", "10000000", "99999999999999999999"])
def test_threads_that_the_machine_has_not_are_refused_before_a_file_is_opened(made, capsys, value):
    assert cli.main(["verify", str(made), f"--threads={value}"]) == 2
    assert "cores" in capsys.readouterr().err


NOT_RECORDS = (
    b"", b"null", b"[]", b"3", b'"text"', b"{}", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
    b'{"schema_version": "3"}', b'{"schema_version": null}', b'{"schema_version": [3]}', b'{"schema_version": 1e400}',
    b'{"schema_version": NaN}', b'{"schema_version": true}', b'{"schema_version": 99}', b"9" * 10_000,
)  # fmt: skip


@pytest.mark.parametrize("content", NOT_RECORDS, ids=lambda content: repr(content[:24]))
@pytest.mark.parametrize("name", ["variant.json", "model-card.json"])
def test_what_is_no_record_is_told_in_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    read = variants.read if name == "variant.json" else cards.read
    with pytest.raises(InvalidInput) as caught:
        read(tmp_path)
    assert name in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"PK\x05\x06" + b"\0" * 18, b"[" * 50_000, b"\xff" * 1000])
@pytest.mark.parametrize("name", ["model.pt2", "model.torchscript.pt", "model.onnx", "model.xml"])
def test_what_is_no_model_file_is_told_in_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with contextlib.suppress(FileNotFoundError):
        (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ModelFileError) as caught:
        files.scan(
            tmp_path / name, runtime={"onnx": "onnxruntime", "xml": "openvino"}.get(name.rpartition(".")[2], "torch")
        )
    assert name in str(caught.value)
