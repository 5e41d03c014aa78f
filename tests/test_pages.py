"""The report, a step's page and the index in a browser without a network: legible, reachable by keys, printable."""

import csv
import io
import json
from pathlib import Path

import examples
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from shrinkkit.core import store
from shrinkkit.display import tables
from shrinkkit.pipeline import steps
from shrinkkit.report import export, index_page
from shrinkkit.results import results
from shrinkkit.results.verdict import decide

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
def place(tmp_path_factory, warm_address):
    """A folder of runs with its index, a report and a step's page."""
    folder = tmp_path_factory.mktemp("reports")
    run = examples.write_run(folder / "run")
    steps.execute_notebook({"notebook": NOTEBOOK, "parameters": {"run": str(run)}, "warm": warm_address}, folder)
    export.html(folder / steps.NOTEBOOK, run / "report.html", title="run")
    (run / "steps").mkdir(exist_ok=True)
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
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_page_is_accessible_and_sound_without_a_network(place, show, name, width, scheme):
    page = show(place / name, width, scheme)
    assert findings(page) == []
    page.evaluate(OPEN)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.complaints == []


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


@pytest.mark.parametrize("name", PAGES[1:])
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
    page.locator("#runs").get_by_role("button", name="run", exact=True).click()
    assert names(page) == ["damaged", "run", "two-machines"]
    page.keyboard.press("Enter")
    assert names(page) == ["two-machines", "run", "damaged"]
    assert page.locator("#runs th[aria-sort]").all_inner_texts() == ["run"]
    assert page.locator("#runs th[aria-sort]").get_attribute("aria-sort") == "descending"
    assert page.locator("#runs thead th button").count() == page.locator("#runs thead th").count() == 11
    page.locator("#runs").get_by_role("button", name="speed-up").click()
    # What is not known stands last either way.
    assert names(page)[-1] == "damaged"
    page.keyboard.press("Space")
    assert names(page)[-1] == "damaged"


def test_the_index_is_filtered_by_text_and_status(place, show):
    page = show(place / "index.html")
    assert len(names(page)) == 3
    page.get_by_label("Find").fill("TWO-mach")
    assert names(page) == ["two-machines"]
    assert page.locator("#runs output").inner_text() == "1 of 3 rows"
    page.get_by_label("Find").fill("")
    page.get_by_role("group", name="Status").get_by_role("button", name="unreadable").click()
    assert names(page) == ["damaged"]


def test_the_index_is_complete_without_scripts(place, opened):
    context = opened.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((place / "index.html").as_uri())
    rows = page.locator("#runs tbody tr").count()
    asked = page.locator("form").count()
    context.close()
    assert (rows, asked) == (3, 0)


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


def report(show, place, **options):
    return show(place / "run/report.html", **options)


def saved(page, button):
    with page.expect_download() as download:
        button.click()
    return download.value.suggested_filename, Path(download.value.path()).read_text("utf-8-sig")


def test_numbers_with_units_sort_as_numbers_and_empty_cells_come_last(place, show):
    table = report(show, place).locator(".sk-filtered table")
    table.get_by_role("button", name="file size").click()
    sizes = table.locator("tbody tr td:nth-child(5)").all_inner_texts()
    assert [size.split("\n")[0].split(" compressed")[0] for size in sizes][:3] == ["34.9 kB", "36.0 kB", "81.5 kB"]
    assert sizes[-1].partition(":")[0] in ("", "failed", "unsupported")
    table.get_by_role("button", name="file size").press("Enter")
    assert "1.12 MB" in table.locator("tbody tr td:nth-child(5)").first.inner_text()
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"


def test_the_results_are_filtered_by_text_and_target(place, show):
    page = report(show, place)
    group = page.locator(".sk-filtered")
    group.get_by_label("Find").fill("channels-50")
    assert group.locator("output").inner_text() == "4 of 20 rows"
    group.get_by_role("group", name="Target").get_by_role("button", name="cpu/torch").click()
    names = group.locator("tbody tr:visible th").all_inner_texts()
    assert [name.split()[-1] for name in names] == ["channels-50", "channels-50-static-int8"]


def test_warnings_lead_to_the_rows_that_they_name(place, show, tmp_path):
    warning = "Left out: channels-50-static-int8 on cpu/torch, channels-50 on cpu/onnxruntime."
    text = (place / "run/report.html").read_text()
    planted = text.replace("</main>", f'<div class="sk-warnings"><p>{warning}</p></div></main>', 1)
    (tmp_path / "warned.html").write_text(planted)
    page = show(tmp_path / "warned.html")
    links = page.locator(".sk-warnings p", has_text="Left out").locator("a")
    assert links.all_inner_texts() == ["channels-50-static-int8 on cpu/torch", "channels-50 on cpu/onnxruntime"]
    row = page.locator(f"[id={links.last.get_attribute('href')[1:]}]")
    assert "channels-50\tcpu/onnxruntime" in row.inner_text().replace("\n", "")


