"""What a deployment pays: tails that are quoted only where there are calls enough, memory, batches and threads."""

import dataclasses
import random

import examples
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shrinkkit.report import deployment
from shrinkkit.report.deployment import FEWEST


@pytest.fixture(scope="module")
def record():
    return examples.target_record("cpu/torch")


@given(st.integers(662, 2000), st.integers(0, 99), st.sampled_from(list(FEWEST)))
def test_a_quantile_is_exceeded_by_no_more_calls_than_its_share(count, seed, share):
    samples = [random.Random(seed + i).choice((1.0, 2.0, 3.0, 50.0)) for i in range(count)]
    value = deployment.quantile(samples, share)
    assert value in samples
    assert sum(ms > value for ms in samples) <= (1 - share) * len(samples)


@pytest.mark.parametrize(("share", "fewest"), [(0.5, 1), (0.9, 64), (0.99, 662)])
def test_a_quantile_is_quoted_from_a_number_of_calls_on(share, fewest):
    assert deployment.quantile([1.0] * (fewest - 1), share) is None
    assert deployment.quantile([1.0] * fewest, share) == 1.0


def test_tails_say_how_many_calls_are_wanting(record):
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in deployment.tails(record).rows}
    assert rows["static-int8"][2] == "needs 662 calls, has 180"
    assert rows["static-int8"][0].endswith("ms")
    # The baseline took turns with every variant, so of its calls there are enough.
    assert rows["baseline"][2].endswith("ms")


def test_memory_is_told_against_the_baseline(record):
    table = deployment.memory(record)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["baseline"][:3] == ["14.0 MB", "9.00 MB", "reference"]
    assert rows["static-int8"][2].startswith("0.54")
    assert "190 MB" in table.note
    assert "dynamic-int8" not in rows


def test_without_a_count_of_the_baseline_memory_has_no_ratio(record):
    measurements = tuple(
        dataclasses.replace(m, memory=None) if m.variant == "baseline" else m for m in record.measurements
    )
    table = deployment.memory(dataclasses.replace(record, measurements=measurements))
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["static-int8"][0] != ""
    assert rows["static-int8"][2] == ""


def test_why_memory_could_not_be_counted_is_told(record):
    measurements = tuple(
        dataclasses.replace(m, memory=None, notes=("Peak memory: there is no /proc.",)) for m in record.measurements
    )
    assert "there is no /proc" in deployment.memory(dataclasses.replace(record, measurements=measurements)).note


def test_throughput_is_drawn_over_the_batch_sizes_and_told_in_words(record):
    shown, table = deployment.throughput(record).parts
    assert "static-int8: 315 at 1, 488 at 8, 559 at 32" in shown.alt
    assert len(shown.svg) < 20_000
    assert "narrow-int8.stage-1" not in shown.alt
    text = repr(table)
    assert "The batch is fixed at 8" in text
    assert "reference" in text
    assert len(table.rows) == len(record.sweep)


def test_without_other_batches_a_sentence_says_so(record):
    assert "No other batch size" in repr(deployment.throughput(dataclasses.replace(record, sweep=())))


def test_other_threads_alone_are_a_table_without_a_picture(record):
    only = tuple(point for point in record.sweep if point.threads == 1)
    assert only
    (table,) = deployment.throughput(dataclasses.replace(record, sweep=only)).parts
    assert len(table.rows) == len(only)
