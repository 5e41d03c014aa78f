"""A synthetic run folder, for tests of what reads one. Every number in it is made up; none was measured."""

import dataclasses
import hashlib
import json
import math
import random

from shrinkkit.core import evidence, machines, robustness, store
from shrinkkit.core.estimate import Estimate
from shrinkkit.core.evidence import PairedSamples
from shrinkkit.core.machines import Environment
from shrinkkit.core.measurement import (
    Accuracy,
    ClassScore,
    Comparison,
    Conditions,
    Disturbance,
    LayerTime,
    Measurement,
    Memory,
    Point,
    Regression,
    Scores,
    TargetRecord,
)
from shrinkkit.core.robustness import (
    ATTACKS,
    CLEAN,
    OWN,
    TRANSFERRED,
    Calibration,
    Condition,
    NumericCheck,
    Robustness,
    RobustnessRecord,
)
from shrinkkit.core.run_folder import RunFolder, Status, Step
from shrinkkit.core.studies import study
from shrinkkit.core.target import Target
from shrinkkit.core.variant import LayerAudit, LayerPrecision, ModelFile, Port, Variant

CPU = "Synthetic CPU (made up for tests)"
OTHER_CPU = "Made(R) Up(TM) 9000 CPU @ 3.00GHz"
TARGETS = ("cpu/torch", "cpu/onnxruntime")
NARROW = {"name": "narrow-int8", "stages": ({"prune-channels": {"ratio": 0.7}},), "precision": "static-int8"}
RECIPES = (
    "channels-50",
    "weights-80",
    "dynamic-int8",
    "static-int8",
    "float16",
    "channels-50-static-int8",
    NARROW,
)
LAYERS = ("stem", *(f"stages.{i}.conv{j}" for i in range(8) for j in (1, 2)), "head")

# name: source, bytes, parameters, MACs, share of zeros, lost examples, speed-up on torch, on ONNX Runtime
EXAMPLES = 2000
"""Of the test split: enough to tell a loss of one point with seven variants."""

MADE_UP = {
    "baseline": (None, 1_120_000, 278_000, 24_100_000, 0.0, 0, 1.0, 1.0),
    "channels-50": ("baseline", 292_000, 71_200, 6_300_000, 0.0, 2, 2.79, 3.31),
    "weights-80": ("baseline", 1_120_000, 278_000, 24_100_000, 0.797, 1, 1.0, 1.002),
    "static-int8": ("baseline", 301_000, 278_000, 24_100_000, 0.0, 1, 1.84, 2.16),
    "float16": ("baseline", 562_000, 278_000, 24_100_000, 0.0, 0, 0.31, None),
    "channels-50-static-int8": ("channels-50", 84_000, 71_200, 6_300_000, 0.0, 1, 4.97, 4.51),
    "narrow-int8.stage-1": ("baseline", 118_000, 27_400, 2_400_000, 0.0, 70, 4.4, 5.2),
    "narrow-int8": ("narrow-int8.stage-1", 36_000, 27_400, 2_400_000, 0.0, 78, 6.6, 8.1),
}

