"""All runs of a folder on one page: what became of each, its verdict, and the best variants over all of them."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from urllib.parse import quote

from shrinkkit.core import store
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.store import PART
from shrinkkit.display import formats
from shrinkkit.display.picture import COLOURS, FAINT, INK, MARKERS, Picture, canvas, picture
from shrinkkit.display.tables import Cell, Column, Table
from shrinkkit.errors import InvalidInput, ShrinkkitError, brief
from shrinkkit.report import figures
from shrinkkit.results import conclusions, pareto, table
from shrinkkit.results import folders as run_folders
from shrinkkit.results.conclusions import TONES, TRUSTED
from shrinkkit.results.table import Results, Row

TEMPLATE = Path(__file__).parent / "template"
PAGE = "index.html"
_LEFT = ("study.json", "status.json", "variants", "measurements")
"""What makes a folder one of a run, whole or not; pages alone, such as a report that was passed on, do not."""
_MARK = '<meta name="generator" content="shrinkkit index">'
_COLUMNS = (
    Column("run"),
    Column("status"),
    Column("verdict"),
    Column("speed-up", True),
    Column("times smaller", True),
    Column("change", True),
    Column("task"),
    Column("machine"),
    Column("started"),
    Column("files"),
)


@dataclass(frozen=True)
class Run:
    """A run folder as the index lists it."""

    name: str
    status: str
    """`finished`, `with failures`, `interrupted`, `by hand`, or `unreadable`."""
    reason: str
    """Why it is not finished, or cannot be read; '' if it is finished."""
    found: Results | None
    """None where it cannot be read."""
    files: tuple[str, ...]
    """Of report.html, report.md and results.json, those that are there."""


def write(reports: Path) -> Path:
    """Write the index of all runs in `reports`, whole or not at all, and return its path.

    A run that cannot be read has a row that says why; it keeps none of the others out.

    Raises:
        InvalidInput: `reports` is no folder, or it has an index.html that is none of shrinkkit's.
    """
    if not reports.is_dir():
        raise InvalidInput(
            f"`reports` must be a folder of runs, but there is no {reports}. Make one with `shrinkkit run`."
        )
    path = reports / PAGE
    if path.is_file() and _MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise InvalidInput(f"{path} is no page of shrinkkit's, so it is left as it is. Move it away to have an index.")
    for left in reports.glob(f".{PAGE}.*{PART}"):
        # That of a run which ends at this moment may still be under way.
        if time.time() - left.lstat().st_mtime > 60:
            left.unlink(missing_ok=True)
    store.write_text(path, page(read(reports)))
    return path


@contextmanager
def listed(run: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Write the index beside the run folder `run` once what is done meanwhile has ended, however it ends.

    Args:
        run: The run folder.
        warn: Called with a line if the index could not be written.
    """
    try:
        yield
    finally:
        try:
            write(run.resolve().parent)
        except (InvalidInput, OSError) as error:
            warn(f"The page of all runs was not written: {brief(error)}.")


def read(reports: Path) -> tuple[Run, ...]:
    """Return the runs in the folder `reports`, the latest first; empty if there are none."""
    folders = sorted(p for p in reports.glob("*") if p.is_dir() and any((p / left).exists() for left in _LEFT))
    return tuple(sorted((_run(folder) for folder in folders), key=_started, reverse=True))


def _run(folder: Path) -> Run:
    files = tuple(name for name in ("report.html", "report.md", "results.json") if (folder / name).is_file())
    try:
        found = table.load(folder)
        conclusions.verdict(found)
    except ShrinkkitError:
        notes = run_folders.read(folder).notes if (folder / "study.json").exists() else ()
        reason = notes[0] if notes else "It holds no study, only what was left of a run."
        return Run(folder.name, "unreadable", reason, None, files)
    except Exception as error:
        # Whatever lies in one folder, the other runs must stay listed.
        reason = f"{type(error).__name__}: {brief(error)}.".replace(str(folder), folder.name)
        return Run(folder.name, "unreadable", reason, None, files)
    return Run(folder.name, *_ended(found), found, files)


