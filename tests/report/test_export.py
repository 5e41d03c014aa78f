"""The report: one page that stands alone, in a browser without a network as in a text editor."""

import json
import re
from itertools import pairwise
from pathlib import Path

import examples
import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from shrinkkit.pipeline import steps
from shrinkkit.report import export

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "5-report.ipynb"
LIMIT = 1_000_000


@pytest.fixture(scope="module")
def exported(tmp_path_factory, warm_address):
    """Execute the report of a synthetic run and return the folder with report.html and report.md."""
    folder = tmp_path_factory.mktemp("report")
    run = examples.write_run(folder / "run")
    executed = execute(run, warm_address)
    export.html(executed, folder / "report.html", title="synthetic")
    export.markdown(executed, folder / "report.md")
    return folder


def execute(run, warm_address):
    """Execute the report of a run next to it and return the path."""
    request = {"notebook": NOTEBOOK, "parameters": {"run": str(run)}, "warm": warm_address}
    assert steps.execute_notebook(request, run.parent) == ""
    return run.parent / steps.NOTEBOOK


def page_of(tmp_path, *cells, **options):
    path = tmp_path / "made.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    export.html(path, tmp_path / "made.html", title="A title", **options)
    return (tmp_path / "made.html").read_text()


def test_the_report_stands_alone_and_is_light(exported):
    text = (exported / "report.html").read_text()
    assert pages.outside_addresses(text) == []
    assert len(text.encode()) < LIMIT


def test_the_report_answers_first_and_keeps_its_order(exported):
    text = (exported / "report.html").read_text()
    marks = [
        "<h1", "Summary: within budget", "Get the model:", ">Accuracy vs. speed<a",
        ">Failures and unsupported combinations<a", ">Results<a", ">Speed-up breakdown<a",
        ">Changed predictions<a", ">Per-layer latency<a", ">Tail latency, memory and throughput<a",
        ">Layer report<a", ">Timing samples<a", ">Environment<a", ">Glossary<a", ">Artifacts and reproduction<a",
        "shrinkkit run digits-cnn", ">How this was made</summary>",
    ]  # fmt: skip
    main = text[text.index("<main") :]
    assert [main.index(mark) for mark in marks] == sorted(main.index(mark) for mark in marks)


def test_headings_go_down_one_level_at_a_time(exported):
    levels = [int(level) for level in re.findall(r"<h([1-6])", (exported / "report.html").read_text())]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_picture_has_a_text_that_stands_in_for_it(exported):
    text = (exported / "report.html").read_text()
    pictures = re.findall(r"<svg[^>]*>", text)
    assert len(pictures) == 8
    assert all(re.search(r'aria-label="[^"]{40}', opening) and 'role="img"' in opening for opening in pictures)


