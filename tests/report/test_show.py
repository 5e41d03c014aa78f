"""The tables of a report and of a step: complete for a whole run, and readable for an unfinished one."""

import dataclasses
import random
from types import SimpleNamespace

import examples
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import task as tiny_task
from torch import nn

from shrinkkit.display import cells, formats
from shrinkkit.measure import session
from shrinkkit.report import accuracy, figures, show
from shrinkkit.report.show import PERCENTILES
from shrinkkit.results import results, verdict
from shrinkkit.results.results import Row
from shrinkkit.tasks import modules

VIEWS = (
    show.title,
    verdict.decide,
    show.variants,
    show.missing,
    show.speedup_breakdown,
    figures.tradeoff,
    show.environment,
    show.model_files,
    show.steps,
    show.commands,
)
PARTS = (show.predictions, show.layer_latency, show.deployment)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return examples.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def found(run):
    return results.load(run)


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
def test_every_view_survives_a_run_that_got_nowhere(view, found):
    rows = tuple(Row(row.variant, row.target, "not run", "it was interrupted") for row in found.rows)
    empty = dataclasses.replace(found, rows=rows, variants={}, measured={}, status=None, study=None)
    shown = view(empty)
    assert shown._repr_html_()
    assert shown._repr_markdown_()
    assert repr(shown)


def test_the_variants_are_shown_target_by_target_with_failures_in_place(found):
    text = repr(show.variants(found))
    assert text.count("failed: Unsupported") == 2
    assert "cpu/onnxruntime: unchanged model 23.4 ms, batch size 8" in show.variants(found).note
    assert "(best)" in text


def test_a_masked_variant_is_said_to_be_no_smaller(found):
    assert "weights-80: 79.7 % of the weights are zero, but files store zeros" in repr(show.variants(found))


def test_what_is_missing_is_listed_once_with_its_targets(found):
    text = show.missing(found).markdown()
    assert text.count("| dynamic-int8 (failed) | cpu/torch, cpu/onnxruntime |") == 1
    assert "| float16 (unsupported) | cpu/onnxruntime |" in text


def test_a_complete_run_says_that_nothing_is_missing(found):
    complete = dataclasses.replace(found, rows=tuple(row for row in found.rows if row.state == "measured"))
    assert "None:" in repr(show.missing(complete))


def test_a_recipe_that_was_left_out_is_named_with_the_reason(found):
    study = found.study.model_copy(update={"notes": ("float16: no hardware support on this CPU",)})
    assert "float16: no hardware" in show.missing(dataclasses.replace(found, study=study)).markdown()


def test_equal_machines_are_described_once(found):
    assert repr(show.environment(found)).count(examples.CPU) == 1


def test_model_files_have_their_whole_hash(found):
    assert examples.digest("channels-50", "torch") in repr(show.model_files(found))


def test_steps_link_to_their_pages_beside_the_report(found):
    assert 'href="steps/1-baseline.html"' in show.steps(found).html()
    assert "(steps/4-benchmark-cpu-torch.html)" in show.steps(found).markdown()


def test_the_command_is_shown_as_it_was_given(found):
    assert "shrinkkit run digits-cnn" in repr(show.commands(found))


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    """A run that was also measured on another machine, on one of its targets."""
    return results.load(examples.write_two_machines(tmp_path_factory.mktemp("run"), targets=("cpu/torch",)))


def test_one_table_has_a_row_for_each_variant_and_place(found, away):
    table = show.variants(away)
    places = [(cells[0].text, cells[1].text) for cells in table.rows]
    assert len(set(places)) == len(places)
    assert set(places) == {(row.variant, away.where(row.target)) for row in away.rows} | {
        ("your module", away.where(target)) for target in away.targets
    }
    assert f"cpu/torch @ {examples.HERE}: unchanged model 30.2 ms" in table.note
    assert f"cpu/torch @ {examples.ELSEWHERE}: unchanged model 7.55 ms" in table.note
    assert examples.HERE not in "".join(view(found)._repr_html_() for view in VIEWS)


def test_a_row_unfolds_into_its_causes_predictions_layers_timing_and_file(found):
    table = show.variants(found)
    facts = {
        (cells[0].text, cells[1].text): dict(details) for cells, details in zip(table.rows, table.details, strict=True)
    }
    slow = facts["float16", "cpu/torch"]
    assert "in float16" in slow["Slow because"].text
    assert slow["Predictions"].text == "0 worse, 0 better, of 2,000 examples"
    assert slow["Latency by layer"].href == "#per-layer-latency-cpu-torch"
    assert slow["Timing"].text == "30 blocks, noise floor \N{PLUS-MINUS SIGN}0.2 %"
    assert slow["File"].href == "variants/float16/model.torchscript.pt"
    assert "Slow because" not in facts["channels-50", "cpu/torch"]
    assert facts["dynamic-int8", "cpu/torch"] == {}


