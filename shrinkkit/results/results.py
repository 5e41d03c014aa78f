"""A run folder read back: its rows and verdict, as a table for the terminal and as one JSON file.

Reads records only, and needs no torch. For tables and pictures in notebooks see `show`.
"""

import dataclasses
import json
import os
import textwrap
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.formats import TIMES
from shrinkkit.results.conclusions import factors, verdict
from shrinkkit.results.table import Results, Row, recipe_of

WIDTH = 100
_HEAD = ("variant", "target", "size", "score", "change", "latency", "vs FP32", "vs today")
_SAMPLES = ("reference_samples_ms", "candidate_samples_ms", "null_samples_ms", "scores", "png")


def table(results: Results) -> str:
    """Return the rows as plain text of at most 100 columns, each that failed or was refused with its cause below it.

    Where there are several machines, each has a part of its own, below its name.
    """
    named = any(Place.parse(target).machine for target in results.targets)
    parts = [f"{name}:\n{_lines(results.of(name))}" for name in results.machines] if named else [_lines(results)]
    drop = formats.points(results.budget.accuracy_drop) if results.is_fraction else f"{results.budget.accuracy_drop:g}"
    legend = (
        f"score: {results.metric}. change: against FP32 on the same target, with its 95 % interval; ok within the "
        f"budget of {drop}, no beyond it, ? cannot tell. vs FP32: speed on the same target; vs today: against your own "
        "module, called in PyTorch on the same device; ? undecided."
    )
    return "\n\n".join([*parts, textwrap.fill(legend, WIDTH)])


def _lines(results: Results) -> str:
    lines = [(row, _cells(row, results)) for row in results.rows if not row.intermediate]
    widths = [max(len(cells[i]) for cells in [_HEAD, *(cells for _, cells in lines)]) for i in range(len(_HEAD))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    spare = WIDTH - sum(widths) - len(gap) * (len(widths) - 1)
    widths[0] = max(8, widths[0] + min(0, spare))
    text = [_line(_HEAD, widths, gap), gap.join("-" * width for width in widths)]
    for row, cells in lines:
        text.append(_line(cells, widths, gap))
        if row.state != "measured":
            text += textwrap.wrap(
                f"{row.state}: {row.reason}", WIDTH, initial_indent="    ", subsequent_indent="    ", max_lines=4
            )
    return "\n".join(text)


def write_json(results: Results, path: str | os.PathLike[str]) -> None:
    """Write `results` to `path` for machines: rows, verdict, factors and records, without raw samples.

    The raw samples stay in the run folder's measurements/.
    """
    found = verdict(results)
    data = {
        "schema_version": SCHEMA_VERSION,
        "name": results.name,
        "task": results.task,
        "metric": results.metric,
        "started": results.status.started if results.status else None,
        "command": results.status.command if results.status else None,
        "study": results.study.model_dump(mode="json", exclude={"recipes": {"__all__": {"where"}}})
        if results.study
        else None,
        "verdict": {
            "sentence": found.sentence,
            "kind": found.kind,
            "variant": found.row.variant if found.row else None,
            "target": found.row.target if found.row else None,
        },
        "machines": results.machines,
        "rows": [
            {
                "recipe": recipe_of(results, row.variant),
                "machine": results.machine(row.target),
                **dataclasses.asdict(row),
            }
            for row in results.rows
        ],
        "factors": [dataclasses.asdict(one) for one in factors(results)],
        "variants": {name: dataclasses.asdict(variant) for name, variant in results.variants.items()},
        "targets": {name: _without_samples(dataclasses.asdict(record)) for name, record in results.measured.items()},
        "steps": [dataclasses.asdict(step) for step in results.status.steps] if results.status else [],
        "notes": results.notes,
    }
    store.write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _cells(row: Row, results: Results) -> tuple[str, ...]:
    mark = {"within budget": " ok", "over budget": " no", "cannot tell": " ?", "": ""}[row.accuracy_verdict]
    shares = results.is_fraction
    change = ""
    if row.difference:
        value = formats.change(row.difference.value, is_fraction=shares, unit=False)
        change = f"{value} {formats.interval(row.difference, is_fraction=shares)}{mark}"
    return (
        row.variant,
        str(row.place.target),
        formats.size(row.size_bytes) if row.size_bytes is not None else "",
        formats.score(row.accuracy.value, is_fraction=shares) if row.accuracy else "",
        change,
        formats.milliseconds(row.latency_ms.value) if row.latency_ms else "",
        _speed_text(row, torch=False),
        _speed_text(row, torch=True),
    )


def _speed_text(row: Row, *, torch: bool) -> str:
    """Return a row's speed-up as far as its verdict allows it to be quoted, '' where there is none."""
    speed, timing = (row.speedup_today, row.timing_today) if torch else (row.speedup, row.timing)
    if speed is None:
        return "1" if row.variant == BASELINE and row.state == "measured" else ""
    if timing == "too noisy":
        return "noisy"
    text = formats.digits(speed.value) + TIMES
    return "same" if timing == "same" else text + ("?" if timing == "undecided" else "")


def _line(cells: tuple[str, ...], widths: list[int], gap: str) -> str:
    shown = [cell if len(cell) <= width else cell[: width - 1] + "…" for cell, width in zip(cells, widths, strict=True)]
    aligned = [
        text.ljust(width) if i < 2 else text.rjust(width)
        for i, (text, width) in enumerate(zip(shown, widths, strict=True))
    ]
    return gap.join(aligned).rstrip()


def _without_samples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_samples(inner) for key, inner in value.items() if key not in _SAMPLES}
    return [_without_samples(inner) for inner in value] if isinstance(value, (list, tuple)) else value
