import dataclasses

import examples
import pytest

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import LayerTime
from shrinkkit.display.picture import COLOURS, HIGHLIGHT
from shrinkkit.display.tables import Statement, Table
from shrinkkit.report import layer_profile

VARIANTS = {name: examples.variant(name, recipe) for name, recipe in {
    "baseline": examples.recipe_of(),
    "channels-50": examples.recipe_of({"prune-channels": {"ratio": 0.5}}),
    "weights-80": examples.recipe_of({"prune-weights": {"ratio": 0.8}}),
    "static-int8": examples.recipe_of(precision="static-int8"),
    "float16": examples.recipe_of(precision="float16"),
}.items()}  # fmt: skip


@pytest.fixture
def record():
    return examples.target_record("cpu/torch")


def changed(record, variant, **values):
    found = (dataclasses.replace(m, **values) if m.variant == variant else m for m in record.measurements)
    return dataclasses.replace(record, measurements=tuple(found))


def tables(shown):
    return [part for part in shown.parts if isinstance(part, Table)]


def statements(shown):
    return [part for part in shown.parts if isinstance(part, Statement)]


def row(table, layer):
    (found,) = (cells for cells in table.rows if cells[0].text == layer)
    return {column.title: cell for column, cell in zip(table.columns, found, strict=True)}


def test_every_timed_variant_has_a_bar_a_table_and_no_other_has(record):
    shown = layer_profile.layers(record, VARIANTS)
    picture = shown.parts[0]
    (table,) = tables(shown)
    assert [column.title for column in table.columns] == ["layer", "operators", *VARIANTS]
    assert all(f">{name}<" in picture.svg for name in VARIANTS)
    assert "narrow-int8" not in picture.svg


def test_the_picture_names_the_largest_layers_and_tells_conversions(record):
    picture = layer_profile.layers(record, VARIANTS).parts[0]
    assert "baseline: 28.6 ms, of which" in picture.alt
    assert "conversions 1.64 ms" in picture.alt
    assert "other layers" in picture.alt
    assert f"var(--sk-highlight, {HIGHLIGHT})" in picture.svg
    assert not any(colour in picture.svg for colour in COLOURS)
    assert "conversions" not in layer_profile.layers(record, {"baseline": VARIANTS["baseline"]}).parts[0].alt


def test_the_picture_stays_light_and_is_the_same_each_time(record):
    picture = layer_profile.layers(record, VARIANTS).parts[0]
    assert len(picture.svg) < 20_000
    assert picture.svg == layer_profile.layers(record, VARIANTS).parts[0].svg


def test_a_row_has_the_times_before_and_after_and_the_precision(record):
    (table,) = tables(layer_profile.layers(record, VARIANTS))
    cells = row(table, "stages.3.conv1")
    assert (cells["baseline"].text, cells["channels-50"].text) == ("1.60", "0.573")
    assert (cells["channels-50"].aside, cells["channels-50"].tone) == ("2.79\N{MULTIPLICATION SIGN}", "good")
    assert cells["static-int8"].aside == "1.84\N{MULTIPLICATION SIGN}, int8"
    assert (cells["float16"].tone, cells["operators"].text) == ("bad", "conv2d")
    assert row(table, "conversions")["operators"].text == "QuantizeLinear"
    assert row(table, "total")["baseline"].text == "28.6"
    alone = dataclasses.replace(record, measurements=record.measurements[:1])
    assert row(tables(layer_profile.layers(alone, VARIANTS))[0], "head")["baseline"].aside == ""


def test_small_layers_share_a_row_and_no_time_is_lost(record):
    times = tuple(LayerTime(f"tiny{i}", "add", 0.01) for i in range(30))
    of = next(m.layers for m in record.measurements if m.variant == "channels-50")
    (table,) = tables(layer_profile.layers(changed(record, "channels-50", layers=(*of, *times)), VARIANTS))
    assert row(table, "30 rows below 1.0 % each")["channels-50"].text == "0.300"


def test_a_layer_that_became_part_of_another_is_said_to(record):
    of = next(m.layers for m in record.measurements if m.variant == "static-int8")
    without = tuple(one for one in of if one.layer != "stages.2.conv1")
    (table,) = tables(layer_profile.layers(changed(record, "static-int8", layers=without), VARIANTS))
    assert row(table, "stages.2.conv1")["static-int8"].text == "fused"


def test_many_variants_have_several_tables_each_with_the_baseline(record, monkeypatch):
    monkeypatch.setattr(layer_profile, "COLUMNS", 3)
    titles = [[c.title for c in table.columns][2:] for table in tables(layer_profile.layers(record, VARIANTS))]
    assert titles == [["baseline", "channels-50", "weights-80", "static-int8"], ["baseline", "float16"]]


def test_only_variants_that_are_not_faster_or_convert_much_are_explained(record):
    texts = {part.text.partition(" ")[0]: part for part in statements(layer_profile.layers(record, VARIANTS))}
    assert set(texts) == {"weights-80", "float16"}
    assert any("are zero" in remark for remark in texts["weights-80"].remarks)
    assert texts["float16"].tone == "bad"
    assert any("in float16" in remark for remark in texts["float16"].remarks)
    slow = changed(record, "channels-50", denormals=5)
    of = next(m.layers for m in record.measurements if m.variant == "static-int8")
    many = (*of, LayerTime("", "DequantizeLinear", 2.0, converts=True))
    shown = statements(layer_profile.layers(changed(record, "static-int8", layers=many), VARIANTS))
    assert not any("channels-50" in part.text for part in statements(layer_profile.layers(slow, VARIANTS)))
    assert any("Conversions" in remark for part in shown for remark in part.remarks)


def test_times_that_exceed_the_latency_by_far_are_not_shown_and_it_is_said(record):
    shown = layer_profile.layers(changed(record, "baseline", latency_ms=Estimate(3.0, 2.9, 3.1)), VARIANTS)
    assert "baseline" not in [column.title for column in tables(shown)[0].columns]
    assert ">baseline<" not in shown.parts[0].svg
    assert any("28.6 ms" in part.text and "3.00 ms" in part.text for part in statements(shown))


def test_without_times_there_is_a_sentence(record):
    bare = dataclasses.replace(
        record, measurements=tuple(dataclasses.replace(m, layers=()) for m in record.measurements)
    )
    (part,) = layer_profile.layers(bare, VARIANTS).parts
    assert part.text == "No per-layer latency on cpu/torch."


def test_it_shows_itself_as_html_markdown_and_text(record):
    shown = layer_profile.layers(record, VARIANTS)
    for text in (shown.html(), shown.markdown(), repr(shown)):
        assert "stages.3.conv1" in text
