"""How answers changed, in tables, in pictures and in words."""

import base64
import dataclasses
import re
from html.parser import HTMLParser

import examples
import pages
import pytest
import torch

from shrinkkit.core import estimate, store
from shrinkkit.core.measurement import Accuracy, ClassScore, IntegerCheck, Regression
from shrinkkit.measure import scoring
from shrinkkit.report import accuracy as views
from shrinkkit.report.accuracy import PICTURES

NOTHING = Regression(0, "", "", "", 0.0, 0.0)


def accuracy(scores, before=None, **changes):
    """Return an accuracy; without `before` it is the baseline's."""
    found = Accuracy(
        metric="accuracy",
        scores=tuple(scores),
        mean=estimate.mean(scores),
        difference=estimate.paired_difference(before, scores) if before else None,
        agreement=1.0,
        cosine=1.0,
        divergence=0.0,
        classes=(),
        worst_regressions=(),
        regressions=0,
        improvements=0,
    )
    return dataclasses.replace(found, **changes)


RIGHT = [1.0] * 800
BASELINE = accuracy(RIGHT)
REGRESSION = dataclasses.replace(BASELINE, agreement=None, divergence=None)


def compared(**changes):
    return accuracy(RIGHT, RIGHT, **changes)


def by_class(differences, name="class {}"):
    """Return scores by class; each difference is (lost, gained) of 80 examples."""
    rows = []
    for i, (fell, rose) in enumerate(differences):
        before = [1.0] * (80 - rose) + [0.0] * rose
        after = [0.0] * fell + [1.0] * (80 - fell)
        paired = estimate.paired_difference(before, after)
        rows.append(ClassScore(name.format(i), 80, estimate.mean(after), paired))
    return tuple(rows)


def digit(index=17, label="3", before="3", after="8", side=16, seed=0):
    image = torch.rand(1, side, side, generator=torch.Generator().manual_seed(seed))
    return Regression(index, label, before, after, 1.0, 0.0, scoring.png(image))


def images(html):
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(dict(attributes)) if tag == "img" else None
    parser.feed(html)
    return found


def titles(table):
    return [column.title for column in table.columns]


def cells(table, row):
    return [cell.plain() for cell in table.rows[row]]


def test_accuracies_are_paired_with_the_baseline_and_say_how_far_outputs_drifted():
    one = accuracy([0.0] * 4 + [1.0] * 796, RIGHT, agreement=796 / 800, cosine=0.99912, divergence=0.0123456)
    table = views.accuracies({"baseline": BASELINE, "int8": one}, {"broken": "scores are not finite"})
    assert titles(table) == [
        "variant",
        "accuracy",
        "\N{GREEK CAPITAL LETTER DELTA} accuracy",
        "same predictions",
        "cosine",
        "KL divergence, nats",
    ]
    assert cells(table, 0) == ["baseline", "100.0 % (99.5\N{EN DASH}100.0)", "reference", "", "", ""]
    assert cells(table, 1)[1].startswith("99.5 % (")
    assert cells(table, 1)[2].startswith("\N{MINUS SIGN}0.5 pts (")
    assert cells(table, 1)[3:] == ["99.5 % (796 of 800)", "0.99912", "0.0123"]
    assert cells(table, 2) == ["broken", "scores are not finite"]
    assert "800 examples" in table.caption


def test_what_a_task_without_classes_cannot_have_takes_no_column():
    scores = [-0.5, -1.5, -2.0]
    one = accuracy(scores, [-0.4, -1.0, -2.0], metric="nearness", agreement=None, divergence=None, cosine=0.5)
    table = views.fidelity({"torch": one})
    assert titles(table) == ["runtime", "nearness", "\N{GREEK CAPITAL LETTER DELTA} nearness", "cosine"]
    assert "\N{MINUS SIGN}1.33" in cells(table, 0)[1]
    assert "pts" not in repr(table)
    assert "KL" not in table.note


def test_a_table_of_nothing_but_errors_keeps_them():
    assert "no such file" in repr(views.accuracies({}, {"gone": "no such file"}))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.999999999, "1.000000"),
        (0.99998, "0.999980"),
        (0.9031, "0.903"),
        (0.0, "0.000"),
        (-0.25, "\N{MINUS SIGN}0.250"),
        (-1.0, "\N{MINUS SIGN}1.000"),
    ],
)
def test_a_cosine_shows_how_far_from_one_it_is(value, text):
    assert cells(views.fidelity({"torch": compared(cosine=value)}), 0)[4] == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (3e-6, "< 0.0001"), (0.00025, "0.000250"), (6.271, "6.27")])
def test_a_divergence_has_three_digits_until_it_is_next_to_nothing(value, text):
    assert cells(views.fidelity({"torch": compared(divergence=value)}), 0)[5] == text