ENVIRONMENT = Environment(
    cpu=CPU,
    cores=2,
    affinity=(0, 1),
    cpu_flags=("avx2", "fma"),
    memory_bytes=8 * 2**30,
    gpu="",
    platform="Linux-synthetic",
    python="3.11.2",
    versions={"shrinkkit": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0"},
    threads=2,
    variables={"OMP_NUM_THREADS": "2"},
    governor="performance",
    clock_mhz=2400.0,
    load_average=0.4,
)
OTHER = dataclasses.replace(
    ENVIRONMENT, cpu=OTHER_CPU, cores=8, affinity=tuple(range(8)), threads=8, platform="Linux-elsewhere"
)
HERE, ELSEWHERE = machines.names(ENVIRONMENT)[0], machines.names(OTHER)[0]
PORTS = {"inputs": (Port("x", "float32", ("batch", 1, 8, 8)),), "outputs": (Port("y", "float32", ("batch", 10)),)}


def write_run(folder):
    """Write a synthetic run of seven recipes on two targets; one recipe failed, one is refused on one target."""
    settings = study("digits-cnn", recipes=RECIPES, targets=TARGETS, name="synthetic")
    text = settings.model_dump_json(indent=1, exclude={"recipes": {"__all__": {"where"}}})
    store.write_text(folder / "study.json", text)
    recipes = {recipe.name: recipe.settings() for recipe in settings.recipes}
    recipes["narrow-int8.stage-1"] = recipe_of(*recipes["narrow-int8"]["stages"])
    for name in MADE_UP:
        made = variant(name, recipes.get(name, recipe_of()))
        store.write(folder / "variants" / name / "variant.json", made)
        for file in made.files:
            (folder / "variants" / name / file.path).write_text(f"{name}:{file.runtime}")
    for target in TARGETS:
        write_measured(folder, target_record(target))
    store.write(folder / "status.json", status())
    return folder


def vouch(folder):
    """Have the run's status vouch for the files of its steps as they are now, whoever changed them."""
    found = store.read(folder / "status.json", Status)
    steps = [
        dataclasses.replace(s, files={p: store.sha256(folder / p) for p in s.files if (folder / p).is_file()})
        for s in found.steps
    ]
    store.write(folder / "status.json", dataclasses.replace(found, steps=tuple(steps)))


def write_measured(folder, record):
    """Write the benchmark of one target where a run folder keeps it, and return the path."""
    path = folder / RunFolder("").measurement(record.target, record.machine).as_posix()
    store.write(path, record)
    return path


def write_two_machines(folder, targets=TARGETS):
    """Write the synthetic run, with `targets` also measured on another machine, where compressing gives less."""
    write_run(folder)
    for target in targets:
        write_measured(folder, target_record(target, environment=OTHER))
    return folder


def status():
    """Return the status of a run in which dynamic-int8 failed."""
    steps = [Step("1-baseline", "1-baseline", "baseline", "done", 3.0)]
    for name in MADE_UP:
        if name != "baseline":
            kind = "3-quantize" if "8" in name and "stage" not in name and name != "weights-80" else "2-prune"
            steps.append(Step(f"{kind}-{name}", kind, name, "done", 4.2))
    cause = (
        "Unsupported: `dynamic_int8` found no layer to quantize: the model has one Linear. Use static-int8. (cell 5)"
    )
    steps.append(Step("3-quantize-dynamic-int8", "3-quantize", "dynamic-int8", "failed", 1.5, cause))
    for target in TARGETS:
        steps.append(Step(f"4-benchmark-{target.replace('/', '-')}", "4-benchmark", target, "done", 21.0))
    steps.append(Step("5-report", "5-report", "", "running"))
    return Status("shrinkkit run digits-cnn", "2026-01-02T03:04:05+00:00", tuple(steps))


def variant(name, recipe):
    """Return the record of one made-up variant."""
    source, size, parameters, macs, zeroed, *_ = MADE_UP[name]
    files = [
        model_file("torch", "torchscript", name, size, int(size * (1 - 0.7 * zeroed) * 0.93), 2e-7),
    ]
    refusals = {}
    if name == "float16":
        refusals["onnxruntime"] = (
            "ONNX Runtime has no float16 kernels on the CPU. Possible for float16: the torch runtime."
        )
    else:
        onnx = int(size * 0.97)
        files.append(model_file("onnxruntime", "onnx", name, onnx, int(onnx * 0.9), 3e-6))
    return Variant(
        name=name,
        task="digits-cnn",
        recipe=recipe,
        source=source,
        seed=0,
        files=tuple(files),
        refusals=refusals,
        parameters=parameters,
        macs=macs,
        sparsity=zeroed,
        audit=tuple(layer(name, i, recipe) for i in range(len(LAYERS))),
        validation_scores=(0.91, 0.962, 0.975) if recipe["stages"] else (),
        notes=("torch: the engine x86 was the fastest of those tried here.",)
        if "int8" in str(recipe["precision"])
        else (),
        environment=ENVIRONMENT,
    )


def recipe_of(*stages, precision="float32"):
    """Return what a record says of a recipe."""
    return {"stages": list(stages), "precision": {precision: {}}}


def model_file(runtime, kind, name, size, compressed, deviation):
    """Return the record of one made-up model file."""
    path = {"torchscript": "model.torchscript.pt"}.get(kind, f"model.{kind}")
    return ModelFile(
        runtime,
        path,
        (),
        kind,
        size,
        compressed,
        digest(name, runtime),
        **PORTS,
        max_relative_error=deviation,
        tolerance=1e-3,
    )


def layer(name, index, recipe):
    """Return the audit of one made-up layer."""
    narrow = any("prune-channels" in stage for stage in recipe["stages"]) and 0 < index < len(LAYERS) - 1
    int8 = "static-int8" in recipe["precision"]
    head = LAYERS[index] == "head"
    runs = LayerPrecision("int8") if int8 and not head else LayerPrecision("float32", "in `skip`" if int8 else "")
    if name == "float16":
        runs = LayerPrecision("float16")
    return LayerAudit(
        layer=LAYERS[index],
        kind="Linear" if head else "Conv2d",
        parameters_before=16_000,
        parameters=4_000 if narrow else 16_000,
        channels_before=10 if head else 32,
        channels=16 if narrow else 10 if head else 32,
        zeroed=MADE_UP[name][4],
        precision={"torch": runs} if name == "float16" else {"torch": runs, "onnxruntime": runs},
        kept_because="its outputs are the model's" if head and recipe["stages"] else "",
    )


def digest(*parts):
    """Return a made-up hash that is the same in every run."""
    return hashlib.sha256(":".join(parts).encode()).hexdigest()


def target_record(target, environment=ENVIRONMENT):
    """Return the benchmark of one target, with a measurement for each variant of the study."""
    runtime = Target.parse(target).runtime
    onnx, other = runtime == "onnxruntime", environment != ENVIRONMENT
    base_ms = (23.3 if onnx else 30.1) / (4 if other else 1)
    cpu = environment.cpu
    found = []
    for name, (_, _, _, _, _, lost, *speeds) in MADE_UP.items():
        # Elsewhere compressing gives the square root of what it gives here.
        speed = speeds[onnx] and speeds[onnx] ** (0.5 if other else 1)
        if speed is None:
            found.append(Measurement(name, target, "ONNX Runtime has no float16 kernels on the CPU."))
            continue
        compared = None if name == "baseline" else comparison(name, runtime, base_ms, speed, cpu=cpu)
        accuracy = judged(lost, None if name == "baseline" else EXAMPLES)
        found.append(
            Measurement(
                variant=name,
                target=target,
                error="",
                file_sha256=digest(name, runtime),
                load_ms=41.0,
                first_call_ms=88.0,
                accuracy=accuracy,
                latency=compared,
                memory=Memory(190_000_000, round(9e6 / speed), round(14e6 / speed), "resident"),
                layers=layer_times(name, base_ms / speed),
            )
        )
    found.insert(
        3, Measurement("dynamic-int8", target, "There is no such variant: the step that makes it did not end well.")
    )
    ratio = 30.1 / 23.3
    between = comparison("baseline", "torch", 30.1 / (4 if other else 1), ratio if onnx else 1.0, runtime, cpu=cpu)
    between = dataclasses.replace(between, reference="your module today")
    record = TargetRecord(
        task="digits-cnn",
        target=target,
        machine=machines.names(environment)[0],
        environment=environment,
        measurements=tuple(found),
        runtime=between,
        sweep=sweep(runtime, base_ms, cpu),
        notes=("load average 1.7 on 2 cores",) if onnx and not other else (),
    )
    return evidence.derive(record)


def layer_times(name, total_ms):
    """Return made-up times of the layers; an int8 variant also spends a tenth on conversions."""
    shares = [0.05, *(0.85 / 16 for _ in range(16)), 0.02]
    times = [LayerTime(layer, "conv2d", share * total_ms) for layer, share in zip(LAYERS, shares, strict=True)]
    if "int8" in name:
        times.append(LayerTime("", "QuantizeLinear", 0.1 * total_ms, converts=True))
    return (*times, LayerTime("", "add", 0.03 * total_ms))


def sweep(runtime, base_ms, cpu=CPU):
    """Return made-up timings at a batch of 1 and of 32, and on one thread; one point has no timing."""
    found = []
    for batch, threads, share in ((1, 2, 0.2), (32, 2, 3.6), (8, 1, 1.8)):
        found.append(Point("baseline", batch, threads))
        compared = comparison("static-int8", runtime, base_ms * share, 1.9)
        conditions = Conditions("cpu", cpu, runtime, runtime, threads, batch, digest("inputs", str(batch)))
        compared = dataclasses.replace(compared, conditions=conditions)
        found.append(Point("static-int8", batch, threads, latency=compared))
    return (*found, Point("channels-50", 32, 2, error="The batch is fixed at 8: tracing recorded it."))


def comparison(name, runtime, base_ms, speed, candidate_runtime=None, cpu=CPU):
    """Return a made-up paired timing, noisy in a reproducible way."""
    noise = random.Random(f"{name} {runtime}")
    slow, fast, null = (slots(noise, ms) for ms in (base_ms, base_ms / speed, base_ms))
    verdict = "same" if abs(speed - 1) < 0.01 else "faster" if speed > 1 else "slower"
    signs = ("load average 1.7 on 2 cores",) if runtime == "onnxruntime" and name == "weights-80" else ()
    return Comparison(
        reference="baseline",
        candidate=name,
        conditions=Conditions("cpu", cpu, runtime, runtime, 2, 8, digest("inputs")),
        candidate_runtime=candidate_runtime or runtime,
        speedup=around(speed, 0.006),
        median_speedup=around(speed * 0.99, 0.01),
        verdict=verdict,
        reference_ms=around(base_ms, 0.004),
        candidate_ms=around(base_ms / speed, 0.004),
        control_ratio=around(1.001, 0.004),
        reference_samples_ms=slow,
        candidate_samples_ms=fast,
        control_samples_ms=null,
        warmup_calls=15,
        steady=True,
        disturbance=Disturbance(1.9, 0.1, 0.0, 12.0, 1.7, signs),
        duration_s=2.4,
        seed=0,
    )


def slots(noise, ms, count=60):
    """Return made-up call times, three a slot, with a slow tail."""
    return tuple(
        tuple(round(ms * (1 + abs(noise.gauss(0, 0.01)) + (noise.random() > 0.96) * 0.3), 4) for _ in range(3))
        for _ in range(count)
    )


def around(value, share):
    """Return an estimate whose interval is `share` of the value to each side."""
    return Estimate(value, value * (1 - share), value * (1 + share))


def judged(lost, total):
    """Return made-up scores of all examples of which the baseline has 9 wrong and the variant `lost` more."""
    scores = tuple(float(i >= 9 + lost) for i in range(EXAMPLES))
    mean = sum(scores) / len(scores)
    half = 1.96 * math.sqrt(mean * (1 - mean) / EXAMPLES)
    difference = (
        Estimate(-lost / EXAMPLES, -lost / EXAMPLES - 0.002 - lost / 5000, -lost / EXAMPLES + 0.002 + lost / 5000)
        if total
        else None
    )
    worst = tuple(Regression(9 + i, "three", "three", "eight", 1.0, 0.0, PIXELS) for i in range(min(12, lost)))
    change = Estimate(-lost / 54, -lost / 54 - 0.03, -lost / 54 + 0.03) if total else None
    classes = (ClassScore("three", 54, around(0.97, 0.02), change), ClassScore("eight", 486, around(0.99, 0.01), None))
    return Accuracy(
        metric="accuracy",
        scores=scores,
        mean=Estimate(mean, mean - half, min(1.0, mean + half)),
        difference=difference,
        agreement=1 - lost / EXAMPLES,
        cosine=1 - lost / 9000,
        divergence=lost / 4000,
        classes=classes,
        worst_regressions=worst,
        regressions=lost,
        improvements=0,
    )


PIXELS = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAAAAADhZOFXAAAAHklEQVR42mP4r3A/Yf+C+Q8YGN47nG9Yf6CfgSwRAHsTJuEf2jD6"
    "AAAAAElFTkSuQmCC"
)
"""A made-up PNG of 8 x 8 pixels."""


