"""The tables of a report: a whole run, from its verdict to the hashes of its files."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from shrinkkit.core import evidence, machines
from shrinkkit.core.machines import Environment
from shrinkkit.core.recipe import BASELINE
from shrinkkit.core.status import Step
from shrinkkit.core.target import Place
from shrinkkit.display import formats
from shrinkkit.display.tables import Cell, Column, Command, Heading, Several, Shown, Statement, Table
from shrinkkit.report import figures
from shrinkkit.results import conclusions
from shrinkkit.results.conclusions import TRUSTED
from shrinkkit.results.table import Results, Row

# What decides comes first: a phone shows four columns before it scrolls.
_COLUMNS = (
    Column("variant"),
    Column("on disk", True),
    Column("vs PyTorch today", True),
    Column("vs FP32 here", True),
    Column("change", True),
    Column("accuracy", True),
    Column("latency", True),
    Column("zeros", True),
    Column("parameters", True),
    Column("MACs", True),
)
_KINDS = {
    "within budget": ("Verdict: within budget", "good"),
    "cannot tell": ("Verdict: cannot tell", "warning"),
    "over budget": ("Verdict: over budget", "bad"),
    "none": ("Verdict", "warning"),
}


def title(found: Results) -> Heading:
    """Return the report's heading: the study's name, and what was compressed where."""
    made = (
        [row.variant for row in found.rows if row.target == found.targets[0] and not row.intermediate]
        if found.targets
        else []
    )
    count = formats.counted(len([name for name in made if name != BASELINE]), "variant")
    where = " and ".join(found.targets) or "no target"
    if len(found.machines) > 1:
        places = {name: map(Place.parse, found.of(name).targets) for name in found.machines}
        where = "; ".join(
            f"{name} ({', '.join(str(place.target) for place in there)})" for name, there in places.items()
        )
    when = f" Started {found.status.started[:16].replace('T', ' ')} UTC." if found.status else ""
    return Heading(found.name, f"{count} of {found.task}, on {where}.{when}", level=1)


def verdict(found: Results) -> Statement:
    """Return the verdict in large type, with what else must be known."""
    made = conclusions.verdict(found)
    label, tone = _KINDS[made.kind]
    return Statement(made.headline, made.remarks, tone, label)


def variants(found: Results) -> Several:
    """Return the table of variants of each target, failed and refused ones included.

    Where there are several machines, each has a section of its own, with its facts.
    """
    if not found.targets:
        return Several((Statement("No target was measured.", tone="warning"),))
    if len(found.machines) == 1:
        return Several(_tables(found))
    parts: list[Shown] = []
    for name in found.machines:
        part = found.of(name)
        parts += [Heading(_heading(part, name)), *_tables(part), *_software(part, folded=True)]
    return Several(tuple(parts))


def _heading(part: Results, name: str) -> str:
    """Return a machine's short name with the name that its hardware gives itself."""
    known = [record.environment for record in part.measured.values()]
    of = {machines.name(own, one.cores): own for one in known for own in (one.cpu, *one.gpu.split(", ")) if own}
    return f"{name}: {of[name]}" if name in of else name


def _tables(found: Results) -> tuple[Shown, ...]:
    """Return the table of variants at each place of one machine; its own verdict is marked."""
    best = conclusions.verdict(found).row
    tables: list[Shown] = []
    for target in found.targets:
        rows = [row for row in found.rows if row.target == target]
        cells = (*_today(found, target), *(_variant(row, found, chosen=row == best) for row in rows))
        columns = tuple(Column(found.metric, True) if column.title == "accuracy" else column for column in _COLUMNS)
        tables.append(
            Table(
                f"{found.where(target)}{_runtime(found, target)}",
                columns,
                cells,
                " ".join([_masked(rows), _contention(found, target)]).strip(),
                folded=False,
            )
        )
    return tuple(tables)