def test_only_classes_whose_interval_excludes_zero_are_marked():
    variant = compared(classes=by_class([(0, 0), (20, 0), (1, 0), (0, 20)]))
    plain = tuple(dataclasses.replace(row, difference=None) for row in by_class([(0, 0)] * 4))
    table = views.classes({"baseline": dataclasses.replace(BASELINE, classes=plain), "int8": variant})
    assert titles(table) == ["class", "baseline", "int8"]
    assert [row[2].tone for row in table.rows] == ["quiet", "bad", "quiet", "good"]
    assert [bool(row[2].aside) for row in table.rows] == [False, True, False, True]
    assert cells(table, 1)[:2] == ["class 1 (80 examples)", "100.0 %"]
    assert cells(table, 1)[2].startswith("\N{MINUS SIGN}25.0 (")
    assert "2 of 4 marked" in table.caption
    assert "pts" in table.caption


def test_many_classes_are_folded_and_so_are_few_of_which_none_is_marked():
    assert "<details" in views.classes({"int8": compared(classes=by_class([(20, 0)] * 13))}).html()
    assert "<details" not in views.classes({"int8": compared(classes=by_class([(20, 0)] * 12))}).html()
    assert "<details" in views.classes({"int8": compared(classes=by_class([(1, 0)] * 12))}).html()


def test_of_a_thousand_classes_those_are_shown_that_lost_most_in_any_variant():
    fallen = {i: (i % 7 + 1, 0) for i in range(0, 1000, 90)}
    first = compared(classes=by_class(fallen.get(i, (0, i % 2)) for i in range(1000)))
    second = compared(classes=by_class((60, 0) if i == 501 else (0, 0) for i in range(1000)))
    table = views.classes({"a": first, "b": second})
    assert "the 10 of 1,000 classes with the largest regressions" in table.caption
    assert "chosen" in table.note
    shown = [int(row[0].text.removeprefix("class ")) for row in table.rows]
    worst = sorted(fallen, key=lambda i: -fallen[i][0])
    assert shown == [501, *worst[:9]]


def test_a_thousand_classes_of_which_none_lost_are_a_sentence():
    one = compared(classes=by_class([(0, 1)] * 40))
    assert "None of 40 classes" in repr(views.classes({"a": one}))


def test_a_task_without_classes_has_none_to_show():
    assert "No scores per class: targets are no classes" in repr(
        views.classes({"baseline": REGRESSION, "a": compared()})
    )


def regressions(**accuracies):
    return views.regressions({"cpu/torch": accuracies})


def test_lost_images_are_shown_in_a_strip_that_says_what_they_were_taken_for():
    examples = tuple(digit(index=i, after="8" if i % 2 else "5") for i in range(10, 25))
    one = compared(worst_regressions=examples, regressions=15, improvements=2)
    counts, strip = regressions(baseline=BASELINE, int8=one).parts
    assert counts.caption == "Regressions by variant, of 800 examples"
    assert cells(counts, 0) == ["int8", "15 (2 improved)"]
    html = strip.html()
    assert f"{PICTURES} of 15 recorded" in html
    found = images(html)
    assert [image["alt"] for image in found][:2] == [
        "example 10: label 3, baseline predicts 3, 5: int8",
        "example 11: label 3, baseline predicts 3, 8: int8",
    ]
    assert len(found) == PICTURES
    assert {(image["width"], image["height"]) for image in found} == {("64", "64")}
    assert all("image-rendering:pixelated" in image["style"] for image in found)
    sources = [image["src"].removeprefix("data:image/png;base64,") for image in found]
    assert sources == [one.png for one in examples[:PICTURES]]
    assert html.count("3 \N{RIGHTWARDS ARROW} 8: int8") == PICTURES / 2
    assert pages.outside_addresses(html) == []


def test_an_example_is_shown_once_with_the_variants_and_targets_that_lose_it():
    rare, often, other = digit(index=3), digit(index=7), digit(index=7, after="5")

    def lost(*found):
        return compared(worst_regressions=found, regressions=len(found))

    torch_ = {"baseline": BASELINE, "a": lost(rare, often), "b": lost(often), "c": lost(other)}
    shown = views.regressions({"cpu/torch": torch_, "cpu/openvino": {"a": lost(often), "b": lost()}})
    counts, strip = shown.parts
    assert [cells(counts, i) for i in range(3)] == [["a", "2", "1"], ["b", "1", "0"], ["c", "1", ""]]
    assert [image.caption for image in strip.images] == [
        "3 \N{RIGHTWARDS ARROW} 8: a, b (cpu/torch); 5: c",
        "3 \N{RIGHTWARDS ARROW} 8: a (cpu/torch)",
    ]


def test_pictures_are_given_in_words_where_there_are_none():
    shown = regressions(int8=compared(worst_regressions=(digit(),), regressions=1))
    for text in (repr(shown), shown.markdown()):
        assert "example 17: label 3, baseline predicts 3, 8: int8" in text
        assert digit().png[:40] not in text


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(8, 8, (64, 64)), (24, 24, (72, 72)), (96, 64, (64, 96)), (96, 48, (96, 192)), (8, 96, (192, 16))],
)
def test_small_pictures_are_enlarged_by_whole_numbers(height, width, expected):
    one = dataclasses.replace(NOTHING, before="a", after="b", png=scoring.png(torch.zeros(1, height, width)))
    (image,) = images(regressions(v=compared(worst_regressions=(one,), regressions=1)).html())
    assert (int(image["width"]), int(image["height"])) == expected