def _ended(found: Results) -> tuple[str, str]:
    """Return how a run ended, and why not well."""
    measured = any(row.state == "measured" for row in found.rows)
    if found.notes and not measured:
        return "unreadable", found.notes[0]
    if found.status and not found.study:
        return "with failures", found.notes[0]
    steps = found.status.steps if found.status else ()
    # The step of the report is under way while it is made, so that it says nothing.
    left = [s.name for s in steps if s.state in ("running", "interrupted", "pending") and s.notebook != "5-report"]
    if left:
        return "interrupted", f"It ended at {left[0]}, or is still there. The same command goes on."
    if failed := table.failures(found):
        names = list(dict.fromkeys(row.variant for row in failed))
        return "with failures", f"{', '.join(names)}: {brief(ValueError(failed[0].reason))}"
    return ("finished", "") if found.status else ("by hand", "Its notebooks were run one by one.")


def _started(run: Run) -> str:
    return run.found.status.started if run.found and run.found.status else ""


def page(runs: Sequence[Run]) -> str:
    """Return the index as one HTML page that needs nothing outside itself; without scripts it is complete, unsorted."""
    style, script = ((TEMPLATE / name).read_text(encoding="utf-8") for name in ("style.css", "runs.js"))
    if not runs:
        body = (
            '<p class="sk-line">There is no run here yet. Make one with <code>shrinkkit run digits-cnn</code>; '
            "this page then lists it.</p>"
        )
    else:
        body = f'<p class="sk-line">{_summary(runs)}</p>{_filter(runs)}{_table(runs)}{_fronts(runs)}'
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark">\n{_MARK}\n<link rel="icon" href="data:,">\n'
        f"<title>All runs · shrinkkit</title>\n<style>\n{style}\n</style>\n</head>\n<body>\n"
        '<a class="sk-skip" href="#main">Skip to the content</a>\n'
        '<header class="sk-header"><strong>shrinkkit</strong><span>all runs</span></header>\n'
        f'<main id="main" class="sk-index">\n<h1>All runs</h1>\n{body}\n</main>\n'
        '<footer class="sk-footer">Made by shrinkkit. Whatever this page shows is inside this file.</footer>\n'
        f"<script>\n{script}\n</script>\n</body>\n</html>\n"
    )


def _summary(runs: Sequence[Run]) -> str:
    states = {state: sum(run.status == state for run in runs) for state in dict.fromkeys(run.status for run in runs)}
    return f"{formats.counted(len(runs), 'run')}: " + ", ".join(f"{n} {state}" for state, n in states.items()) + "."


def _filter(runs: Sequence[Run]) -> str:
    options = "".join(f"<option>{state}</option>" for state in dict.fromkeys(run.status for run in runs))
    return (
        '<form id="filter" class="sk-filter" role="search" hidden onsubmit="return false">'
        '<label>Find <input id="find" type="search"></label> '
        f'<label>Status <select id="status"><option value="">all</option>{options}</select></label> '
        '<output id="count" aria-live="polite"></output></form>'
    )


def _table(runs: Sequence[Run]) -> str:
    head = "".join(
        f'<th scope="col"{" class=sk-number" if column.number else ""}>{column.title}</th>' for column in _COLUMNS
    )
    body = "".join(f'<tr data-status="{run.status}">{_row(run)}</tr>' for run in runs)
    return (
        '<div class="sk-scroll" role="region" tabindex="0" aria-label="Runs"><table class="sk-table" id="runs">'
        f"<caption><span>Every run of this folder</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
        '</table></div><p class="sk-note">Speed-up, size and change are those of the variant that the verdict names, '
        "against PyTorch today on the same machine and against the baseline's file; brackets are 95 % intervals. A "
        "speed without a sure timing is left out.</p>"
    )