def change_json(path, **changes):
    """Rewrite the top-level keys of a JSON file, to damage or alter a run folder in a test."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def blocks_of(*, speedup: float = 1.0, null: float = 1.0, noise: float = 0.002, count: int = 40, seed: int = 0):
    """Return blocks of four calls a slot, in which the candidate is `speedup` times as fast as the reference."""
    generator = random.Random(seed)

    def slots(ms: float):
        return [tuple(ms * math.exp(generator.gauss(0, noise)) for _ in range(4)) for _ in range(2 * count)]

    return PairedSamples(slots(5.0), slots(5.0 / speedup), slots(5.0 / null))


CLASSES = ("cat", "dog", "gull", "hare", "ibis")
CORRUPTIONS = (
    "Gaussian noise",
    "shot noise",
    "blur",
    "contrast",
    "brightness",
    "shift",
    "rotation",
    "occlusion",
    "JPEG",
)
LEVELS = (1, 3, 5)


def robustness_record(names, *, forgets="", target=TARGETS[0], count=200):
    """Return a record of variants of which each is a little less robust than the one before it.

    The variant `forgets` loses the class hare on corrupted inputs besides.
    """
    generator, classes = random.Random(0), [CLASSES[i % len(CLASSES)] for i in range(count)]
    draws = [[generator.random() for _ in range(count)] for _ in (*CORRUPTIONS, *ATTACKS)]

    def scores(number, severity, place, name):
        least = 0.02 + 0.07 * severity + 0.004 * number * (place % 3)
        right = [draw > least for draw in draws[place]]
        if name == forgets and severity:
            right = [one and of != "hare" for one, of in zip(right, classes, strict=True)]
        nothing = Estimate(0.0, 0.0, 0.0)
        values = tuple(map(float, right))
        return Scores(metric="accuracy", scores=values, mean=nothing, difference=None, bounds=(0.0, 1.0))

    def one(number, name):
        kinds = [(CLEAN, (0,)), *((kind, LEVELS) for kind in (*CORRUPTIONS, *ATTACKS))]
        conditions = tuple(
            Condition(
                kind, severity, scores(number, severity, max(0, place - 1), name),
                kind in ATTACKS, ("" if kind not in ATTACKS else TRANSFERRED if "int8" in name else OWN),
            )
            for place, (kind, levels) in enumerate(kinds)
            for severity in levels
        )  # fmt: skip
        figure = dataclasses.replace(scores(number, 1, 0, ""), metric="ECE", higher_is_better=False)
        bins = tuple((0.35 + 0.15 * i, min(1.0, 0.3 + 0.15 * i + 0.002 * number), 40) for i in range(5))
        checks = (
            NumericCheck("other places in the batch", 0.0, 0.0),
            NumericCheck("batch of 1", 3e-4 * number, 0.0),
            NumericCheck("a NaN", finite=number % 2 == 1),
        )
        calibration = Calibration((figure,), bins, 1.0 + 0.02 * number, 0.02)
        return Robustness(name, digest(name, target.partition("/")[2]), "", conditions, calibration, checks)

    measured = tuple(one(number, name) for number, name in enumerate(names))
    environment = machines.names(ENVIRONMENT)[0]
    stated = RobustnessRecord(
        "digits-cnn", target, environment, ENVIRONMENT, measured, count, ("A note.",), tuple(classes)
    )
    return robustness.derive(stated)