def test_examples_without_pictures_are_a_table():
    examples = tuple(dataclasses.replace(digit(index=i), png="") for i in (4, 90))
    _, table = regressions(int8=compared(worst_regressions=examples, regressions=2)).parts
    assert titles(table) == ["example", "label", "baseline", "variants"]
    assert [cells(table, i) for i in range(2)] == [["4", "3", "3", "8: int8"], ["90", "3", "3", "8: int8"]]


def test_where_answers_are_no_classes_the_scores_are_shown():
    scores, before = [-0.5, -2.5], [-0.5, -0.25]
    worse = dataclasses.replace(NOTHING, index=1, score_before=-0.25, score_after=-2.5)
    one = accuracy(
        scores, before, metric="nearness", agreement=None, divergence=None, worst_regressions=(worse,), regressions=1
    )
    _, table = regressions(int8=one).parts
    assert titles(table) == ["example", "baseline", "variants"]
    assert cells(table, 0) == ["1", "\N{MINUS SIGN}0.25", "\N{MINUS SIGN}2.5: int8"]


def test_an_image_whose_answer_stayed_and_whose_score_fell_shows_its_score():
    one = dataclasses.replace(digit(after="3"), score_before=0.9, score_after=0.25)
    html = regressions(int8=compared(worst_regressions=(one,), regressions=1)).html()
    assert "0.9 \N{RIGHTWARDS ARROW} 0.25" in html
    assert images(html)[0]["alt"] == "example 17: label 3, score of the baseline 0.9, 0.25: int8"


def test_variants_that_lost_nothing_have_a_count_and_no_example():
    (counts,) = regressions(baseline=BASELINE, a=compared(), b=compared(improvements=2)).parts
    assert [cells(counts, i) for i in range(2)] == [["a", "0"], ["b", "0 (2 improved)"]]
    assert "No variant" in repr(regressions(baseline=BASELINE))


def test_class_names_cannot_become_markup():
    hostile = dataclasses.replace(digit(), label='<b>"', before='<b>"', after="<script>|")
    for one in (hostile, dataclasses.replace(hostile, png="")):
        shown = regressions(int8=compared(worst_regressions=(one,), regressions=1))
        assert not re.search(r"<(b|script)>", shown.html() + shown.markdown())


def test_records_read_back_from_disk_show_the_same(tmp_path):
    one = compared(worst_regressions=(digit(),), regressions=1, improvements=3, classes=by_class([(9, 0), (0, 0)]))
    store.write(tmp_path / "one.json", one)
    again = store.read(tmp_path / "one.json", Accuracy)
    assert regressions(int8=again).html() == regressions(int8=one).html()
    for show in (views.classes, views.fidelity):
        assert show({"int8": again}).html() == show({"int8": one}).html()


def test_pictures_of_many_variants_leave_a_report_light():
    noise = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    heavy = dataclasses.replace(digit(), png=scoring.png(noise))
    light = tuple(digit(index=i, side=24, seed=i) for i in range(12))
    one = compared(worst_regressions=(heavy,) * 12, regressions=12, classes=by_class([(9, 0)] * 10))
    found = {f"variant-{i}": one for i in range(8)}
    page = sum(len(shown.html()) for shown in (views.classes(found), views.fidelity(found)))
    page = 2 * page + len(views.regressions({"cpu/torch": found, "cpu/openvino": found}).html())
    assert len(base64.b64decode(heavy.png)) > 5_000
    assert page < 400_000
    assert len(images(regressions(a=one).html())) >= 1
    assert len(images(regressions(a=compared(worst_regressions=light, regressions=12)).html())) == PICTURES


def with_integers(check, notes=()):
    record = examples.target_record("cpu/torch")
    changed = [
        dataclasses.replace(m, integers=check, notes=notes) if m.variant == "static-int8" else m
        for m in record.measurements
    ]
    return dataclasses.replace(record, measurements=tuple(changed))


def test_layers_whose_kernels_saturate_are_named():
    text = repr(views.saturation(with_integers(IntegerCheck(0.3, {"stem": 0.4, "head": 0.001}, ("stem",)))))
    assert "saturates: stem" in text
    assert "at most 4.0e-01 in stem" in text


def test_kernels_that_compute_what_the_integers_say_are_said_to():
    assert "exact" in repr(views.saturation(with_integers(IntegerCheck(0.0, {"stem": 0.0}, ()))))


def test_why_integers_could_not_be_compared_is_told():
    assert "control flow" in repr(views.saturation(with_integers(None, ("Integer kernels: control flow.",))))
    assert "No variant computes in int8" in repr(views.saturation(with_integers(None)))