def missing(found: Results) -> Shown:
    """Return what has no numbers and why: failures first, then refusals, then notes about the folder."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for state in _TONES:
        for row in (row for row in found.rows if row.state == state):
            alike.setdefault((row.variant, state, row.reason), []).append(found.where(row.target))
    listed = tuple(
        (Cell(name), Cell(", ".join(targets)), Cell(state, tone=_TONES[state]), Cell(reason))
        for (name, state, reason), targets in alike.items()
    )
    shown: list[Shown] = []
    if listed:
        columns = (Column("variant"), Column("targets"), Column("state"), Column("why"))
        shown.append(Table(f"{formats.counted(len(listed), 'gap')}, with the reason", columns, listed))
    shown += [Statement(note, tone="warning") for note in found.notes]
    return Several(tuple(shown) or (Statement("Nothing is missing: every variant was measured on every target."),))


def factors(found: Results) -> Shown:
    """Return where the speed of each variant comes from, as a picture."""
    made = [
        replace(one, target=found.where(one.target))
        for one in conclusions.factors(found)
        if one.runtime or one.variant != BASELINE
    ]
    if not made:
        return Statement("No speed was measured, so there is nothing to take apart.", tone="warning")
    return figures.factors(made, [found.where(target) for target in found.targets])


def tradeoff(found: Results) -> Shown:
    """Return size, accuracy and speed of every variant in one picture."""
    return figures.tradeoff(found) or Statement("No variant has both a speed and an accuracy.", tone="warning")


def environment(found: Results) -> Several:
    """Return the machine and the software of each target's benchmark; equal ones are shown once.

    Where there are several machines, `variants` shows them with what was measured there.
    """
    if len(found.machines) > 1:
        return Several((Statement("Each machine is described under its name, below the variants that it measured."),))
    return Several(_software(found) or (Statement("No benchmark ended, so no machine is recorded.", tone="warning"),))


def _software(found: Results, *, folded: bool = False) -> tuple[Table, ...]:
    seen: dict[str, tuple[list[str], Environment]] = {}
    for target, record in found.measured.items():
        key = repr(
            (record.environment.cpu, record.environment.gpu, record.environment.versions, record.environment.variables)
        )
        seen.setdefault(key, ([], record.environment))[0].append(found.where(target))
    return tuple(
        replace(
            machines.environment_table(one), caption=f"Machine and software of {' and '.join(targets)}", folded=folded
        )
        for targets, one in seen.values()
    )


def model_files(found: Results) -> Table:
    """Return every model file with its size and its whole hash, and the seed it was made with."""
    rows = tuple(
        (
            Cell(name),
            Cell(file.path),
            Cell(formats.size(file.size_bytes)),
            Cell(str(made.seed), tone="quiet"),
            Cell(file.sha256),
        )
        for name, made in found.variants.items()
        for file in made.files
    )
    columns = (Column("variant"), Column("file"), Column("size", True), Column("seed", True), Column("SHA-256"))
    return Table(
        f"{formats.counted(len(rows), 'model file')} and their hashes",
        columns,
        rows,
        "Each file lies in variants/, in the folder of its variant.",
    )


def steps(found: Results) -> Shown:
    """Return the notebooks that were executed, how they ended, and links to them beside the report."""
    if found.status is None:
        return Statement("The notebooks were run by hand; no status was kept.")
    rows = tuple(
        (
            Cell(step.name, href=_page(step)),
            Cell(step.state, tone={"failed": "bad", "skipped": "bad"}.get(step.state, "quiet")),
            Cell(f"{step.duration_s:.1f} s"),
            Cell(step.error or step.note),
        )
        for step in found.status.steps
        if step.notebook != "5-report"
    )
    columns = (Column("notebook"), Column("state"), Column("took", True), Column("what went wrong"))
    return Table("Executed notebooks", columns, rows, folded=False)


def _page(step: Step) -> str:
    return f"steps/{step.name}.html" if step.state in ("done", "cached", "failed") and not step.note else ""


def commands(found: Results) -> Shown:
    """Return the command that reproduces the run, and those that measured more, such as on other machines."""
    if found.status is None:
        return Statement("The notebooks were run by hand, so there is no one command that repeats them.")
    seed = found.study.seed if found.study else 0
    own = Command(found.status.command, f"The seed is {seed}. The same run again, on any machine:")
    asked = found.study.targets if found.study else found.targets
    file = found.task if found.task.endswith(".py") else ""
    more = {name: [t for t in found.of(name).targets if t not in asked] for name in found.machines}
    others = [
        Command(
            f"shrinkkit run reports/{found.name} --only benchmark"
            + (f" --task {PurePath(file).name}" if file else "")
            + "".join(f" --target {Place.parse(target).target}" for target in targets),
            f"Then on {name}, with this run folder:",
        )
        for name, targets in more.items()
        if targets
    ]
    return Several((own, *others)) if others else own


_TONES = {"failed": "bad", "not run": "bad", "refused": "warning"}


def _variant(row: Row, found: Results, *, chosen: bool) -> tuple[Cell, ...]:
    aside = "the verdict" if chosen else "on the way to another" if row.intermediate else ""
    name = Cell(row.variant, aside, "good" if chosen else "quiet" if row.intermediate else "")
    if row.state != "measured":
        return name, Cell(f"{row.state}: {row.reason}", tone=_TONES[row.state], wide=True)
    shares = found.is_fraction
    return (
        name,
        Cell(formats.size(row.size_bytes or 0), f"{formats.size(row.compressed_bytes or 0)} zipped"),
        _speed(row, torch=True),
        _speed(row, torch=False),
        _change(row, shares),
        Cell(formats.score(row.accuracy.value, is_fraction=shares), formats.interval(row.accuracy, is_fraction=shares))
        if row.accuracy
        else Cell(""),
        Cell(formats.milliseconds(row.latency_ms.value), formats.interval(row.latency_ms))
        if row.latency_ms
        else Cell("not timed", tone="warning"),
        Cell(formats.percent(row.sparsity or 0)),
        Cell(formats.count(row.parameters or 0)),
        Cell(formats.count(row.macs or 0)),
    )


def _today(found: Results, target: str) -> tuple[tuple[Cell, ...], ...]:
    """Return the row of the user's own module, which the speed-ups of the first column are against."""
    record = found.measured.get(target)
    latency_ms = evidence.today_ms(record) if record else None
    if record is None or record.runtime is None or latency_ms is None:
        return ()
    form = {"eager": "as called in eager PyTorch", "compiled": "as called with torch.compile"}
    name = Cell("your module today", form.get(record.runtime.conditions.form, ""))
    latency = Cell(formats.milliseconds(latency_ms.value), formats.interval(latency_ms))
    empty = Cell("")
    return ((name, empty, Cell("reference", tone="quiet"), empty, empty, empty, latency, empty, empty, empty),)


