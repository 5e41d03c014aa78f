"""Pictures: words that carry the numbers, colours that follow the page, the same bytes every time."""

import dataclasses
import re
from xml.etree import ElementTree

import examples
import pytest

from shrinkkit.core.estimate import Estimate
from shrinkkit.display.picture import COLOURS, GREY, INK, SHADES, style
from shrinkkit.report import figures, show
from shrinkkit.report.figures import SHOWN
from shrinkkit.results import breakdown, results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return results.load(examples.write_run(tmp_path_factory.mktemp("run")))


@pytest.fixture(scope="module")
def pictures(found):
    latencies = {m.variant: m.latency for m in found.measured["cpu/torch"].measurements if m.latency}
    return {
        "factors": figures.breakdown(breakdown.breakdown(found), found.targets),
        "tradeoff": figures.tradeoff(found),
        "distributions": figures.distributions(latencies, title="cpu/torch"),
        "training": figures.training((0.9, 0.95), metric="accuracy"),
    }


def test_every_picture_is_sound_xml_with_a_text_that_stands_in_for_it(pictures):
    for picture in pictures.values():
        root = ElementTree.fromstring(picture.svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == picture.alt
        assert root.get("width") is None


def test_the_words_hold_the_numbers(pictures):
    assert "channels-50 on cpu/onnxruntime: 4.28" in pictures["factors"].alt
    assert "81.5 kB" in pictures["tradeoff"].alt
    assert "static-int8: median 16." in pictures["distributions"].alt
    assert "0.9, 0.95" in pictures["training"].alt


def test_labels_keep_every_digit(found):
    made = breakdown.breakdown(found)
    assert ">0.310\N{MULTIPLICATION SIGN}" in figures.breakdown(made, found.targets).svg


def test_a_speed_that_nothing_can_be_said_of_is_not_quoted(found):
    noisy = [one.__class__(**{**vars(one), "timing": "too noisy"}) for one in breakdown.breakdown(found)]
    picture = figures.breakdown(noisy, found.targets)
    assert ">4.28\N{MULTIPLICATION SIGN}" not in picture.svg
    assert "too noisy" in picture.alt


def test_a_quarter_of_outliers_does_not_press_the_others_together():
    others, slow = [1.0, 1.5, 2.0, 2.5, 3.0, 4.0], [0.02, 0.025]
    assert figures._near(others + slow) == others
    # Of two groups of equal size neither is far.
    assert figures._near([1.0, 1.1, 40.0, 44.0]) == [1.0, 1.1, 40.0, 44.0]


def test_ink_is_a_variable_of_the_page(pictures):
    for picture in pictures.values():
        assert "var(--sk-ink" in picture.svg
        assert INK not in picture.svg
        assert "#000000" not in picture.svg


def test_no_two_pictures_share_an_id(pictures):
    ids = [i for picture in pictures.values() for i in re.findall(r'\bid="([^"]+)"', picture.svg)]
    assert len(ids) == len(set(ids))
    for picture in pictures.values():
        for used in re.findall(r'(?:href="#|url\(#)([^")]+)', picture.svg):
            assert f'id="{used}"' in picture.svg


def test_the_same_data_gives_the_same_bytes(pictures, found):
    assert figures.tradeoff(found).svg == pictures["tradeoff"].svg


def test_a_picture_of_many_slots_stays_light_and_says_so(found):
    one = next(m.latency for m in found.measured["cpu/torch"].measurements if m.latency)
    many = one.candidate_samples_ms * 50
    long = one.__class__(**{**vars(one), "candidate_samples_ms": many, "reference_samples_ms": many})
    picture = figures.distributions({"long": long})
    assert f"{SHOWN} of up to {len(many)} slots" in picture.caption
    assert len(picture.svg) < 40_000


def test_nothing_to_draw_is_no_picture(found):
    empty = found.__class__(**{**vars(found), "rows": ()})
    assert "No variant" in repr(figures.tradeoff(empty))
    assert "No timing samples" in repr(figures.distributions({}))


def test_machines_stand_below_each_other_and_every_column_has_an_axis(tmp_path):
    away = results.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    drawn = figures.tradeoff(away)
    for name in away.machines:
        assert drawn.svg.count(f">{name}<") == 1
    assert drawn.svg.count("speed-up over PyTorch") == 2
    assert drawn.svg.count(">4\N{MULTIPLICATION SIGN}<") == 2
    assert f"static-int8 on cpu/torch @ {examples.ELSEWHERE}: 1.36" in drawn.alt


def test_of_many_variants_the_pareto_optimal_ones_are_named_and_the_others_counted(found, monkeypatch):
    monkeypatch.setattr(figures, "_MOST_NAMED", 3)
    svg = figures.tradeoff(found).svg
    assert "other variants, not Pareto-optimal" in svg
    assert ">weights-80<" not in svg


def test_a_variant_has_one_colour_in_all_figures_and_the_baseline_is_grey(found):
    names = figures.named(found)
    assert "baseline" not in names
    assert figures.look("baseline", names)["color"] == GREY
    assert figures.look("weights-80", names) == figures.look("weights-80", [*names, "later"])
    colour = f"var(--sk-c{names.index('weights-80')},"
    record = found.measured["cpu/torch"]
    compared = {m.variant: m.latency for m in record.measurements if m.variant == "weights-80"}
    conditions = compared["weights-80"].conditions
    only = dataclasses.replace(found, rows=tuple(row for row in found.rows if row.variant == "weights-80"))
    assert figures.named(only) == ["weights-80"]
    for drawn in (
        figures.distributions(compared, names=names),
        figures.throughput(record, conditions, names),
        figures.tradeoff(found),
    ):
        assert colour in drawn.svg


def test_no_two_of_many_series_look_alike_and_eight_have_eight_colours():
    looks = [tuple(style(i).values()) for i in range(56)]
    assert len(set(looks)) == 56
    assert len({colour for colour, _ in looks[:8]}) == 8


def test_long_names_stay_distinct(found):
    names = [f"prune-channels-by-taylor-importance-{i}-then-fine-tune-static-int8" for i in (1, 2)]
    rows = [
        dataclasses.replace(one, variant=name) for name, one in zip(names, breakdown.breakdown(found), strict=False)
    ]
    drawn = figures.breakdown(rows, found.targets)
    assert all(f">importance-{i}-then-fine-tune-static-int8<" in drawn.svg for i in (1, 2))


def test_of_many_variants_the_breakdown_shows_the_pareto_optimal_ones_and_says_so(found, monkeypatch):
    monkeypatch.setattr(figures, "_MOST_NAMED", 3)
    monkeypatch.setattr(show, "MANY", 3)
    drawn = show.speedup_breakdown(found)
    assert "Pareto-optimal variants only" in drawn.caption
    assert ">weights-80<" not in drawn.svg


def test_one_very_slow_variant_does_not_press_the_others_together(found):
    slow = [
        dataclasses.replace(row, timing_today="slower", speedup_today=Estimate(0.0251, 0.025, 0.0252))
        if (row.variant, row.target) == ("weights-80", "cpu/torch")
        else row
        for row in found.rows
    ]
    drawn = figures.tradeoff(dataclasses.replace(found, rows=tuple(slow)))
    assert ">\N{BLACK LEFT-POINTING SMALL TRIANGLE} 0.0251\N{MULTIPLICATION SIGN}<" in drawn.svg
    ticks = re.findall(r">([\d.]+)\N{MULTIPLICATION SIGN}<", drawn.svg)
    assert min(map(float, ticks)) >= 0.06


def test_parts_of_bars_have_no_colour_of_a_variant(pictures):
    assert SHADES[2] in pictures["factors"].svg
    assert not any(colour in pictures["factors"].svg for colour in COLOURS)