def test_columns_of_the_results_are_chosen(place, show):
    page = report(show, place)
    group = page.locator(".sk-filtered")
    assert group.locator("thead th:visible").count() == 12
    group.get_by_text("Columns").click()
    group.get_by_label("parameters").uncheck()
    assert group.locator("thead th:visible").filter(has_text="parameters").count() == 0
    assert group.locator("thead th:visible").count() == 11
    # A row that ends with a reason is as wide as the others.
    assert group.locator("td.sk-wide").first.get_attribute("colspan") == "9"


def test_a_row_unfolds_by_keyboard_and_follows_sorting_and_filtering(place, show):
    page = report(show, place)
    table = page.locator(".sk-filtered table")
    row = table.get_by_role("button", name="float16", exact=True)
    row.press("Enter")
    assert row.get_attribute("aria-expanded") == "true"
    more = table.locator(".sk-more:visible")
    assert "2 layers" in more.inner_text() or "in float16" in more.inner_text()
    table.get_by_role("button", name="file size").click()
    assert more.evaluate("row => row.previousElementSibling.cells[0].textContent") == "float16"
    page.locator(".sk-filtered").get_by_label("Find").fill("weights-80")
    assert more.count() == 0


def test_a_table_is_saved_as_it_is_seen(place, show):
    page = report(show, place)
    group = page.locator(".sk-filtered")
    group.get_by_label("Find").fill("channels-50")
    group.get_by_text("Columns").click()
    for name in ("parameters", "MACs", "sparsity", "latency / batch"):
        group.get_by_label(name).uncheck()
    name, text = saved(page, group.locator(".sk-tools").get_by_text("CSV"))
    lines = list(csv.DictReader(io.StringIO(text)))
    assert name == "run-Variants-and-targets.csv"
    assert [(line["variant"], line["target"]) for line in lines][::2] == [
        ("channels-50", "cpu/torch"),
        ("channels-50", "cpu/onnxruntime"),
    ]
    assert (lines[1]["vs PyTorch"], lines[1]["vs PyTorch (detail)"]) == ("4.97\u00d7", "4.96\u20134.98; faster")
    assert float(lines[1]["file size (value)"]) == 84000
    assert "MACs" not in lines[0]
    name, text = saved(page, group.locator(".sk-tools").get_by_text("JSON"))
    assert len(json.loads(text)) == 4


def test_every_table_can_be_saved(place, show):
    page = report(show, place)
    assert page.locator("table.sk-table").count() == page.locator(".sk-tools").count() > 12


def test_a_text_that_a_spreadsheet_would_run_is_saved_as_text(show, tmp_path):
    rows = [{"name": "=1+1", "x": '<img src=x onerror=alert(1)>"'}, {"name": "@a", "x": "+0.5"}]
    html = tables.table("made", rows).html()
    cell = new_code_cell("x", outputs=[new_output("display_data", data={"text/html": html})])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "made.ipynb")
    export.html(tmp_path / "made.ipynb", tmp_path / "made.html", title="made")
    page = show(tmp_path / "made.html")
    _, text = saved(page, page.get_by_text("CSV"))
    assert list(csv.reader(io.StringIO(text)))[1:] == [["'=1+1", rows[0]["x"]], ["'@a", "+0.5"]]
    assert page.locator("img").count() == 0


def test_the_chart_recommends_what_the_verdict_does_and_follows_the_budget(place, show):
    page = report(show, place)
    chart, best = page.locator(".sk-chart"), decide(results.load(place / "run")).row
    assert chart.locator("strong").first.inner_text() == f"{best.variant} on {best.target}"
    assert chart.locator("svg .sk-name").text_content() == best.variant
    chart.get_by_role("slider").focus()
    page.keyboard.press("End")
    assert chart.locator("strong").first.inner_text() == "narrow-int8 on cpu/onnxruntime"
    assert "0 over budget" in chart.locator(".sk-answer").inner_text()
    page.keyboard.press("Home")
    assert chart.locator("strong").first.inner_text() == "No variant"
    assert chart.locator(".sk-w").count() == 0


def test_the_budget_recolours_the_table_and_marks_the_best(place, show):
    page = report(show, place)
    table, slider = page.locator(".sk-filtered table"), page.get_by_role("slider")

    def cells(name):
        row = table.locator("tr:has(> th)").filter(has=page.get_by_role("button", name=name, exact=True)).last
        return row.locator("th small").all_inner_texts(), row.locator("td:nth-child(4)").get_attribute("class")

    assert cells("channels-50-static-int8") == (["best"], "sk-good")
    assert cells("narrow-int8") == ([], "sk-bad")
    slider.press("End")
    assert cells("channels-50-static-int8") == ([], "sk-good")
    assert cells("narrow-int8") == (["best"], "sk-good")
    slider.press("Home")
    assert cells("narrow-int8") == ([], "sk-bad")


