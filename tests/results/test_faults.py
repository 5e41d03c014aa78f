"""Broken variants and faulty files are planted in a made-up run, and must be named with the likely cause."""

import dataclasses

import examples
import pytest

from shrinkkit.core import evidence
from shrinkkit.core.measurement import IntegerCheck
from shrinkkit.results import faults as faulty
from shrinkkit.results import output, results


def faults(found):
    return [f"{name} on {' and '.join(at)}: {state}: {why}" for (state, name, why), at in faulty.faults(found).items()]


TORCH, ONNX = "cpu/torch", "cpu/onnxruntime"


@pytest.fixture
def run(tmp_path):
    return examples.write_run(tmp_path / "run")


def planted(found, name, targets, *, share=0.1, cosine=0.1, notes=(), kind="Conv2d", **measured):
    """Return the results with the variant `name` right on `share` of the examples on `targets`."""
    count = examples.EXAMPLES
    records = dict(found.measured)
    for target in targets:
        changed = []
        for m in records[target].measurements:
            if m.variant == name:
                scores = tuple(float(i < share * count) for i in range(count))
                m = dataclasses.replace(
                    m, accuracy=dataclasses.replace(m.accuracy, scores=scores, cosine=cosine), **measured
                )
            changed.append(m)
        records[target] = evidence.derive(dataclasses.replace(records[target], measurements=tuple(changed)))
    verdicts = {t: results.accuracy_verdicts(r, found.budget.accuracy_drop) for t, r in records.items()}
    rows = tuple(
        dataclasses.replace(r, accuracy_verdict=verdicts.get(r.target, {}).get(r.variant, "")) for r in found.rows
    )
    variant = found.variants[name]
    audit = tuple(dataclasses.replace(layer, kind=kind) for layer in variant.audit)
    variants = {**found.variants, name: dataclasses.replace(variant, audit=audit, notes=(*variant.notes, *notes))}
    return dataclasses.replace(found, measured=records, rows=rows, variants=variants)


def test_variants_that_lose_a_little_are_not_named(run):
    found = results.load(run)
    assert faults(found) == []
    assert faults(planted(found, "static-int8", [TORCH, ONNX], share=0.95, cosine=0.97)) == []


def test_a_variant_at_the_majority_class_is_broken_and_the_missing_training_is_the_cause(run):
    found = planted(results.load(run), "channels-50", [TORCH, ONNX], share=0.5)
    stages = found.variants["channels-50"].recipe["stages"]
    (fault,) = faults(found)
    assert fault.startswith(
        "channels-50 on cpu/torch and cpu/onnxruntime: broken: accuracy 50.0 %, no better than always the most"
    )
    assert ("without training after it" in fault) is ("fine-tune" not in str(stages))


def test_a_variant_below_half_of_the_fidelity_is_broken_whatever_its_unit(run):
    found = dataclasses.replace(results.load(run), metric="1 - relative error with the original", is_fraction=False)
    (text,) = faults(planted(found, "channels-50", [TORCH], share=0.2, cosine=0.9))
    assert text.startswith("channels-50 on cpu/torch: broken: 1 - relative error with the original 0.2")


def test_statistics_of_the_full_model_are_the_cause_unless_they_were_estimated_again(run):
    found = results.load(run)
    old = planted(found, "channels-50", [TORCH, ONNX], share=0.1, kind="BatchNorm2d")
    assert all("BatchNorm statistics are those of the full model" in text for text in faults(old))
    new = planted(
        found, "channels-50", [TORCH], kind="BatchNorm2d", notes=["prune-channels: BatchNorm statistics re-estimated"]
    )
    assert "BatchNorm" not in faults(new)[0]


def test_a_much_better_file_of_the_same_recipe_is_the_cause(run):
    (text,) = faults(planted(results.load(run), "static-int8", [ONNX], share=0.1))
    assert text.startswith("static-int8 on cpu/onnxruntime: broken: accuracy 10")
    assert "The same recipe on cpu/torch has" in text
    assert text.endswith("so the fault lies in this file.")


def test_a_file_far_below_another_is_faulty_without_being_broken(run):
    found = results.load(run)
    (text,) = faults(planted(found, "static-int8", [ONNX], share=0.93, cosine=0.97))
    assert text.startswith("static-int8 on cpu/onnxruntime: faulty file: accuracy 93")
    scores = {m.variant: m.accuracy for m in found.measured[ONNX].measurements if m.accuracy}["static-int8"].scores
    share = sum(scores) / len(scores)
    (text,) = faults(planted(found, "static-int8", [ONNX], share=share, cosine=0.8))
    assert "cosine 0.800" in text


def test_saturation_and_precision_are_named(run):
    found = results.load(run)
    check = IntegerCheck(0.4, {"c1": 0.4}, ("c1",))
    saturated = planted(found, "static-int8", [TORCH, ONNX], integers=check)
    assert all("int8 accumulators saturate in c1" in text for text in faults(saturated))
    assert all(
        "Likely cause: the precision, static-int8" in t for t in faults(planted(found, "static-int8", [TORCH, ONNX]))
    )


def test_faults_are_in_the_table_of_the_terminal(run):
    found = planted(results.load(run), "static-int8", [ONNX])
    assert "static-int8 (cpu/onnxruntime) broken" in output.table(found)
