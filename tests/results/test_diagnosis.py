"""Each explanation is planted in made-up times, and must be found with its figures; without it, nothing is said."""

import subprocess
import sys

import pytest

from shrinkkit.core.estimate import Estimate
from shrinkkit.core.measurement import LayerTime
from shrinkkit.core.variant import LayerAudit, LayerPrecision
from shrinkkit.results import diagnosis


def layer(name, *, channels=(16, 16), zeroed=0.0, runs_as="", why="", parameters=1000):
    precision = {"torch": LayerPrecision(runs_as, why)} if runs_as else {}
    return LayerAudit(name, "Conv2d", parameters, parameters, *channels, zeroed, precision)


def conv(name, ms, operator="conv2d"):
    return LayerTime(name, operator, ms)


BEFORE = (conv("conv1", 1.0), conv("conv2", 2.0), conv("head", 0.1), LayerTime("", "relu", 0.1))
AUDIT = (layer("conv1"), layer("conv2"), layer("head", channels=(10, 10)))


def said(after, audit=AUDIT, *, before=BEFORE, denormals=0, verdict="slower", speedup=None):
    ratio = speedup or sum(one.ms for one in before) / sum(one.ms for one in after)
    estimate = Estimate(ratio, ratio, ratio)
    return diagnosis.slow_down(
        before, after, audit, runtime="torch", denormals=denormals, speedup=estimate, verdict=verdict
    )


def test_nothing_is_said_where_nothing_stands_out():
    assert said(BEFORE, verdict="same") == ()
    assert said((conv("conv1", 0.5), conv("conv2", 1.0), *BEFORE[2:]), verdict="faster") == ()


def test_nothing_is_said_of_a_timing_that_is_too_noisy_nor_without_times():
    planted = (conv("conv1", 9.0), *BEFORE[1:])
    assert said(planted) != ()
    assert said(planted, verdict="too noisy") == ()
    assert said(planted, before=(), speedup=1.0) == ()


def test_conversions_are_named_with_their_share():
    converting = [LayerTime("conv1", "quantize_per_tensor", 0.5, True), LayerTime("", "dequantize", 0.3, True)]
    (sentence,) = said((*BEFORE, *converting))
    for part in ("Conversions", "0.800 ms of 4.00 ms (20.0 %)", "quantize_per_tensor 0.500 ms, dequantize 0.300 ms"):
        assert part in sentence


def test_conversions_that_were_there_before_or_are_small_are_not_named():
    converting = LayerTime("", "ReorderOutput", 0.8, True)
    assert said((*BEFORE, converting), before=(*BEFORE, converting), verdict="same") == ()
    assert said((*BEFORE, LayerTime("", "dequantize", 0.2, True))) == ()


def test_a_layer_pruned_to_13_channels_that_takes_longer_is_named_with_both():
    audit = (layer("conv1", channels=(16, 13)), *AUDIT[1:])
    (sentence,) = said((conv("conv1", 1.31), *BEFORE[1:]), audit)
    assert "blocks of 8 or 16" in sentence
    assert sentence.endswith("conv1 takes 1.31 ms with 13 channels, 1.00 ms before with 16.")


@pytest.mark.parametrize(("before", "after", "odd"), [(16, 13, True), (32, 24, True), (32, 16, False), (13, 11, False)])
def test_channels_are_blamed_only_where_they_no_longer_fill_blocks(before, after, odd):
    audit = (layer("conv1", channels=(before, after)), *AUDIT[1:])
    (sentence,) = said((conv("conv1", 2.0), *BEFORE[1:]), audit)
    assert ("blocks" in sentence) is odd
    assert f"conv1 takes 2.00 ms with {after} channels, 1.00 ms before with {before}" in sentence


def test_a_layer_with_odd_channels_that_became_faster_is_not_blamed():
    audit = (layer("conv1", channels=(16, 13)), *AUDIT[1:])
    assert said((conv("conv1", 0.8), *BEFORE[1:]), audit, verdict="faster") == ()


def test_a_layer_that_takes_longer_is_named_with_the_precision_it_runs_in():
    audit = (layer("conv1", runs_as="float16"), *AUDIT[1:])
    assert said((conv("conv1", 1.9), *BEFORE[1:]), audit) == (
        "This layer takes longer than before, with no more work: conv1 takes 1.90 ms in float16, 1.00 ms before.",
    )


