"""The commands `list`, `doctor`, `new` and `notebooks`: what this machine and this package offer to start from."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument

from shrinkkit.cli import terminal
from shrinkkit.cli.terminal import Json, Reports
from shrinkkit.errors import InvalidInput

if TYPE_CHECKING:
    from shrinkkit.core.machines import Environment
    from shrinkkit.core.stages import Stage

GOVERNORS = ("performance", "unknown")
"""Of the CPU's clock: the one to measure with, and one that the system hides."""


def list_(
    kind: Annotated[Literal["tasks", "recipes", "transforms", "targets"] | None, Argument(help="What to list.")] = None,
    as_json: Json = False,
) -> None:
    """List available tasks, recipes, transforms and targets, or one of them."""
    from shrinkkit.tasks.bundled import TASKS

    every = {"tasks": lambda: dict(TASKS), "recipes": _recipes, "transforms": _transforms, "targets": _targets}
    entries = {name: entries_of() for name, entries_of in every.items() if kind in (None, name)}
    if as_json:
        terminal.print_json(entries[kind] if kind else entries)
        return
    if "tasks" in entries:
        entries["tasks"] |= {"my_task.py": "your own: `shrinkkit new my_task.py` writes one to start from"}
    if kind:
        terminal.print_rows(list(entries[kind].items()))
    else:
        terminal.print_sections({name.capitalize(): list(section.items()) for name, section in entries.items()})


def _recipes() -> dict[str, str]:
    from shrinkkit.core import studies
    from shrinkkit.core.recipe import BUILT_IN

    def summary(stage: "Stage") -> str:
        ratio = getattr(stage.settings, "ratio", None)
        return f"{stage.name} {ratio:.0%}" if ratio else stage.name

    recipes = {name: studies.read_recipe(name) for name in BUILT_IN}
    return {name: ", ".join([*map(summary, of.stages), of.precision.name]) for name, of in recipes.items()}


def _transforms() -> dict[str, str]:
    from shrinkkit.core import stages

    def summary(name: str) -> str:
        try:
            section = stages.transform(name).section
        except InvalidInput as error:
            return f"unavailable: {error}"
        defaults = {key: field.get_default() for key, field in section.model_fields.items()}
        settings = (f"{key}={v}" if isinstance(v, str | int | float) else key for key, v in defaults.items())
        help_line = (section.__doc__ or "").strip().partition("\n")[0]
        return f"{help_line} Settings: {', '.join(settings) or 'none'}.".strip()

    return {name: summary(name) for name in stages.names()}


def _targets() -> dict[str, str]:
    from shrinkkit.runtimes import registry

    reasons = registry.available()
    return {name: f"unavailable: {reason}." if reason else "available" for name, reason in reasons.items()}


@dataclasses.dataclass(frozen=True)
class Check:
    """What a run needs or a measurement depends on, and what to do where it is not as it should be."""

    name: str
    state: Literal["ok", "note", "failed"]
    """`failed` if no run could work."""
    text: str


def doctor(reports: Reports = Path("reports"), as_json: Json = False) -> None:
    """Check what this machine can do, and what to do about the rest; exit status 1 if no run could work."""
    from shrinkkit.core import machines
    from shrinkkit.runtimes import registry

    environment = machines.environment(machines.cores(), packages=registry.packages())
    targets, checks = _targets(), list(_checks(environment, reports))
    if "available" not in targets.values():
        checks.append(Check("targets", "failed", "none can run here; see what each lacks above"))
    if as_json:
        listed = [dataclasses.asdict(check) for check in checks]
        terminal.print_json({"machine": environment.to_dict(), "targets": targets, "checks": listed})
    else:
        machine = [(name.text.removesuffix(" at the end"), value.text) for name, value in environment.shown().rows]
        rows = [(check.name, check.state, check.text) for check in checks]
        terminal.print_sections({"Machine": machine, "Targets": list(targets.items()), "Checks": rows})
    raise typer.Exit(1 if any(check.state == "failed" for check in checks) else 0)


def _checks(environment: "Environment", reports: Path) -> Iterator[Check]:
    from shrinkkit.core import machines
    from shrinkkit.report import export

    slow = {
        "int8": "int8 files take forms that cannot saturate, and are slower than on a CPU with VNNI",
        "float16": "recipes in it are left out, because they are slow here; name them to measure them",
    }
    for precision, remedy in (slow | {"bfloat16": slow["float16"]}).items():
        if not environment.cpu_flags:
            yield Check(precision, "note", "the system hides the instruction sets: measure to see whether it is fast")
        elif machines.lacks(precision, environment.cpu_flags):
            yield Check(precision, "note", f"no arithmetic in it on this CPU: {remedy}")
        else:
            yield Check(precision, "ok", "this CPU has arithmetic in it")
    if environment.governor in GOVERNORS:
        yield Check("clock", "ok", f"CPU governor {environment.governor}")
    else:
        remedy = "timings are steadier after `sudo cpupower frequency-set -g performance`"
        yield Check("clock", "note", f"CPU governor {environment.governor}: {remedy}")
    busy = environment.load_average > environment.cores / 4
    remedy = ": stop other programs while models are timed" if busy else ""
    yield Check("load", "note" if busy else "ok", f"load average {environment.load_average:g}{remedy}")
    parent = next(path for path in (reports, *reports.absolute().parents) if path.exists())
    writable = parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)
    text = f"{reports} can be written" if writable else f"{parent} is no writable folder: choose one with `--reports`"
    yield Check("reports", "ok" if writable else "failed", text)
    try:
        yield Check("temporary files", "ok", tempfile.gettempdir())
        yield Check("templates", "ok", str(export.templates()))
    except FileNotFoundError:
        yield Check("temporary files", "failed", "no folder can be written: set TMPDIR to one")
    except InvalidInput as error:
        yield Check("templates", "failed", str(error))
    browser = next(filter(None, map(shutil.which, export.BROWSERS)), "")
    missing = "no Chromium, Chrome or Edge: `report --pdf` needs one, such as by `apt install chromium`"
    yield Check("PDF", "ok" if browser else "note", browser or missing)


def new(file: Annotated[Path, Argument(metavar="FILE.py", help="The file to write.")]) -> None:
    """Write a commented task file to start from."""
    from shrinkkit.tasks.bundled import TEMPLATE

    if file.suffix != ".py":
        raise InvalidInput(f"A task is a Python file, got {str(file)!r}. Name it like `my_task.py`.")
    if file.exists():
        raise InvalidInput(f"{file} exists already. Choose another name; nothing is overwritten.")
    shutil.copyfile(TEMPLATE, file)
    print(f"{file} written; it runs as it is: shrinkkit run {file}")


def notebooks(folder: Annotated[Path, Argument(metavar="DIR", help="Where to copy them.")]) -> None:
    """Copy the step notebooks out, to work in them."""
    from shrinkkit.pipeline import plan

    sources = sorted(plan.notebooks().glob("*.ipynb"))
    if existing := [source.name for source in sources if (folder / source.name).exists()]:
        names = ", ".join(existing)
        raise InvalidInput(f"{folder} has {names} already. Choose another folder; nothing is overwritten.")
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        shutil.copyfile(source, folder / source.name)
    print(f"{len(sources)} notebooks copied to {folder}; open them with: jupyter lab {folder}")
