"""Tables and statements: the same content as HTML, Markdown and text."""

from html.parser import HTMLParser

from shrinkkit.display import tables
from shrinkkit.display.tables import Cell, Column, Command, Heading, Several, Statement, Table, facts

COLUMNS = (Column("variant"), Column("latency", number=True))


def table(rows=1, **options):
    made = tuple((Cell(f"v{i}"), Cell("4.56 ms", "[4.5, 4.6]", "good")) for i in range(rows))
    return Table("Latencies", COLUMNS, made, **options)


def test_a_table_has_a_caption_and_scopes():
    text = table().html()
    assert "<caption><span>Latencies</span></caption>" in text
    assert '<th scope="col">variant</th>' in text
    assert '<th scope="row">v0</th>' in text


def test_a_long_table_is_folded_under_its_caption():
    assert table(13).html().startswith('<details class="sk-fold"><summary>Latencies</summary>')
    assert "<details" not in table(12).html()


def test_what_a_record_says_cannot_become_markup():
    shown = Several(
        (Table("<b>", COLUMNS, ((Cell("<script>"), Cell("a|b")),), "<i>"), Statement("<img>"), Heading("<u>", "<s>"))
    )
    assert not {"b", "script", "i", "img", "u"} & set(tags(shown.html()))
    assert "a\\|b" in shown.markdown()
    assert "<script>" not in shown.parts[0].markdown()


def tags(html):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(html)
    return found


def test_a_cell_can_take_the_rest_of_its_row():
    shown = Table("t", COLUMNS, ((Cell("v"), Cell("failed: why", wide=True)),))
    assert 'colspan="1"' in shown.html()
    assert "failed: why" in repr(shown)


def test_markdown_rows_have_as_many_cells_as_columns():
    shown = Table("t", (*COLUMNS, Column("x")), ((Cell("v"), Cell("wide", wide=True)),))
    assert {line.count("|") for line in shown.markdown().splitlines() if line.startswith("|")} == {4}


def test_text_columns_are_aligned():
    lines = repr(table(2)).splitlines()
    assert len({len(line) for line in lines[2:]}) == 1


def test_empty_facts_are_left_out():
    assert "gpu" not in repr(facts("Machine", [("cpu", "x"), ("gpu", "")]))


def test_a_command_stands_alone_in_markdown():
    assert "\n    shrinkkit run digits-cnn\n" in Command("shrinkkit run digits-cnn", "Again:").markdown()


def test_numbers_in_a_statement_keep_their_units():
    assert "1.09&nbsp;MB" in Statement("1.09 MB of files").html()


def test_a_heading_stands_above_a_part():
    assert Heading("cpu/torch & more").html() == "<h3>cpu/torch &amp; more</h3>"
    assert Heading("cpu/torch").markdown() == "### cpu/torch\n"
    assert repr(Heading("cpu/torch")) == "cpu/torch"


def test_columns_without_content_are_left_out_and_lacking_cells_are_empty():
    rows = [{"variant": "a", "size": "1 kB", "error": ""}, {"variant": "b", "error": ""}]
    made = tables.table("Files", rows)
    assert [column.title for column in made.columns] == ["variant", "size"]
    assert [[cell.text for cell in row] for row in made.rows] == [["a", "1 kB"], ["b", ""]]


def test_columns_hold_numbers_unless_they_are_named():
    made = tables.table("Files", [{"variant": "a", "file": "model.onnx", "size": "1 kB"}], text=("file",))
    assert [column.number for column in made.columns] == [False, False, True]


def test_a_wide_cell_ends_its_row_under_whatever_title():
    rows = [
        {"variant": "a", "size": "1 kB", "speed-up": "2.0"},
        {"variant": "b", "reason": Cell("it failed", wide=True)},
    ]
    made = tables.table("Files", rows)
    assert [column.title for column in made.columns] == ["variant", "size", "speed-up"]
    assert [cell.text for cell in made.rows[1]] == ["b", "it failed"]
    assert 'colspan="2"' in made.html()


def test_a_table_without_rows_says_so():
    assert tables.table("Files", []).markdown().strip() == "**Files**: none."
    assert "<table" not in tables.table("Files", []).html()