def test_a_row_unfolds_into_its_workloads(found):
    record = found.measured["cpu/torch"]
    (point,) = [p for p in record.sweep if (p.variant, p.threads) == ("static-int8", 1)]
    named = dataclasses.replace(point, workload="decode 1 token after 64", tokens=8)
    record = dataclasses.replace(record, sweep=(named, *record.sweep))
    table = show.variants(dataclasses.replace(found, measured={**found.measured, "cpu/torch": record}))
    facts = [dict(details).get("Workloads") for details in table.details]
    (cell,) = filter(None, facts)
    assert cell.text.startswith(f"decode 1 token after 64: {formats.rounded(point.latency_ms)} ms")
    assert cell.text.endswith(f"{1e3 * 8 / point.latency_ms.value:,.0f} tokens / s")
    assert cell.href == "#tail-latency-memory-and-throughput-cpu-torch"


def test_a_variant_over_budget_is_not_marked_as_the_best(found):
    rows = [
        r if r.variant == "baseline" else dataclasses.replace(r, accuracy_verdict="over budget") for r in found.rows
    ]
    assert "(best)" not in repr(show.variants(dataclasses.replace(found, rows=tuple(rows))))


def test_the_heading_of_a_fidelity_task_says_so(found):
    assert "<h2>Accuracy vs. speed</h2>" in show.tradeoff(found).html()
    unlabelled = dataclasses.replace(found, metric="top-1 agreement with the original")
    assert "<h2>Fidelity vs. speed</h2>" in show.tradeoff(unlabelled).html()


def test_every_machine_has_its_environment(away):
    text = repr(show.environment(away))
    assert "Linux-synthetic" in text
    assert "Linux-elsewhere" in text


def test_the_title_says_which_machine_measured_what(away):
    said = f"on {examples.HERE} (cpu/torch, cpu/onnxruntime); {examples.ELSEWHERE} (cpu/torch)"
    assert said in repr(show.title(away))


def test_figures_of_several_machines_name_the_machine(away):
    for view in (show.speedup_breakdown, figures.tradeoff, show.missing):
        text = view(away).html()
        assert examples.HERE in text
        assert f"cpu/torch @ {examples.ELSEWHERE}" in text


def test_the_command_of_another_machine_is_shown_with_its_targets(away):
    text = repr(show.commands(away))
    assert f"Then on {examples.ELSEWHERE}" in text
    assert "shrinkkit run reports/synthetic --only benchmark --target cpu/torch" in text


@pytest.fixture(scope="module")
def record(found):
    return found.measured["cpu/onnxruntime"]


@pytest.fixture(scope="module")
def latencies(record):
    return {m.variant: m.latency for m in record.measurements if m.latency}


@pytest.fixture(scope="module")
def on_torch():
    return examples.target_record("cpu/torch")


def test_a_task_is_shown_with_its_splits():
    made = tiny_task()
    text = repr(made.shown())
    assert "(4, 1, 8, 8) float32" in text
    assert "128 train, 32 calibration, 30 validation, 42 test" in text


def test_layers_are_listed_by_the_work_they_do():
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 9))
    lines = repr(modules.layers_table(model, {"0": 6, "2": 18})).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["2", "0"]
    assert "75.0 %" in lines[2]


def test_no_fine_tuning_is_said():
    assert "No fine-tuning" in repr(figures.training((), metric="accuracy"))
    assert "0.962" in repr(figures.training((0.91, 0.962), metric="accuracy"))


def test_files_name_the_runtime_that_has_none_and_why(found):
    text = repr(show.files(found.variants["float16"]))
    assert "562 kB" in text
    assert "no file: ONNX Runtime has no float16 kernels" in text


def test_an_audit_has_every_layer_and_the_reason_for_those_left_alone(found):
    made = show.layer_report(found.variants["channels-50-static-int8"])
    assert len(made.rows) == len(examples.LAYERS)
    assert "16 of 18 layers lost channels" in made.caption
    assert "17 of 18 run in int8 in torch" in made.caption
    assert "its outputs are the model's; in `skip`" in repr(made)


def test_trials_say_why_a_variant_was_not_loaded():
    trial = {"error": "", "load_ms": 41.0, "first_call_ms": None, "file_sha256": "ab" * 32}
    loaded = {
        "half": SimpleNamespace(**trial),
        "gone": SimpleNamespace(**{**trial, "error": "There is no such variant."}),
    }
    text = repr(session.loaded_table(loaded))
    assert "41.0 ms" in text
    assert "There is no such variant." in text