def _change(row: Row, shares: bool) -> Cell:
    if row.difference is None:
        return Cell("reference", tone="quiet")
    tone = {"within budget": "good", "over budget": "bad"}.get(row.accuracy_verdict, "warning")
    value = formats.change(row.difference.value, is_fraction=shares, unit=False)
    verdict = "cannot tell: too few examples" if row.accuracy_verdict == "cannot tell" else row.accuracy_verdict
    return Cell(value, f"{formats.interval(row.difference, is_fraction=shares)}\n{verdict}", tone)


def _speed(row: Row, *, torch: bool) -> Cell:
    speed, timing = (row.speedup_today, row.timing_today) if torch else (row.speedup, row.timing)
    if speed is None:
        return Cell("reference", tone="quiet") if row.variant == BASELINE else Cell("not timed", tone="warning")
    tone = {"faster": "good", "slower": "bad", "same": "quiet"}.get(timing, "warning")
    shown = formats.times(speed.value) if timing in (*TRUSTED, "undecided") else "no verdict"
    return Cell(shown, f"{formats.interval(speed)}\n{timing}", tone)


def _runtime(found: Results, target: str) -> str:
    record = found.measured.get(target)
    baseline = found.row(BASELINE, target)
    if record is None or baseline.latency_ms is None:
        return ""
    text = f": the unchanged model takes {formats.milliseconds(baseline.latency_ms.value)} here"
    compared = record.runtime.conditions if record.runtime else None
    compared = compared or next((m.latency.conditions for m in record.measurements if m.latency), None)
    text += (
        f", for a batch of {compared.batch_size} on {formats.counted(compared.threads, 'thread')}" if compared else ""
    )
    return text


def _masked(rows: Sequence[Row]) -> str:
    """Return a sentence about variants full of zeros whose files did not shrink for it; '' if there are none."""
    before = next((row.size_bytes for row in rows if row.variant == BASELINE), None)
    said = [
        f"{row.variant}: {formats.percent(row.sparsity)} of the weights are zero, yet the file is no smaller, "
        f"because zeros are stored like any other number; zipped it takes {formats.size(row.compressed_bytes or 0)}."
        for row in rows
        if before and row.sparsity and row.sparsity > 0.2 and row.size_bytes and row.size_bytes > 0.9 * before
    ]
    return " ".join(said)


def _contention(found: Results, target: str) -> str:
    signs = found.measured[target].notes if target in found.measured else ()
    return f"Signs of contention while it was measured: {'; '.join(signs)}." if signs else ""