def test_what_a_layer_took_in_is_counted_to_its_time_before():
    before = (conv("conv1", 1.0), conv("bn1", 0.6, "batch_norm"), *BEFORE[1:])
    audit = (layer("conv1"), layer("bn1"), *AUDIT[1:])
    assert said((conv("conv1", 1.6), *BEFORE[1:]), audit, before=before, verdict="same") == ()
    assert "1.00 ms before" not in said((conv("conv1", 2.6), *BEFORE[1:]), audit, before=before)[0]


def test_the_worst_of_many_layers_are_named_and_the_others_counted():
    names = [f"l{i}" for i in range(6)]
    audit = tuple(layer(name) for name in names)
    after = [conv(name, 1.5 + 0.1 * i) for i, name in enumerate(names)]
    (sentence,) = said(after, audit, before=[conv(name, 1.0) for name in names])
    assert sentence.startswith("These 6 layers take longer")
    assert sentence.index("l5 takes") < sentence.index("l4 takes") < sentence.index("l3 takes")
    assert "l2" not in sentence
    assert sentence.endswith("and 3 more layers.")


def test_layers_left_in_float_are_named_with_their_share_and_the_reason():
    float_ = {"runs_as": "float32", "why": "dynamic int8 does not cover convolutions; static int8 does"}
    audit = (layer("conv1", **float_), layer("conv2", **float_), layer("head", runs_as="int8"))
    before = (*BEFORE[:2], conv("head", 0.8))
    assert said(before, audit, before=before, verdict="same") == (
        "2 layers of an int8 variant run in float32 and take 3.00 ms of 3.80 ms (78.9 %): conv2, conv1 (dynamic int8 "
        "does not cover convolutions; static int8 does).",
    )


def test_layers_in_float_need_no_reason_where_no_int8_was_asked_for():
    audit = tuple(layer(row.layer, runs_as="float32") for row in AUDIT)
    assert said(BEFORE, audit, verdict="same") == ()


def test_zeros_that_save_no_time_are_named_and_zeros_that_do_are_not():
    audit = (layer("conv1", zeroed=0.8), layer("conv2", zeroed=0.8), *AUDIT[2:])
    (sentence,) = said(BEFORE, audit, verdict="same")
    for part in ("80.0 % of the weights of 2 layers", "dense", "3.00 ms, 3.00 ms before"):
        assert part in sentence
    assert said((conv("conv1", 0.5), conv("conv2", 0.9), *BEFORE[2:]), audit, verdict="faster") == ()


def test_operators_outside_the_layers_that_were_not_there_before_are_named():
    new = [LayerTime("", "QLinearSoftmax", 0.5), LayerTime("blocks.0", "QLinearAdd", 0.2)]
    (sentence,) = said((*BEFORE, *new))
    for part in ("0.800 ms of 3.90 ms (20.5 %), 0.100 ms", "new: QLinearSoftmax 0.500 ms, QLinearAdd 0.200 ms"):
        assert part in sentence


def test_denormal_numbers_are_counted():
    (sentence,) = said(BEFORE, denormals=1234, verdict="same")
    assert "1,234 denormal" in sentence
    assert said(BEFORE, denormals=0, verdict="same") == ()


def test_what_takes_most_comes_first():
    converting = LayerTime("", "dequantize", 0.7, True)
    first, second = said((conv("conv1", 1.4), *BEFORE[1:], converting))
    assert "Conversions" in first
    assert "conv1 takes" in second
    first, second = said((conv("conv1", 2.4), *BEFORE[1:], converting))
    assert "conv1 takes" in first
    assert "Conversions" in second


def test_times_that_contradict_the_paired_timing_are_not_compared():
    planted = (conv("conv1", 2.0), conv("conv2", 1.0), *BEFORE[2:])
    assert "conv1 takes 2.00 ms" in said(planted, speedup=1.0, verdict="same")[0]
    (sentence,) = said(planted, speedup=0.5)
    assert "1.00\N{MULTIPLICATION SIGN}, not the 0.500\N{MULTIPLICATION SIGN}" in sentence
    assert "conv1" not in sentence


def test_a_layer_is_not_blamed_for_what_disturbed_all_of_them():
    disturbed = tuple(LayerTime(one.layer, one.operator, 1.2 * one.ms) for one in BEFORE)
    assert said(disturbed, speedup=1.0, verdict="same") == ()


def test_explaining_loads_no_torch():
    code = "import sys, shrinkkit.results.diagnosis, shrinkkit.report.layer_profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
