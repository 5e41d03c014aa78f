"""All runs of a folder on one page: status, conclusion, and the Pareto-optimal variants over all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from shrinkkit.core import store
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.run_folder import RunFolder
from shrinkkit.core.store import PART
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.tables import Cell, Heading, Shown, Table
from shrinkkit.errors import InvalidInput, ShrinkkitError, brief
from shrinkkit.report import figures, show
from shrinkkit.results import folders, results
from shrinkkit.results.results import CONCLUSIVE, Results, Row
from shrinkkit.results.verdict import KINDS, TONES, decide

TEMPLATE = Path(__file__).parent / "template"
PAGE = "index.html"
_MARK = '<meta name="generator" content="shrinkkit index">'
_TONES = {"finished": "", "by hand": "quiet", "unreadable": "bad"}
_FILES = {"md": "report.md", "json": "results.json"}
_TEXT = ("status", "conclusion", "task", "machine", "started", *_FILES)
DELTA = "\N{GREEK CAPITAL LETTER DELTA}"
_RUNS_NOTE = (
    "Speed-up, size and change of the metric are the best variant's, against PyTorch on the same machine and the "
    "baseline's file, with 95 % CIs. Inconclusive speed-ups are left out."
)


@dataclass(frozen=True)
class Run:
    """A run folder as the index lists it."""

    name: str
    status: str
    """`finished`, `with failures`, `interrupted`, `by hand`, or `unreadable`."""
    reason: str
    """Why it is not finished, or cannot be read; '' if it is finished."""
    results: Results | None
    """None if it cannot be read."""
    files: tuple[str, ...]
    """The existing ones of report.html, report.md and results.json."""


Fronts = dict[tuple[str, str, str], tuple[tuple[Run, Row], ...]]


def write(reports: Path) -> Path:
    """Write the index of all runs in `reports`, atomically, and return its path.

    A run that cannot be read has a row with the reason. Raises InvalidInput if `reports` is no folder, or its
    index.html was not written by shrinkkit.
    """
    if not reports.is_dir():
        raise InvalidInput(f"`reports` must be a folder of runs, but there is no {reports}. Make a run first.")
    path = reports / PAGE
    if path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise InvalidInput(f"{path} was not written by shrinkkit, so it is not overwritten. Move it away.")
    for partial in reports.glob(f".{PAGE}.*{PART}"):
        # A newer one may belong to a run that ends at this moment.
        if time.time() - partial.lstat().st_mtime > 60:
            partial.unlink(missing_ok=True)
    store.write_text(path, page(read(reports)))
    return path


@contextmanager
def listed(run: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Write the index next to the run folder `run` when the block ends, even with an error; `warn` gets a failure."""
    try:
        yield
    finally:
        try:
            write(run.resolve().parent)
        except (InvalidInput, OSError) as error:
            warn(f"The page of all runs was not written: {brief(error)}.")


def read(reports: Path) -> tuple[Run, ...]:
    """Return the runs in the folder `reports`, the latest first; empty if there are none."""

    def is_run(folder: RunFolder) -> bool:
        # A report alone, such as one that was passed on, is no run.
        return any(path.exists() for path in (folder.study, folder.status, folder.variants, folder.measurements))

    paths = [path for path in sorted(reports.glob("*")) if path.is_dir() and is_run(RunFolder(path))]
    return tuple(sorted(map(_run, paths), key=_started, reverse=True))


def _run(path: Path) -> Run:
    folder = RunFolder(path)
    files = tuple(p.name for p in (folder.report, folder.report_markdown, folder.results) if p.is_file())
    try:
        loaded = results.load(path)
        decide(loaded)
    except ShrinkkitError:
        notes = folders.read(path).notes if folder.study.exists() else ()
        reason = notes[0] if notes else "It has no study, only parts of a run."
        return Run(path.name, "unreadable", reason, None, files)
    except Exception as error:
        # One broken folder must not hide the other runs.
        reason = f"{type(error).__name__}: {brief(error)}.".replace(str(path), path.name)
        return Run(path.name, "unreadable", reason, None, files)
    return Run(path.name, *_status(loaded), loaded, files)


def _status(loaded: Results) -> tuple[str, str]:
    """Return the status of a run, and the reason if it is not finished."""
    if loaded.notes and not any(row.state == "measured" for row in loaded.rows):
        return "unreadable", loaded.notes[0]
    if loaded.status and not loaded.study:
        return "with failures", loaded.notes[0]
    steps = loaded.status.steps if loaded.status else ()
    # The step of the report is still running while it writes the index.
    states = ("running", "interrupted", "pending")
    unfinished = [step.name for step in steps if step.state in states and step.notebook != "5-report"]
    if unfinished:
        return "interrupted", f"Interrupted at {unfinished[0]}, or still running. The same command resumes it."
    if failed := results.failures(loaded):
        names = list(dict.fromkeys(row.variant for row in failed))
        return "with failures", f"{', '.join(names)}: {brief(ValueError(failed[0].reason))}"
    return ("finished", "") if loaded.status else ("by hand", "Created from notebooks.")


def _started(run: Run) -> str:
    return run.results.status.started if run.results and run.results.status else ""


