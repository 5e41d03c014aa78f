"""Looking on at a race: what is shown is what the blocks say, nothing looks empty, and stopping stops."""

import re
from xml.etree import ElementTree

import pytest
from examples import blocks_of

from shrinkkit.core import samples
from shrinkkit.core.samples import Blocks
from shrinkkit.widgets.convergence import Race


@pytest.fixture
def race(capsys):
    return Race()


def first(taken, count):
    return Blocks(taken.reference[: 2 * count], taken.candidate[: 2 * count], taken.null[: 2 * count])


def look(race, name="int8", counts=(2, 10, 40), speedup=2.0):
    taken = blocks_of(speedup=speedup)
    return [race(name, 1, 3, first(taken, count)) for count in counts]


def test_the_interval_that_is_shown_is_that_of_the_blocks(race):
    assert look(race) == [False, False, False]
    expected = samples.conclude(blocks_of(speedup=2.0)).speedup
    blocks_seen, last = race.courses["int8"].seen[-1]
    assert blocks_seen == 40
    assert last.value == pytest.approx(expected.value)


def test_every_comparison_keeps_its_picture(race):
    look(race, "int8")
    look(race, "half", speedup=0.5)
    html = race._live.shown.html()
    pictures = re.findall(r"<svg.*?</svg>", html)
    assert len(pictures) == 2
    for picture in pictures:
        assert re.match(
            r"(int8|half): \[.*\] after 2 blocks, .* after 40", ElementTree.fromstring(picture).get("aria-label")
        )
    assert "2 of 3 comparisons" in repr(race._live.shown)
    assert "0.500" in race._live.shown.markdown()


def test_a_narrowing_interval_is_drawn_narrower(race):
    look(race)
    (points,) = re.findall(r'<polygon points="([^"]+)"', race._live.shown.html())
    ys = [float(pair.split(",")[1]) for pair in points.split()]
    half = len(ys) // 2
    assert ys[half] - ys[half - 1] < ys[-2] - ys[1]


def test_the_button_stops_it_and_that_is_said(race):
    race._pressed(None)
    assert look(race, counts=(2,)) == [True]
    assert "Stopped by hand in comparison 1 of 3" in repr(race._live.shown)


def test_before_the_first_block_there_are_words(race):
    assert "Timing begins" in race._live.shown.html()


def test_one_that_is_timed_again_begins_anew(race):
    look(race, counts=(2, 40))
    look(race, counts=(3,))
    assert [count for count, _ in race.courses["int8"].seen] == [3]
