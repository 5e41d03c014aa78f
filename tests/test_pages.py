"""The report, a step's page and the index in a browser without a network: legible, reachable by keys, printable."""

import json
from pathlib import Path

import examples
import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from shrinkkit.core import store
from shrinkkit.report import export, index_page

axe = pytest.importorskip("axe_playwright_python.base", reason="needs axe-playwright-python")
pytestmark = pytest.mark.browser

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "5-report.ipynb"
PAGES = ("run/report.html", "run/steps/2-prune.html", "index.html")
OPEN = "document.querySelectorAll('details').forEach(fold => fold.open = true)"
PLACE = """() => {
  const at = document.activeElement;
  const line = getComputedStyle(at).outlineStyle;
  return [at.tagName, at.className, at.id, line !== 'none'];
}"""
CUT = """() => [...document.querySelectorAll('main *')]
  .filter(part => part.getBoundingClientRect().right > 692 && !part.closest('svg'))
  .map(part => part.outerHTML.slice(0, 120))"""
AXE = """async () => {
  const found = await axe.run({exclude: [["figure svg > *"]]}, {resultTypes: ['violations']});
  return found.violations.filter(one => ['serious', 'critical'].includes(one.impact))
    .map(one => `${one.id}: ${one.nodes.slice(0, 3).map(node => node.html.slice(0, 160)).join(' | ')}`);
}"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of runs with its index, a report and a step's page."""
    folder = tmp_path_factory.mktemp("reports")
    run = examples.write_run(folder / "run")
    papermill.execute_notebook(
        NOTEBOOK, folder / "made.ipynb", parameters={"run": str(run)}, kernel_name="python3", progress_bar=False
    )
    export.html(folder / "made.ipynb", run / "report.html", title="run")
    (run / "steps").mkdir()
    error = new_output("error", ename="ValueError", evalue="wrong", traceback=["\x1b[31mValueError\x1b[0m: wrong"])
    stream = new_output("stream", name="stderr", text="\x1b[33mwarning\x1b[0m")
    cells = [new_markdown_cell("# A step\n\n## First\n\n[a link](https://a.example)"), new_code_cell("f(1)  # call")]
    cells += [
        new_markdown_cell("## Second"),
        new_code_cell("1/0", outputs=[stream, error]),
        new_markdown_cell("## Third"),
    ]
    nbformat.write(new_notebook(cells=cells), folder / "step.ipynb")
    export.html(folder / "step.ipynb", run / "steps/2-prune.html", title="2-prune", home="../report.html")
    examples.write_two_machines(folder / "two-machines")
    (folder / "damaged").mkdir()
    (folder / "damaged/study.json").write_text("{")
    index_page.write(folder)
    return folder


@pytest.fixture
def show(opened):
    """Open a page without a network; what it complains of is in its `complaints`."""
    contexts = []

    def opener(path, width=1280, scheme="light"):
        context = opened.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.complaints = []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("requestfailed", lambda request: page.complaints.append(request.url))
        page.goto(path.as_uri())
        return page

    yield opener
    for context in contexts:
        context.close()


def findings(page):
    # Folds are alike, and looking into all of them takes long.
    page.evaluate("document.querySelectorAll('details').forEach((fold, i) => fold.open = i % 4 === 0)")
    page.evaluate(axe.AXE_FILE_PATH.read_text())
    return page.evaluate(AXE)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_sound_without_a_network(place, show, name, width, scheme):
    page = show(place / name, width, scheme)
    page.evaluate(OPEN)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_page_is_accessible(place, show, name, width, scheme):
    assert findings(show(place / name, width, scheme)) == []


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ('<img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">', "image-alt"),
        ('<p style="color: #ccc; background: #fff">pale</p>', "color-contrast"),
        ('<button type="button"></button>', "button-name"),
    ],
)
def test_a_planted_fault_is_found(place, show, tmp_path, fault, rule):
    text = (place / "run/steps/2-prune.html").read_text()
    (tmp_path / "faulty.html").write_text(text.replace("</main>", f"{fault}</main>"))
    assert [one.partition(":")[0] for one in findings(show(tmp_path / "faulty.html"))] == [rule]


def test_a_planted_request_and_a_planted_width_are_found(place, show, tmp_path):
    text = (place / "run/steps/2-prune.html").read_text()
    wide = '<img alt="x" src="https://a.example/x.png"><p style="width: 90rem">wide</p>'
    (tmp_path / "faulty.html").write_text(text.replace("</main>", f"{wide}</main>"))
    page = show(tmp_path / "faulty.html", 390)
    page.wait_for_load_state()
    assert page.complaints != []
    assert page.evaluate("document.documentElement.scrollWidth") > 390


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_printed_whole(place, tmp_path, name):
    export.pdf(place / name, tmp_path / "page.pdf")
    assert 1 <= export.pages(tmp_path / "page.pdf") <= 60


def test_a_report_is_printed_as_a_summary_or_in_full(place, tmp_path):
    export.pdf(place / "run/report.html", tmp_path / "summary.pdf")
    export.pdf(place / "run/report.html", tmp_path / "full.pdf", full=True)
    assert 3 <= export.pages(tmp_path / "summary.pdf") <= 6
    assert export.pages(tmp_path / "full.pdf") > 12


