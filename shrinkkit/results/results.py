"""A run folder read back: its rows and verdict, as a table for the terminal and as one JSON file.

Reads records only, and needs no torch. For tables and pictures in notebooks see `show`.
"""

import dataclasses
import io
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
_SAMPLES = ("reference_samples_ms", "candidate_samples_ms", "control_samples_ms", "scores", "png")


def table(results: Results, *, width: int = WIDTH) -> str:
    """Return the rows as plain text of at most `width` columns, with the reasons of those that have no numbers.

    Where there are several machines, each has a part of its own, below its name.
    """
    named = any(Place.parse(target).machine for target in results.targets)
    parts = (
        [f"{name}:\n{_lines(results.of(name), width)}" for name in results.machines]
        if named
        else [_lines(results, width)]
    )
    drop = formats.points(results.budget.accuracy_drop) if results.is_fraction else f"{results.budget.accuracy_drop:g}"
    legend = (
        f"score: {results.metric}. change: against FP32 on the same target, with its 95 % interval; ok within the "
        f"budget of {drop}, no beyond it, ? cannot tell. vs FP32: speed on the same target; vs today: against your own "
        "module, called in PyTorch on the same device; ? undecided."
    )
    return "\n\n".join([*parts, textwrap.fill(legend, width)])


def _lines(results: Results, width: int) -> str:
    from rich.console import Console
    from rich.table import Table

    rows = [row for row in results.rows if not row.intermediate]
    table = Table(box=None, pad_edge=False)
    for title in _HEAD:
        left, folds = title in ("variant", "target"), title in ("variant", "change")
        table.add_column(title, justify="left" if left else "right", no_wrap=not folds, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row, results))
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False, emoji=False)
    if console.measure(table, options=console.options.update(max_width=10 * width)).maximum > width:
        table.padding = (0, 1, 0, 0)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    for row in rows:
        if row.state != "measured":
            lines += ["", f"{row.variant} on {row.place.target}"]
            lines += textwrap.wrap(
                f"{row.state}: {row.reason}", width, initial_indent="    ", subsequent_indent="    ", max_lines=4
            )
    return "\n".join(lines)


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


def _without_samples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_samples(inner) for key, inner in value.items() if key not in _SAMPLES}
    return [_without_samples(inner) for inner in value] if isinstance(value, (list, tuple)) else value
