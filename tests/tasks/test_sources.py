"""Which files belong to a task, and whether they changed."""

import os
import sqlite3
import sys

import numpy as np
import pytest
import safetensors.torch
import torch

from shrinkkit.tasks import sources


@pytest.fixture
def folder(tmp_path):
    np.save(tmp_path / "array.npy", np.arange(8.0))
    torch.save(torch.ones(2), tmp_path / "tensor.pt")
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.csv").write_text("1,2\n")
    sqlite3.connect(tmp_path / "base.db").close()
    with sqlite3.connect(tmp_path / "base.db") as base:
        base.execute("create table t(x)")
    base.close()
    return tmp_path


def connected(path):
    with sqlite3.connect(path) as base:
        base.execute("select * from t").fetchall()
    base.close()


WAYS = {
    "open": ("text.csv", lambda p: p.read_text()),
    "os.open": ("text.csv", lambda p: os.close(os.open(p, os.O_RDONLY))),
    "numpy.load": ("array.npy", np.load),
    "numpy.memmap": ("array.npy", lambda p: np.load(p, mmap_mode="r")),
    "numpy.memmap to write": ("array.npy", lambda p: np.load(p, mmap_mode="r+")),
    "torch.load": ("tensor.pt", torch.load),
    "torch.load, mapped": ("tensor.pt", lambda p: torch.load(p, mmap=True)),
    "torch.from_file": ("array.npy", lambda p: torch.from_file(str(p), size=4)),
    "safetensors": ("weights.safetensors", safetensors.torch.load_file),
    "sqlite3": ("base.db", connected),
}


@pytest.mark.parametrize(("name", "read"), WAYS.values(), ids=WAYS)
def test_a_file_that_is_read_is_seen_in_whichever_way(folder, name, read):
    with sources.watch() as files:
        kept = read(folder / name)
    assert files == {folder / name}
    del kept


def test_files_that_are_written_or_gone_or_of_packages_are_left_out(tmp_path):
    with sources.watch() as files:
        (tmp_path / "log").write_text("x")
        (tmp_path / "log").read_text()
        (tmp_path / "gone").write_text("x")
        (tmp_path / "gone").unlink()
        (tmp_path / ".cache").mkdir()
        (tmp_path / ".cache" / "x").touch()
        open(np.__file__).close()
        open("/proc/self/status").close()
        open(os.__file__).close()
    assert files == set()


def test_files_opened_before_or_after_are_not_the_task_s(folder):
    with (folder / "text.csv").open():
        with sources.watch() as files:
            pass
        (folder / "tensor.pt").read_bytes()
    assert files == set()


def test_imported_source_counts_wherever_it_lies_but_not_in_packages(tmp_path, monkeypatch):
    (tmp_path / "far_away.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import far_away

    monkeypatch.delitem(sys.modules, "far_away")
    assert tmp_path / "far_away.py" not in sources.imported()
    monkeypatch.setitem(sys.modules, "far_away", far_away)
    found = sources.imported()
    assert tmp_path / "far_away.py" in found
    assert not [path for path in found if "site-packages" in path.parts or path.name == "tasks.py"]


def test_a_change_is_named_by_file_and_an_equal_file_is_none(folder):
    files = sources.hashes([folder / "text.csv", folder / "tensor.pt"])
    assert sources.changed(files) == ""
    (folder / "text.csv").write_text("1,2\n")
    assert sources.changed(files) == ""
    (folder / "text.csv").write_text("1,3\n")
    assert sources.changed(files).startswith(f"{folder / 'text.csv'}, ")
    (folder / "text.csv").unlink()
    assert "vanished" in sources.changed(files)


def test_of_a_large_file_size_time_and_blocks_count(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "WHOLE_BYTES", 1000)
    path = tmp_path / "large"
    path.write_bytes(bytes(100_000))
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    before = sources.hashes([path])
    for change in (b"\1" + bytes(99_999), bytes(99_999) + b"\1", bytes(99_999)):
        path.write_bytes(change)
        os.utime(path, ns=times)
        assert sources.changed(before)
    path.write_bytes(bytes(100_000))
    os.utime(path, ns=times)
    assert sources.changed(before) == ""
    os.utime(path, ns=(times[0], times[1] + 1))
    assert sources.changed(before)


def test_a_digest_is_the_same_in_another_folder_and_of_another_order(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    for name in ("text.csv", "tensor.pt"):
        (other / name).write_bytes((folder / name).read_bytes())
    here, there = (sources.hashes([f / "tensor.pt", f / "text.csv"]) for f in (folder, other))
    assert sources.digest(here) == sources.digest(there) == sources.digest(dict(reversed(list(there.items()))))
    assert sources.digest(here) != sources.digest({**here, str(folder / "text.csv"): "0"})
