"""The summary card of a report: the recommended variant, its figures and file, the next best ones, and warnings."""

from pathlib import Path

from shrinkkit.core.run_folder import README, RunFolder
from shrinkkit.display import cells, formats, tables
from shrinkkit.display.tables import Cell, Download, Figures, Several, Shown, Warnings
from shrinkkit.report import show
from shrinkkit.results import cards, verdict
from shrinkkit.results.results import Results, Row


def card(results: Results, run: Path) -> Several:
    """Return the summary of the run folder `run`: verdict, figures, the model file, runners-up, and warnings."""
    decided = verdict.decide(results)
    parts: list[Shown] = [decided.statement()]
    if decided.row:
        parts += [_figures(decided.row, decided.kind, results), _download(decided.row, results, RunFolder(run))]
    if decided.runners_up:
        rows = [{"variant": row.variant, **show.objectives(row, results)} for row in decided.runners_up]
        parts.append(tables.table("Next best within the budget", rows, text=("target",)))
    return Several((*parts, *([Warnings(decided.warnings)] if decided.warnings else [])))


def _figures(row: Row, kind: str, results: Results) -> Figures:
    factor, _, sizes = verdict.size(row, results).partition(" (")
    cells_of = [("file size", Cell(factor, sizes.rstrip(")")))]
    if row.speedup_today:
        speed = cells.speedup(row.speedup_today, row.timing_today).text
        cells_of.insert(0, ("speed-up over PyTorch", Cell(speed, "\n".join(verdict.factors(row, results)))))
    changes = {f"change of {results.metric_title}": row.difference, "change on corrupted inputs": row.robustness}
    for title, difference in changes.items():
        if difference:
            change = cells.change(difference, is_fraction=results.is_fraction)
            cells_of.append((title, Cell(change.text, f"95 % CI {change.aside}")))
    budget = Cell(verdict.KINDS[kind], tone=verdict.TONES[kind])
    return Figures((*cells_of, (f"budget: {results.budget_text()}", budget)))


def _download(row: Row, results: Results, run: RunFolder) -> Download:
    at, variant = row.place.target, results.variants[row.variant]
    file = next(file for file in variant.files if file.runtime == at.runtime)
    folder, record = RunFolder("").variant(row.variant), results.measured[row.target]
    return Download(
        (folder / file.path).as_posix(),
        tuple((folder / path).as_posix() for path in file.beside),
        formats.size(file.size_bytes),
        file.sha256,
        cards.snippet(run.variant(row.variant), file, device=at.device, threads=record.environment.threads),
        (folder / README).as_posix(),
    )
