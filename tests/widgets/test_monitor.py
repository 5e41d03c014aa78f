"""Live view of a latency comparison: it shows the estimate of the samples, and the button stops the timing."""

import math
import re
from random import Random
from xml.etree import ElementTree

import pytest

from shrinkkit.core import evidence
from shrinkkit.core.evidence import PairedSamples
from shrinkkit.widgets.monitor import TimingMonitor


@pytest.fixture
def monitor(capsys):
    return TimingMonitor()


def blocks_of(count, speedup):
    """Return blocks of four calls a slot, in which the candidate is `speedup` times as fast as the reference."""
    random = Random(0)
    times = [
        [tuple(ms * math.exp(random.gauss(0, 0.002)) for _ in range(4)) for _ in range(80)]
        for ms in (5.0, 5.0 / speedup, 5.0)
    ]
    return PairedSamples(*(slots[: 2 * count] for slots in times))


def watch(monitor, name="int8", counts=(2, 10, 40), speedup=2.0):
    return [monitor(name, blocks_of(count, speedup)) for count in counts]


def test_the_interval_shown_is_that_of_the_samples(monitor):
    assert watch(monitor) == [False, False, False]
    blocks, last = monitor.courses["int8"][-1]
    assert blocks == 40
    assert last.value == pytest.approx(evidence.conclude(blocks_of(40, 2.0)).speedup.value)


def test_every_comparison_keeps_its_chart(monitor):
    watch(monitor, "int8")
    watch(monitor, "half", speedup=0.5)
    charts = re.findall(r"<svg.*?</svg>", monitor._live.shown.html())
    labels = [ElementTree.fromstring(chart).get("aria-label") for chart in charts]
    assert [label.partition(":")[0] for label in labels] == ["int8", "half"]
    assert all(" 2 blocks" in label and label.endswith(" 40") for label in labels)
    assert "2 comparisons" in repr(monitor._live.shown)
    assert "0.500" in monitor._live.shown.markdown()


def test_a_narrowing_interval_is_drawn_narrower(monitor):
    watch(monitor)
    (points,) = re.findall(r'<polygon points="([^"]+)"', monitor._live.shown.html())
    ys = [float(pair.split(",")[1]) for pair in points.split()]
    half = len(ys) // 2
    assert ys[half] - ys[half - 1] < ys[-2] - ys[1]


def test_the_button_stops_the_timing_and_the_view_says_so(monitor):
    monitor.stop()
    assert watch(monitor, counts=(2,)) == [True]
    assert "comparison 1" in repr(monitor._live.shown)
    assert monitor._live.shown.caption.startswith("Interrupted")


def test_the_button_is_disabled_when_there_is_nothing_to_stop(monitor):
    assert monitor._button.disabled
    watch(monitor, counts=(2,))
    assert not monitor._button.disabled
    monitor._end(None)
    assert monitor._button.disabled
    watch(monitor, counts=(2,))
    monitor.stop()
    assert monitor._button.disabled


def test_the_view_is_not_empty_before_the_first_block(monitor):
    assert "0 comparisons" in monitor._live.shown.html()


def test_a_comparison_that_is_timed_again_starts_over(monitor):
    watch(monitor, counts=(2, 40))
    watch(monitor, counts=(3,))
    assert [count for count, _ in monitor.courses["int8"]] == [3]