def page(runs: Sequence[Run]) -> str:
    """Return the index as one self-contained HTML page; only sorting and filtering need its script."""
    import jinja2

    states = [run.status for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    names = ("runs.html.j2", "style.css", "page.js", "tables.js")
    texts = {name: (TEMPLATE / name).read_text(encoding="utf-8") for name in names}
    # What comes from folders is escaped by the tables.
    template = jinja2.Template(texts["runs.html.j2"], trim_blocks=True, keep_trailing_newline=True)
    table = tables.table("Runs", [_row(run) for run in runs], _RUNS_NOTE, text=_TEXT, folded=False)
    html: str = template.render(
        mark=_MARK,
        style=texts["style.css"],
        script=texts["page.js"] + texts["tables.js"],
        runs=runs,
        summary=f"{formats.counted(len(runs), 'run')}: {counts}.",
        table=replace(table, facet="status"),
        fronts=_fronts(runs),
    )
    return html


def _row(run: Run) -> tables.Row:
    loaded, started = run.results, _started(run)
    links = {name: f"{quote(run.name)}/{name}" for name in run.files}
    return {
        "run": Cell(run.name, href=links.get("report.html", ""), key=run.name),
        "status": Cell(run.status, run.reason, _TONES.get(run.status, "warning"), key=run.status),
        **(_conclusion(loaded) if loaded and run.status != "unreadable" else {}),
        "task": loaded.task if loaded else "",
        "machine": ", ".join(loaded.machines) if loaded else "",
        "started": Cell(f"{started[:10]} {started[11:16]}".strip(), "UTC" if started else "", key=started),
        **{text: Cell(text if name in links else "", href=links.get(name, "")) for text, name in _FILES.items()},
    }


def _conclusion(loaded: Results) -> tables.Row:
    """Return the kind of the verdict, and speed-up, size and change of the best variant where they are known."""
    verdict = decide(loaded)
    row = verdict.row
    aside = f"{row.variant}\non {row.target}" if row else verdict.headline
    conclusion = Cell(KINDS.get(verdict.kind, "no conclusion"), aside, TONES[verdict.kind], key=verdict.kind)
    speed = size = change = Cell("")
    if row and (ratio := row.speedup_today) and row.timing_today in CONCLUSIVE:
        speed = replace(cells.speedup(ratio, row.timing_today), aside=formats.interval(ratio), key=f"{ratio.value:g}")
    if row and row.size_bytes and (before := loaded.row(BASELINE, row.target).size_bytes):
        smaller = before / row.size_bytes
        size = Cell(formats.times(smaller), f"to {formats.size(row.size_bytes)}", key=f"{smaller:g}")
    if row and row.difference:
        cell = cells.change(row.difference, is_fraction=loaded.is_fraction)
        gain = row.gain.value if row.gain else 0
        change = replace(cell, aside=f"{cell.aside}\n{loaded.metric_title}", key=f"{gain:g}")
    return {"conclusion": conclusion, "speed-up": speed, "size reduction": size, f"{DELTA} metric": change}


def fronts(runs: Sequence[Run]) -> Fronts:
    """Return the Pareto-optimal variants over all runs by task, metric and machine, fastest first."""
    groups: dict[tuple[str, str, str], list[tuple[Run, Row]]] = {}
    for run, loaded in ((run, run.results) for run in runs if run.results):
        for row in loaded.rows:
            groups.setdefault((loaded.task, loaded.metric, loaded.machine(row.target)), []).append((run, row))
    best: Fronts = {}
    for key, pairs in groups.items():
        runs_by_row = {id(row): run for run, row in pairs}
        if front := results.pareto_front([row for _, row in pairs]):
            best[key] = tuple((runs_by_row[id(row)], row) for row in front)
    return best


def _fronts(runs: Sequence[Run]) -> list[Shown]:
    """Return a chart and a table of the Pareto-optimal variants of each task and machine."""
    parts: list[Shown] = []
    for (task, metric, machine), pairs in fronts(runs).items():
        others = [
            row
            for loaded in (run.results for run in runs)
            if loaded and (loaded.task, loaded.metric) == (task, metric)
            for row in loaded.rows
            if loaded.machine(row.target) == machine and row.speedup_today and row.difference
            if row.timing_today in CONCLUSIVE and not row.intermediate
        ]
        title, best = f"{task} on {machine}", [row for _, row in pairs]
        fraction = all(run.results.is_fraction for run, _ in pairs if run.results)
        chart = figures.pareto(title, best, others, metric=metric, is_fraction=fraction)
        parts += [Heading(title), replace(chart, png=""), _front(pairs)]
    return parts


def _front(pairs: Sequence[tuple[Run, Row]]) -> Table:
    rows: list[tables.Row] = []
    for i, (run, row) in enumerate(pairs, 1):
        link = f"{quote(run.name)}/report.html" if "report.html" in run.files else ""
        names = {"variant": Cell(f"{i}. {row.variant}", href=link), "run": Cell(run.name)}
        rows.append({**names, **(show.objectives(row, run.results) if run.results else {})})
    return tables.table("Numbers refer to the chart", rows, text=("run", "target"), folded=False)