def _row(run: Run) -> str:
    found = run.found
    address = quote(run.name)
    links = "<br>".join(
        f'<a href="{address}/{name}" aria-label="{name} of {escape(run.name)}">{name}</a>' for name in run.files
    )
    name = escape(run.name)
    title = f'<a href="{address}/report.html">{name}</a>' if "report.html" in run.files else name
    tone = {"finished": "", "by hand": "sk-quiet", "unreadable": "sk-bad"}.get(run.status, "sk-warning")
    started = _started(run)
    made = conclusions.verdict(found) if found and run.status != "unreadable" else None
    row = made.row if made else None
    verdict = made.kind if made and row else "no verdict" if made else ""
    aside = f"{row.variant}\non {row.target}" if row else made.headline if made else ""
    cells = (
        _cell(run.status, run.status, run.reason, tone),
        _cell(verdict, verdict, aside, f"sk-{TONES[made.kind]}" if made else ""),
        *_figures(found, row),
        *(_cell(text, text) for text in ((found.task, ", ".join(found.machines)) if found else ("", ""))),
        _cell(started, f"{started[:10]} {started[11:16]}".strip(), "UTC" if started else ""),
    )
    return f'<th scope="row" data-key="{name}">{title}</th>{"".join(cells)}<td data-key="{len(run.files)}">{links}</td>'


def _figures(found: Results | None, row: Row | None) -> tuple[str, ...]:
    """Return the cells of speed, size and change of the verdict's variant, empty where they are not known."""
    empty = _cell("", "", number=True)
    if found is None or row is None:
        return empty, empty, empty
    speed = change = size = empty
    if row.speedup_today and row.timing_today in TRUSTED:
        value = row.speedup_today
        speed = _cell(f"{value.value:g}", formats.times(value.value), formats.interval(value), number=True)
    before = found.row(BASELINE, row.target).size_bytes
    if before and row.size_bytes:
        ratio = before / row.size_bytes
        size = _cell(f"{ratio:g}", formats.times(ratio), f"to {formats.size(row.size_bytes)}", number=True)
    if row.difference:
        shares = found.is_fraction
        text = formats.change(row.difference.value, is_fraction=shares)
        between = formats.interval(row.difference, is_fraction=shares)
        change = _cell(f"{row.difference.value:g}", text, f"{between}\n{found.metric}", number=True)
    return speed, size, change


def _cell(key: str, text: str, aside: str = "", tone: str = "", *, number: bool = False) -> str:
    names = " ".join(filter(None, ["sk-number" if number else "", tone]))
    small = f" <small>{escape(aside)}</small>" if aside else ""
    return (
        f'<td data-key="{escape(key)}"{f" class={chr(34)}{names}{chr(34)}" if names else ""}>{escape(text)}{small}</td>'
    )


def fronts(runs: Sequence[Run]) -> dict[tuple[str, str, str], tuple[tuple[Run, Row], ...]]:
    """Return the best variants over all runs, by task, metric and machine, which must not be mixed.

    What is best of each is what no other variant beats in speed, accuracy and size together; the fastest comes first.
    """
    groups: dict[tuple[str, str, str], list[tuple[Run, Row]]] = {}
    for run in runs:
        for row in run.found.rows if run.found else ():
            key = (run.found.task, run.found.metric, run.found.machine(row.target)) if run.found else ("", "", "")
            groups.setdefault(key, []).append((run, row))
    best = {}
    for key, pairs in groups.items():
        of = {id(row): run for run, row in pairs}
        chosen = tuple((of[id(row)], row) for row in pareto.front([row for _, row in pairs]))
        if chosen:
            best[key] = chosen
    return best


def _fronts(runs: Sequence[Run]) -> str:
    best = fronts(runs)
    if not best:
        return "<h2>The best over all runs</h2><p>No variant has a speed that its timing could tell.</p>"
    words = (
        "What no other variant of the same task on the same machine beats in speed, accuracy and size together. "
        "Tasks and machines are never compared with each other."
    )
    tables = []
    for (task, metric, machine), chosen in best.items():
        tables.append(f"<h3>{escape(task)} on {escape(machine)}</h3>{_best(chosen, metric)}")
    return f"<h2>The best over all runs</h2><p>{words}</p>{replace(_drawn(runs, best), png='').html()}{''.join(tables)}"