def test_the_report_of_forty_variants_is_light_too(tmp_path, warm_address, monkeypatch):
    base, made = examples.MADE_UP["baseline"], {}
    for i in range(1, 41):
        _, size, parameters, macs, zeroed, *_ = base
        name = f"channels-{i}-static-int8" if i % 2 else f"channels-{i}-with-a-longer-name"
        made[name] = ("baseline", size - 20_000 * i, parameters, macs, zeroed, i // 3, 1 + i / 8, 1 + i / 6)
    recipes = tuple(
        {
            "name": name,
            "stages": ({"prune-channels": {"ratio": 0.5}},),
            "precision": "static-int8" if "int8" in name else "float32",
        }
        for name in made
    )
    narrow = {
        "narrow-int8": examples.MADE_UP["narrow-int8"],
        "narrow-int8.stage-1": examples.MADE_UP["narrow-int8.stage-1"],
    }
    monkeypatch.setattr(examples, "MADE_UP", {"baseline": base, **made, **narrow})
    monkeypatch.setattr(examples, "RECIPES", (*recipes, examples.NARROW))
    run = examples.write_run(tmp_path / "run")
    export.html(execute(run, warm_address), tmp_path / "report.html", title="forty")
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < LIMIT
    assert all(f'id="layers-of-{name}"' in text and f">{name}<" in text for name in made)


def test_the_scripts_of_a_report_are_light(exported):
    scripts = re.findall(r"<script>(.*?)</script>", (exported / "report.html").read_text(), flags=re.DOTALL)
    assert 10_000 < sum(len(script.encode()) for script in scripts) < 150_000


def test_no_table_is_empty(exported):
    bodies = re.findall(r"<tbody>(.*?)</tbody>", (exported / "report.html").read_text(), flags=re.DOTALL)
    assert bodies
    assert all("<tr" in body for body in bodies)


def test_parts_of_sections_have_links_too(exported):
    text = (exported / "report.html").read_text()
    for address in set(re.findall(r'<dd><a href="#([^"]+)"', text)):
        assert f'id="{address}"' in text
    assert 'href="#per-layer-latency-cpu-torch"' in text


def test_no_id_is_given_twice(exported):
    ids = re.findall(r'\sid="([^"]+)"', (exported / "report.html").read_text())
    assert len(ids) == len(set(ids))


def test_sections_are_linked_from_the_top(exported):
    text = (exported / "report.html").read_text()
    for anchor in re.findall(r'<li><a href="#([^"]+)"', text):
        assert f'id="{anchor}"' in text


def test_the_markdown_reads_without_its_pictures(exported):
    text = (exported / "report.md").read_text()
    assert text.startswith("# synthetic")
    assert "| channels-50-static-int8 (best) | cpu/onnxruntime | " in text
    assert "*Chart, in words:*" in text
    assert "data:" not in text
    assert "<svg" not in text


def test_the_report_also_leaves_its_results_for_machines(exported):
    assert (exported / "run" / "results.json").is_file()


def test_the_report_leaves_cards_that_say_what_was_measured(exported):
    card = json.loads((exported / "run/variants/channels-50/model-card.json").read_text())
    assert {one["target"] for one in card["figures"] if one["speedup"]} == {"cpu/torch", "cpu/onnxruntime"}


def test_an_error_is_legible_and_no_terminal_code_is_left(tmp_path):
    trace = ["\x1b[31mValueError\x1b[0m: <wrong>"]
    failed = new_code_cell("1/0", outputs=[new_output("error", ename="ValueError", evalue="<wrong>", traceback=trace)])
    text = page_of(tmp_path, failed)
    assert "<strong>ValueError</strong>: &lt;wrong&gt;" in text
    assert "\x1b" not in text


def test_a_static_state_is_preferred_to_a_widget(tmp_path):
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "x"}, "text/plain": "HBox()"}
    lone, kept = (new_output("display_data", data=data) for data in (view, {**view, "text/html": "<b>3 of 3</b>"}))
    text = page_of(tmp_path, new_code_cell("bar", outputs=[lone, kept]))
    assert "<b>3 of 3</b>" in text
    assert "HBox" not in text


def test_parameters_of_the_run_are_labelled_and_folded(tmp_path):
    given = new_code_cell("ratio = 0.5", metadata={"tags": ["injected-parameters"]})
    cells = [new_code_cell("ratio: float = 0.1  # share", metadata={"tags": ["parameters"]}), given]
    text = page_of(tmp_path, *cells, home="../report.html")
    assert "Parameters of this run:" in text
    assert text.index("<summary>Parameters and code") < text.index('class="sk-injected"')


def test_the_code_of_a_report_is_one_fold_at_its_end_and_that_of_a_step_is_below_each_output(tmp_path):
    cells = [new_code_cell(f"f({i})", outputs=[new_output("stream", text=f"out {i}")]) for i in range(2)]
    report = page_of(tmp_path, *cells)
    assert report.count("<details") == 1
    assert report.index("out 1") < report.index("How this was made")
    assert page_of(tmp_path, *cells, home="../report.html").count("<details") == 2


def test_a_step_can_link_to_its_report(tmp_path):
    assert '<a href="../report.html">' in page_of(tmp_path, new_markdown_cell("# Step"), home="../report.html")


def test_what_outputs_bring_along_for_lesser_viewers_is_left_out(tmp_path):
    figure = '<style class="sk-style">p {}</style><svg role="img"></svg><img hidden alt="half" src="data:image/png;,">'
    text = page_of(tmp_path, new_code_cell("x", outputs=[new_output("display_data", data={"text/html": figure})]))
    assert "<svg" in text
    assert "<img" not in text
    assert "sk-style" not in text


@pytest.mark.parametrize(
    ("markup", "address"),
    [
        ('<script src="https://a.example/x.js"></script>', "https://a.example/x.js"),
        ('<link href="style.css" rel="stylesheet">', "style.css"),
        ('<img srcset="a.png 1x, b.png 2x">', "a.png"),
        ("<style>@import 'a.css';</style>", "a.css"),
        ('<p style="background: url(//a.example/p.png)">', "//a.example/p.png"),
        ("<script>import('https://a.example/m.js')</script>", "https://a.example/m.js"),
        ('<svg><image href="p.png"/></svg>', "p.png"),
    ],
)
def test_an_address_that_a_browser_would_load_is_found(markup, address):
    assert address in pages.outside_addresses(markup)


def test_links_and_data_are_no_outside_addresses():
    inside = '<a href="https://a.example/">x</a><img src="data:image/png;base64,AA"><svg><use href="#a"/></svg>'
    assert pages.outside_addresses(inside) == []