@pytest.mark.parametrize(("fragment", "section", "hint"), [("", False, True), ("#full", True, False)])
def test_the_print_of_a_report_says_what_it_leaves_out(place, show, fragment, section, hint):
    page = show(place / "run/report.html")
    page.goto((place / "run/report.html").as_uri() + fragment)
    page.emulate_media(media="print")
    assert page.get_by_role("heading", name="Changed predictions").is_visible() == section
    assert page.get_by_text("The full report").is_visible() == hint
    assert page.get_by_role("heading", name="Speed-up breakdown").is_visible()
    page.emulate_media(media="screen")
    assert page.get_by_role("heading", name="Changed predictions").is_visible()
    assert not page.get_by_text("The full report").is_visible()


def test_a_copy_button_copies_the_code_and_the_hash(place, show):
    page = show(place / "run/report.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy SHA-256").click()
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied == store.sha256(place / "run/variants/channels-50-static-int8/model.onnx")
    page.get_by_text("Load it").click()
    page.get_by_role("button", name="Copy code").click()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code in (place / "run/variants/channels-50-static-int8/README.md").read_text()


def test_the_links_of_the_summary_lead_to_files_and_sections(place, show):
    page = show(place / "run/report.html")
    for link in page.locator(".sk-download a").all():
        assert (place / "run" / link.get_attribute("href")).is_file()
    page.evaluate(OPEN)
    sections = [link.get_attribute("href") for link in page.locator(".sk-warnings a").all()]
    assert sections
    assert all(page.locator(section).count() == 1 for section in sections)


@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_off_at_the_width_of_paper(place, show, name):
    # A4 less its margins, in CSS pixels.
    page = show(place / name, 688)
    page.emulate_media(media="print")
    page.evaluate(OPEN)
    assert page.evaluate(CUT) == []


def test_a_picture_is_shown_once(place, show):
    page = show(place / "run/report.html")
    assert page.locator("figure svg").count() == 8
    assert page.locator("figure .sk-scroll img").count() == 0


def tabbed(page, times):
    stops = []
    for _ in range(times):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(PLACE))
    return stops


def test_tab_reaches_all_that_can_be_used_and_shows_where_it_is(place, show):
    stops = tabbed(show(place / "run/report.html"), 60)
    assert stops[0][1] == "sk-skip"
    assert {"A", "SUMMARY", "DIV"} <= {tag for tag, *_ in stops}
    assert any(name == "sk-scroll" for _, name, *_ in stops)
    assert all(visible for tag, *_, visible in stops if tag != "BODY")


def test_the_skip_link_leads_to_the_content(place, show):
    page = show(place / "run/report.html")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#main"


def test_a_fold_opens_by_keyboard(place, show):
    page = show(place / "run/report.html")
    page.locator("details.sk-fold summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details.sk-fold").first.evaluate("fold => fold.open")


def names(page):
    return page.locator("#runs tbody tr:not([hidden]) th").all_inner_texts()


def test_the_index_sorts_by_every_column_by_mouse_and_keyboard(place, show):
    page = show(place / "index.html")
    page.get_by_role("button", name="run", exact=True).click()
    assert names(page) == ["damaged", "run", "two-machines"]
    page.keyboard.press("Enter")
    assert names(page) == ["two-machines", "run", "damaged"]
    assert page.locator("#runs th[aria-sort]").all_inner_texts() == ["run"]
    assert page.locator("#runs th[aria-sort]").get_attribute("aria-sort") == "descending"
    assert page.locator("#runs thead th button").count() == page.locator("#runs thead th").count() == 10
    page.get_by_role("button", name="speed-up").click()
    # What is not known stands last either way.
    assert names(page)[-1] == "damaged"
    page.keyboard.press("Space")
    assert names(page)[-1] == "damaged"


def test_the_index_is_filtered_by_text_and_status(place, show):
    page = show(place / "index.html")
    assert len(names(page)) == 3
    page.get_by_label("Find").fill("TWO-mach")
    assert names(page) == ["two-machines"]
    assert page.locator("#count").inner_text() == "1 of 3 runs shown"
    page.get_by_label("Find").fill("")
    page.get_by_label("Status").select_option("unreadable")
    assert names(page) == ["damaged"]


def test_the_index_is_complete_without_scripts(place, opened):
    context = opened.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((place / "index.html").as_uri())
    rows = page.locator("#runs tbody tr").count()
    asked = page.locator("#filter").is_visible()
    context.close()
    assert (rows, asked) == (3, False)


def test_the_summary_has_no_dead_button_without_scripts(place, opened):
    context = opened.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((place / "run/report.html").as_uri())
    shown = [page.locator(".sk-figures").is_visible(), page.get_by_role("button", name="Copy SHA-256").count()]
    context.close()
    assert shown == [True, 0]


def test_a_link_of_the_index_leads_to_the_report(place, show):
    page = show(place / "index.html")
    page.get_by_role("link", name="run", exact=True).click()
    assert page.url == (place / "run/report.html").as_uri()
    assert json.loads(page.evaluate("JSON.stringify(document.title)")) == "run"
