"""What works for which kind of model, on which runtime: docs/coverage.md says so, and it is true.

`SHRINKKIT_WRITE_DOCS=1 pytest tests/test_coverage.py` writes the page anew, which takes ten minutes. The suite makes
the cells of `CHECKED` again and compares them with the page.
"""

import os
import re
from functools import cache
from pathlib import Path

import kinds
import processors
import pytest
import torch

from shrinkkit.core import machines
from shrinkkit.core.target import Target
from shrinkkit.errors import ShrinkkitError
from shrinkkit.runtimes import files
from shrinkkit.runtimes.base import BuildRequest
from shrinkkit.transforms import prune

PAGE = Path(__file__).parent.parent / "docs" / "coverage.md"
RECIPES = ("unchanged", "channels-50", "dynamic-int8", "static-int8", "bfloat16")
RUNTIMES = ("torch", "inductor", "onnxruntime", "openvino")
CHECKED = [(kind, recipe) for kind in kinds.KINDS for recipe in ("channels-50", "dynamic-int8", "static-int8")]
WORKS = "works"
INTRO = """# What works for which kind of model

Each cell is the outcome of making the model file for that runtime, loading it back, and comparing its outputs with
those of the model in memory; in 8 or 16 bits also of finding layers that really run so. Where it does not work, the
number leads to what shrinkkit says. Weights set to zero make the same files as the unchanged model, and float16 behaves
as bfloat16 does. Made on an {processor}.

`SHRINKKIT_WRITE_DOCS=1 pytest tests/test_coverage.py` writes this page; the test suite checks the cells of channels-50,
dynamic-int8 and static-int8 on torch, onnxruntime and openvino against it.
"""


@cache
def model(kind, recipe):
    """Return the pruned or unchanged model of a kind with its example, or why it cannot be pruned."""
    made, example = kinds.make(kind)
    try:
        if recipe == "channels-50":
            made = prune.channels(made, example, ratio=0.5, round_to=4)
    except ShrinkkitError as error:
        return said(error), example
    return made, example


def said(error):
    """Return the first sentence of an error, without what another machine or version would say otherwise."""
    text = re.split(r"(?<=[.:;]) (?!OpenVINO |ONNX )(?=[A-Z`'])|\. |: cut|; (?=`)", str(error).splitlines()[0])[0]
    return re.sub(r"0x[0-9a-f]+", "...", text).rstrip(".:; ")


def outcomes(kind, recipe, runtimes, folder):
    """Return the outcome for each runtime; the variant is exported once for all of them, as in a run."""
    made, example = model(kind, recipe)
    if isinstance(made, str):
        return dict.fromkeys(runtimes, made)
    method = recipe if recipe in ("dynamic-int8", "static-int8", "bfloat16") else ""
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    request = BuildRequest(folder, scratch, made, example, method, (), [example])
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {runtime: outcome(request, runtime) for runtime in runtimes}
    finally:
        torch.set_num_threads(before)


def outcome(request, runtime):
    try:
        file = files.build(runtime, request)
    except ShrinkkitError as error:
        return said(error)
    ran = {p.runs_as for p in file.layers.values()}
    assert not request.precision or ran & {"int8", request.precision}, (
        "a file in fewer bits must name a layer that runs so"
    )
    return WORKS


def pages(cells):
    """Return the page for the outcome of each (kind, recipe, runtime)."""
    reasons = list(dict.fromkeys(text for text in cells.values() if text != WORKS))
    numbers = {text: f"[{i}](#{i})" for i, text in enumerate(reasons, start=1)} | {WORKS: WORKS}
    lines = [INTRO.format(processor=machines.hardware(Target("cpu", "torch")))]
    for recipe in RECIPES:
        lines += [f"## {recipe}\n", f"| model | {' | '.join(RUNTIMES)} |", "|---|" + "---|" * len(RUNTIMES)]
        for kind in kinds.KINDS:
            lines.append(f"| {kind} | {' | '.join(numbers[cells[kind, recipe, r]] for r in RUNTIMES)} |")
        lines.append("")
    lines += ["## Why not\n"] + [f'<a id="{i}"></a>{i}. {text}.\n' for i, text in enumerate(reasons, start=1)]
    return "\n".join(lines).rstrip() + "\n"


def read(page):
    """Return the outcome of each (kind, recipe, runtime) that the page tells."""
    reasons = dict(re.findall(r'<a id="(\d+)"></a>\d+\. (.*)\.$', page, re.MULTILINE))
    cells, recipe = {}, ""
    for line in page.splitlines():
        if line.startswith("## "):
            recipe = line.removeprefix("## ")
        elif line.startswith("| ") and recipe in RECIPES and not line.startswith("| model"):
            kind, *found = (cell.strip() for cell in line.strip("|").split("|"))
            for runtime, cell in zip(RUNTIMES, found, strict=True):
                number = re.match(r"\[(\d+)\]", cell)
                cells[kind, recipe, runtime] = reasons[number[1]] if number else cell
    return cells


@pytest.mark.skipif("SHRINKKIT_WRITE_DOCS" not in os.environ, reason="the page is written anew only when asked for")
def test_the_page_is_written_anew(tmp_path):
    cells = {}
    for i, (kind, recipe) in enumerate((k, c) for k in kinds.KINDS for c in RECIPES):
        for runtime, text in outcomes(kind, recipe, RUNTIMES, tmp_path / str(i)).items():
            cells[kind, recipe, runtime] = text
            print(kind, recipe, runtime, text[:100], flush=True)
    PAGE.write_text(pages(cells), encoding="utf-8")


def test_the_page_has_every_cell_and_reads_back_as_it_was_written():
    cells = read(PAGE.read_text(encoding="utf-8"))
    assert set(cells) == {(k, c, r) for k in kinds.KINDS for c in RECIPES for r in RUNTIMES}
    assert sum(text == WORKS for text in cells.values()) > len(cells) / 2
    assert read(pages(cells)) == cells


@pytest.mark.parametrize(("kind", "recipe"), CHECKED)
def test_what_the_page_says_is_true(kind, recipe, tmp_path):
    told = read(PAGE.read_text(encoding="utf-8"))
    for runtime, text in outcomes(kind, recipe, ("torch", "onnxruntime", "openvino"), tmp_path).items():
        if (recipe, runtime) == ("dynamic-int8", "openvino") and not processors.has_vnni("openvino"):
            assert text != WORKS
        else:
            assert text == told[kind, recipe, runtime], runtime