def test_accuracies_are_paired_with_the_baseline(record):
    found = {m.variant: m.accuracy for m in record.measurements if m.accuracy}
    text = repr(accuracy.accuracies(found, {"broken": "scores are not finite"}))
    assert "2000 examples" in text
    assert "reference" in text
    assert "scores are not finite" in text
    assert "2000 examples" in repr(accuracy.fidelity({"torch": found["channels-50"]}))


def test_audits_of_a_run_survive_an_empty_one(found):
    empty = dataclasses.replace(found, variants={})
    assert len(show.layer_reports(found).parts) == len(found.variants) - 1
    assert "No variant was made" in repr(show.layer_reports(empty))


def test_what_became_smaller_is_a_factor():
    assert "4.00\N{MULTIPLICATION SIGN}" in repr(show.shrunk(parameters=[800, 200], macs=[100, 50]))


def test_trades_name_speed_and_score_with_their_intervals(record):
    one = next(one for one in record.measurements if one.variant == "static-int8")
    text = repr(show.trades({"int8": (one.latency, one.accuracy)}))
    assert "2.16" in text
    assert one.accuracy.change_cell().plain() in text


def test_noise_leaves_the_score_and_the_interval_of_the_speed_up(record):
    one = next(one for one in record.measurements if one.variant == "static-int8")
    text = repr(show.trades({"int8": (dataclasses.replace(one.latency, verdict="too noisy"), one.accuracy)}))
    assert "machine too noisy (2." in text
    assert one.accuracy.change_cell().plain() in text


def test_latencies_show_the_verdict_the_control_and_contention(latencies):
    text = repr(show.latencies(latencies))
    assert "faster" in text
    assert "load average 1.7 on 2 cores" in text
    assert "median speed-up" in text
    assert "noise floor" in text
    assert "Nothing to time" in repr(show.latencies({}))


def test_a_machine_that_was_not_steady_is_named(latencies):
    shaky = dataclasses.replace(latencies["channels-50"], steady=False, verdict="too noisy")
    text = repr(show.latencies({"shaky": shaky}))
    assert "ended before times were steady" in text
    assert "too noisy" in text


def test_distributions_are_pictures_or_a_sentence(latencies):
    assert "<svg" in figures.distributions(latencies).html()
    assert "No timing samples" in repr(figures.distributions({}))


def test_the_factor_of_a_runtime_is_shown_where_there_is_one(record):
    assert "onnxruntime" in repr(show.runtime(record.runtime))
    assert "no file" in repr(show.runtime(None))


def test_timings_of_a_run_survive_an_empty_one(found):
    assert len(show.timings(found).parts) == 3 * len(found.measured)
    assert "No target was measured" in repr(show.timings(dataclasses.replace(found, measured={})))


def test_a_speed_up_is_a_cell_with_interval_and_verdict(latencies):
    cell = cells.speedup(latencies["static-int8"].speedup, latencies["static-int8"].verdict)
    assert (cell.text, cell.tone) == ("2.16\N{MULTIPLICATION SIGN}", "good")
    assert cell.aside.endswith("faster")


def test_timings_of_several_machines_name_the_machine(tmp_path):
    away = results.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    text = repr(show.timings(away))
    assert len(away.measured) == 3
    for target in away.measured:
        assert f"All comparisons on {away.where(target)}" in text


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (show.predictions, "narrow-int8"),
        (show.layer_latency, "QuantizeLinear"),
        (show.deployment, "662 samples"),
    ],
)
def test_every_target_has_its_own_part(found, part, says):
    text = part(found).html()
    for target in found.targets:
        assert f"<h3>{target}</h3>" in text
    assert says in text


@pytest.mark.parametrize("part", PARTS)
def test_a_run_without_measurements_says_so(found, part):
    assert "No" in repr(part(dataclasses.replace(found, measured={})))


@pytest.mark.parametrize("part", PARTS)
def test_parts_of_several_machines_are_headed_by_target_and_machine(part, tmp_path):
    away = results.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    text = part(away).html()
    assert len(away.targets) == 3
    for target in away.targets:
        assert f"<h3>{away.where(target)}</h3>" in text


def test_layers_on_another_machine_run_as_their_audit_says(tmp_path):
    away = results.load(examples.write_two_machines(tmp_path / "run", targets=("cpu/torch",)))
    own, other = (repr(show.layer_latency(away.of(name))) for name in away.machines)
    in_torch = own[: own.index("cpu/onnxruntime @")]
    assert in_torch.count(" int8") > 20
    assert other.count(" int8") == in_torch.count(" int8")


