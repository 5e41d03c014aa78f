import logging
import subprocess
import sys
import warnings

import pytest
import torch

from shrinkkit import quiet


def test_libraries_are_silent_inside_and_heard_after(caplog):
    with quiet.libraries():
        warnings.warn("inside", UserWarning, stacklevel=1)
        logging.getLogger("library").warning("inside")
    logging.getLogger("library").warning("after")
    assert [record.message for record in caplog.records] == ["after"]
    with pytest.warns(UserWarning, match=r"after"):
        warnings.warn("after", UserWarning, stacklevel=1)


def test_exceptions_pass_and_the_silence_ends():
    before = logging.root.manager.disable
    with pytest.raises(ValueError, match=r"through"), quiet.libraries():
        raise ValueError("through")
    assert logging.root.manager.disable == before


def test_the_profiler_of_torch_writes_nothing(capfd):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.ones(3).add(1)
    assert seen.events()
    assert capfd.readouterr().err == ""


def test_what_is_printed_inside_is_hidden_and_what_comes_after_is_not(capsys):
    with quiet.libraries():
        print("inside")
        print("inside", file=sys.stderr)
    print("after")
    assert capsys.readouterr() == ("after\n", "")


def test_libraries_that_a_task_imports_report_nothing_about_gpus(tmp_path):
    code = "import shrinkkit.quiet, torchao.quantization.pt2e"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (ended.stdout, ended.stderr) == ("", "")
