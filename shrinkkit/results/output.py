"""The results of a run as a table for the terminal and as one JSON file."""

import dataclasses
import json
import os
import textwrap
from typing import Any

from shrinkkit.core import store
from shrinkkit.core.store import SCHEMA_VERSION
from shrinkkit.display.tables import Cell
from shrinkkit.results.breakdown import breakdown
from shrinkkit.results.faults import faults
from shrinkkit.results.results import Results, missing, target_table
from shrinkkit.results.verdict import decide

WIDTH = 100
RULE = "\N{BOX DRAWINGS LIGHT HORIZONTAL}"
_SAMPLES = ("reference_samples_ms", "candidate_samples_ms", "control_samples_ms", "scores", "replicates", "png")


def table(results: Results, *, width: int = WIDTH) -> str:
    """Return a table of at most `width` columns for each target, and the reasons of rows without figures below."""
    tables = [f"{results.where(target)}\n{_table(results, target, width)}" for target in results.targets]
    reasons = [
        textwrap.fill(f"{name} ({', '.join(places)}) {state}: {reason}", width, subsequent_indent="  ", max_lines=4)
        for (state, name, reason), places in (missing(results) | faults(results)).items()
    ]
    legend = (
        f"score: {results.metric_title}. change: vs. FP32 on the same target, with 95 % CI; ok: within the budget of "
        f"{results.budget_text()}, no: over it, ?: inconclusive. vs FP32: speed-up on the same target; vs PyTorch: "
        "over your module in PyTorch on the same device; ?: inconclusive."
    )
    return "\n\n".join([*tables, *(["\n".join(reasons)] if reasons else []), textwrap.fill(legend, width)])


_LESS = ("vs FP32", "size", "score", "latency")
"""Columns to leave out of a table that is too wide, first to last; then names go on in the next line."""


def _table(results: Results, target: str, width: int) -> str:
    """Return the table of one target: in a narrow terminal without intervals, then without some columns."""
    table = target_table(results, target)
    rows = [row for row in table.rows if not row[-1].wide]
    forms = [
        [[column.title, *(text(row[i]) for row in rows)] for i, column in enumerate(table.columns)]
        for text in (Cell.plain, lambda cell: cell.text)
    ]
    forms += [[column for column in forms[1] if column[0] not in _LESS[:count]] for count in range(1, len(_LESS) + 1)]
    columns = next((form for form in forms if sum(_width(column) + 2 for column in form) - 2 <= width), forms[-1])
    names, *figures = columns
    room = max(8, width - sum(_width(column) + 2 for column in figures))
    lines = []
    for name, *texts in zip(names, *figures, strict=True):
        first, *rest = textwrap.wrap(name, room) or [""]
        cells = [text.rjust(_width(column)) for text, column in zip(texts, figures, strict=True)]
        lines += ["  ".join([first.ljust(min(room, _width(names))), *cells]).rstrip(), *rest]
    lines.insert(1, RULE * max(map(len, lines)))
    if left_out := [column[0] for column in forms[0] if column[0] not in {c[0] for c in columns}]:
        lines.append(textwrap.fill(f"Without {', '.join(left_out)}: the terminal is too narrow.", width))
    return "\n".join(lines)


def _width(column: list[str]) -> int:
    return max(map(len, column))


def write_json(results: Results, path: str | os.PathLike[str]) -> None:
    """Write the results as JSON to `path`."""
    store.write_text(path, as_json(results))


def as_json(results: Results) -> str:
    """Return rows, verdict, speed-up breakdown and records as JSON, without the raw samples of measurements/."""
    verdict = decide(results)
    status, row = results.status, verdict.row
    stated = ("name", "task", "metric", "higher_is_better", "task_notes", "machines", "notes")
    data = {
        "schema_version": SCHEMA_VERSION,
        **{name: getattr(results, name) for name in stated},
        "faults": [
            {"variant": name, "targets": places, "state": state, "reason": reason}
            for (state, name, reason), places in faults(results).items()
        ],
        "started": status.started if status else None,
        "command": status.command if status else None,
        "study": results.study.to_dict() if results.study else None,
        "verdict": {
            "sentence": verdict.sentence,
            "kind": verdict.kind,
            "variant": row.variant if row else None,
            "target": row.target if row else None,
        },
        "rows": [
            {"recipe": results.recipe(r.variant), "machine": results.machine(r.target), **dataclasses.asdict(r)}
            for r in results.rows
        ],
        "breakdown": [dataclasses.asdict(each) for each in breakdown(results)],
        "variants": {name: dataclasses.asdict(variant) for name, variant in results.variants.items()},
        "targets": {name: _without_samples(dataclasses.asdict(record)) for name, record in results.measured.items()},
        "steps": [dataclasses.asdict(step) for step in status.steps] if status else [],
    }
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _without_samples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_samples(inner) for key, inner in value.items() if key not in _SAMPLES}
    return [_without_samples(inner) for inner in value] if isinstance(value, (list, tuple)) else value