@given(st.integers(662, 2000), st.integers(0, 99), st.sampled_from(list(PERCENTILES)))
def test_a_quantile_is_exceeded_by_no_more_calls_than_its_share(count, seed, share):
    samples = [random.Random(seed + i).choice((1.0, 2.0, 3.0, 50.0)) for i in range(count)]
    value = show.percentile(samples, share)
    assert value in samples
    assert sum(ms > value for ms in samples) <= (1 - share) * len(samples)


@pytest.mark.parametrize(("share", "fewest"), [(0.5, 1), (0.9, 64), (0.99, 662)])
def test_a_quantile_is_quoted_from_a_number_of_calls_on(share, fewest):
    assert show.percentile([1.0] * (fewest - 1), share) is None
    assert show.percentile([1.0] * fewest, share) == 1.0


def test_tails_say_how_many_calls_are_wanting(on_torch):
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in show.latency_percentiles(on_torch).rows}
    assert rows["static-int8"][2] == "n/a (needs \N{GREATER-THAN OR EQUAL TO} 662 samples, 180 taken)"
    assert rows["static-int8"][0].endswith("ms")
    # The baseline took turns with every variant, so of its calls there are enough.
    assert rows["baseline"][2].endswith("ms")


def test_memory_is_told_against_the_baseline(on_torch):
    table = show.memory(on_torch)
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["baseline"][:3] == ["14.0 MB", "9.00 MB", "reference"]
    assert rows["static-int8"][2].startswith("0.54")
    assert "190 MB" in table.note
    assert "dynamic-int8" not in rows


def test_without_a_count_of_the_baseline_memory_has_no_ratio(on_torch):
    measurements = tuple(
        dataclasses.replace(m, memory=None) if m.variant == "baseline" else m for m in on_torch.measurements
    )
    table = show.memory(dataclasses.replace(on_torch, measurements=measurements))
    titles = [column.title for column in table.columns]
    assert "peak memory" in titles
    assert "vs baseline" not in titles


def test_why_memory_could_not_be_counted_is_told(on_torch):
    measurements = tuple(
        dataclasses.replace(m, memory=None, notes=("Peak memory: there is no /proc.",)) for m in on_torch.measurements
    )
    assert "there is no /proc" in show.memory(dataclasses.replace(on_torch, measurements=measurements)).note


def test_throughput_is_drawn_over_the_batch_sizes_and_told_in_words(on_torch):
    shown, table = show.throughput(on_torch).parts
    assert "static-int8: 315 at 1, 488 at 8, 559 at 32" in shown.alt
    assert len(shown.svg) < 20_000
    assert "narrow-int8.stage-1" not in shown.alt
    text = repr(table)
    assert "The batch is fixed at 8" in text
    assert "reference" in text
    assert len(table.rows) == len(on_torch.sweep)


def test_without_other_batches_a_sentence_says_so(on_torch):
    assert "No other workload, batch size" in repr(show.throughput(dataclasses.replace(on_torch, sweep=())))


def test_workloads_are_rows_with_their_name_and_tokens_per_second_and_leave_the_chart(on_torch):
    points = [p for p in on_torch.sweep if (p.batch_size, p.threads) == (8, 1)]
    named = [dataclasses.replace(p, workload="decode 1 token after 64", tokens=8, threads=2) for p in points]
    before = show.throughput(on_torch).parts[0].alt
    shown, table = show.throughput(dataclasses.replace(on_torch, sweep=(*named, *on_torch.sweep))).parts
    assert shown.alt == before
    titles = [column.title for column in table.columns]
    assert "tokens / s" in titles
    cells = dict(zip(titles, table.rows[0], strict=True))
    assert cells["workload"].text == "decode 1 token after 64"
    assert cells["tokens / s"].aside
    assert cells["tokens / s"].key == f"{1e3 * 8 / named[0].latency_ms.value:.6g}"


def test_other_threads_alone_are_a_table_without_a_picture(on_torch):
    only = tuple(point for point in on_torch.sweep if point.threads == 1)
    assert only
    (table,) = show.throughput(dataclasses.replace(on_torch, sweep=only)).parts
    assert len(table.rows) == len(only)


def test_a_run_that_measured_nothing_lists_its_reasons_under_a_title(found):
    rows = tuple(Row(row.variant, row.target, "not run", "it was interrupted") for row in found.rows)
    table = show.variants(dataclasses.replace(found, rows=rows, measured={}))
    assert [(column.title, column.number) for column in table.columns] == [
        ("variant", False),
        ("target", False),
        ("result", False),
    ]