def test_the_points_of_the_chart_are_reached_by_keyboard_and_described(place, show):
    page = report(show, place)
    chart, tip = page.locator(".sk-chart"), page.locator(".sk-plot .sk-tip")
    assert not tip.is_visible()
    chart.locator(".sk-point[tabindex='0']").focus()
    assert "channels-50-static-int8 on cpu/onnxruntime" in tip.inner_text()
    assert "file size 81.5 kB" in tip.inner_text()
    page.keyboard.press("End")
    assert "narrow-int8 on cpu/onnxruntime" in tip.inner_text()
    assert "over budget" in page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    chart.locator(".sk-point path").last.hover()
    assert tip.is_visible()


def test_the_chart_changes_its_axis_and_target(place, show):
    chart = report(show, place).locator(".sk-chart")
    assert chart.get_by_label("Horizontal axis").locator("option").count() == 5
    chart.get_by_label("Horizontal axis").select_option("throughput, examples / s \u2192")
    assert "1,000" in chart.locator("svg text").all_text_contents()
    chart.get_by_label("Horizontal axis").select_option("\u2190 file size")
    assert "1 MB" in chart.locator("svg text").all_text_contents()
    chart.get_by_label("Target").select_option("cpu/torch")
    labels = chart.locator(".sk-point").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert len(labels) == 7
    assert all(" on cpu/torch, " in label for label in labels)
    chart.get_by_role("button", name="weights-80").click()
    assert chart.locator(".sk-point[opacity='1']").count() == 1


def test_terms_are_defined_on_hover_and_by_keyboard(place, show):
    page = report(show, place)
    tip = page.locator(".sk-definition")
    assert not tip.is_visible()
    for name in ("vs FP32, same runtime", "sparsity", "MACs"):
        column = page.locator(".sk-filtered").get_by_role("button", name=name)
        column.focus()
        definition = page.locator(f"#{column.get_attribute('aria-describedby')}").text_content()
        assert tip.inner_text() == definition != ""
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    term = page.locator("a.sk-term", has_text="within budget").first
    term.hover()
    assert "Holm" in tip.inner_text()
    assert page.locator(term.get_attribute("href")).inner_text() == "within budget"


def test_the_contents_stay_in_sight_on_a_wide_screen(place, show):
    page = report(show, place)
    page.locator("#timing-samples").scroll_into_view_if_needed()
    assert page.evaluate("scrollY") > 2000
    box = page.locator(".sk-nav").bounding_box()
    assert 0 <= box["y"] < 900 - box["height"]


def test_the_file_to_ship_is_seen_without_scrolling(place, show):
    page = report(show, place)
    best = decide(results.load(place / "run")).row
    link = page.get_by_role("link", name=f"variants/{best.variant}/model.onnx")
    box = link.bounding_box()
    assert box["y"] + box["height"] < 900
    assert "within budget" in page.locator(".sk-figures").inner_text()


def test_why_a_variant_is_slower_is_two_clicks_away(place, show):
    page = report(show, place)
    page.locator(".sk-nav").get_by_role("link", name="Results").click()
    page.locator(".sk-filtered").get_by_role("button", name="float16", exact=True).first.click()
    assert page.get_by_text("run in float16").first.is_visible()


def test_what_changed_in_accuracy_is_two_clicks_away(place, show):
    page = report(show, place)
    page.locator(".sk-nav").get_by_role("link", name="Results").click()
    page.locator(".sk-filtered").get_by_role("button", name="narrow-int8", exact=True).first.click()
    assert page.get_by_text("78 worse, 0 better, of 2,000 examples").first.is_visible()
    page.locator(".sk-nav").get_by_role("link", name="Changed predictions").click()
    assert page.locator(".sk-strip").first.is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_can_be_switched_and_is_remembered(place, show, scheme):
    page = report(show, place, scheme=scheme)
    other = {"light": "dark", "dark": "light"}[scheme]
    paper = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(paper)
    page.get_by_label("Theme").select_option(other)
    after = page.evaluate(paper)
    page.reload()
    assert before != after == page.evaluate(paper)


def test_a_heading_links_to_itself(place, show):
    page = report(show, place)
    page.get_by_label("Link to Results").click()
    assert page.url.endswith("#results")
    assert page.locator(".sk-nav a[aria-current]").inner_text() == "Results"


def test_a_report_is_complete_without_scripts_and_in_print(place, opened, show):
    context = opened.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto((place / "run/report.html").as_uri())
    shown = page.locator("figure").first.is_visible(), page.locator(".sk-filtered tbody tr:has(> th)").count()
    buttons = page.locator("button:visible").count()
    context.close()
    assert (*shown, buttons) == (True, 20, 0)
    page = report(show, place)
    figure, chart = page.locator("figure").first, page.locator(".sk-chart")
    assert (figure.is_visible(), chart.is_visible()) == (False, True)
    page.emulate_media(media="print")
    assert (figure.is_visible(), chart.is_visible()) == (True, False)
    assert page.locator("form:visible, .sk-tools:visible").count() == 0