def _best(chosen: Sequence[tuple[Run, Row]], metric: str) -> str:
    rows = tuple(
        (
            Cell(f"{i}. {row.variant}", href=_address(run)),
            Cell(run.name),
            Cell(str(row.place.target)),
            Cell(formats.times(row.speedup_today.value), formats.interval(row.speedup_today))
            if row.speedup_today
            else Cell("reference", tone="quiet"),
            Cell(formats.size(row.size_bytes or 0)),
            Cell(
                formats.change(row.difference.value, is_fraction=run.found.is_fraction),
                formats.interval(row.difference, is_fraction=run.found.is_fraction),
            )
            if row.difference and run.found
            else Cell("reference", tone="quiet"),
        )
        for i, (run, row) in enumerate(chosen, 1)
    )
    columns = (
        Column("variant"),
        Column("run"),
        Column("target"),
        Column("vs PyTorch today", True),
        Column("on disk", True),
        Column(f"change of {metric}", True),
    )
    return Table("The numbers are those of the picture", columns, rows, folded=False).html()


def _address(run: Run) -> str:
    return f"{quote(run.name)}/report.html" if "report.html" in run.files else ""


def _drawn(runs: Sequence[Run], best: dict[tuple[str, str, str], tuple[tuple[Run, Row], ...]]) -> Picture:
    """Return one small picture for each task and machine: speed against accuracy, the front's points numbered."""
    columns = min(3, len(best))
    lines = -(-len(best) // columns)
    with canvas(9.2, 2.9 * lines + 0.2) as figure:
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes in grid.flat[len(best) :]:
            axes.set_axis_off()
        for axes, ((task, metric, machine), chosen) in zip(grid.flat, best.items(), strict=False):
            others = [
                row
                for run in runs
                if run.found and (run.found.task, run.found.metric) == (task, metric)
                for row in run.found.rows
                if run.found.machine(row.target) == machine and row.speedup_today and row.difference
                if row.timing_today in TRUSTED and not row.intermediate
            ]
            shares = all(run.found.is_fraction for run, _ in chosen if run.found)
            scale, own = (100 if shares else 1), [row for _, row in chosen]
            x = [row.speedup_today.value for row in (*others, *own) if row.speedup_today]
            axes.scatter(*_points(others, scale), s=14, color=INK, alpha=0.35, marker=MARKERS[0], linewidth=0)
            axes.scatter(*_points(own, scale), s=42, color=COLOURS[0], marker=MARKERS[1])
            for i, at in enumerate(zip(*_points(own, scale), strict=True), 1):
                axes.annotate(str(i), at, xytext=(5, 4), textcoords="offset points")
            axes.set_title(f"{task}\n{machine}", loc="left")
            axes.set_ylabel(f"change of {metric}{', points' if shares else ''}")
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.margins(y=0.15)
            axes.grid(color=FAINT)
            figures.speed_axis(axes, [*x, 1.0])
            axes.tick_params(axis="x", labelsize=7)
        words = " ".join(
            f"{task} on {machine}: " + ", ".join(_in_words(i, run, row) for i, (run, row) in enumerate(chosen, 1)) + "."
            for (task, _, machine), chosen in best.items()
        )
        return picture(
            figure,
            f"Speed-up against PyTorch today and change of accuracy of the best variants. {words}",
            "Right is faster, up is more accurate. Numbered squares are the Pareto-optimal variants, named below. "
            "Small dots are the others that were measured, those over their budget included.",
        )


def _points(rows: Sequence[Row], scale: float) -> tuple[list[float], list[float]]:
    """Return speed-ups and changes of accuracy; the baseline's change is 0."""
    speeds = [row.speedup_today.value if row.speedup_today else 1.0 for row in rows]
    return speeds, [scale * row.difference.value if row.difference else 0.0 for row in rows]


def _in_words(number: int, run: Run, row: Row) -> str:
    speed = formats.times(row.speedup_today.value) if row.speedup_today else formats.times(1.0)
    return f"{number} {row.variant} of {run.name} at {speed} and {formats.size(row.size_bytes or 0)}"
