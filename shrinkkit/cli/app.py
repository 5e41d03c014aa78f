"""The commands, their groups and exit statuses, and what becomes of errors and signals."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer import Context, Option

from shrinkkit import __version__
from shrinkkit.cli import results, run, setup
from shrinkkit.errors import InvalidInput, ShrinkkitError, brief, nearest

TRACEBACK = "SHRINKKIT_TRACEBACK"
"""Environment variable that has the traceback of an unexpected error shown."""
EXIT_STATUS = """Exit status:

0 - every variant was made and measured wherever it can run

1 - a step failed, or the report could not be made; the report says which and why

2 - the command, a recipe, a study or a task is not valid; nothing was started

130 - interrupted; run the same command again to resume (143 after SIGTERM, 129 after SIGHUP)"""
VERIFY_EXIT_STATUS = """Exit status:

0 - every file that can run here gives its outputs

1 - a file differs, is damaged or does not run, or none can run here

2 - there is no such variant"""
VARIABLES = "Each option can be set by a variable too: `SHRINKKIT_RUN_EFFORT=quick` is `run --effort quick`."


class _Command(typer.core.TyperCommand):
    """A command that suggests one option, or one value of an option, for one that does not exist."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            if possible := getattr(error, "possibilities", None):
                error.possibilities = possible[:1]  # type: ignore[attr-defined]
            if choice := re.search(r"'(.*)' is not one of ('.*')", str(getattr(error, "message", ""))):
                close = nearest(choice[1], re.findall("'(.+?)'", choice[2]))
                error.message = f"{choice[0]}.{close}"  # type: ignore[attr-defined]
            raise


app = typer.Typer(
    name="shrinkkit",
    help=f"Make trained PyTorch models smaller and faster, and verify it.\n\n{VARIABLES}",
    epilog=EXIT_STATUS,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Runs": {"run": run.run, "tune": run.tune, "status": results.status, "report": run.report},
    "Results": {"show": results.show, "open": results.open_report, "index": results.index, "verify": results.verify},
    "Setup": {"list": setup.list_, "doctor": setup.doctor, "new": setup.new, "notebooks": setup.notebooks},
}
for _panel, _commands in _COMMANDS.items():
    for _name, _command in _commands.items():
        _epilog = {"run": EXIT_STATUS, "tune": EXIT_STATUS, "report": EXIT_STATUS, "verify": VERIFY_EXIT_STATUS}.get(
            _name
        )
        _help = {"run": run.RUN_HELP, "tune": run.TUNE_HELP}.get(_name)
        app.command(_name, cls=_Command, help=_help, epilog=_epilog, rich_help_panel=_panel)(_command)


def _print_version(value: bool) -> None:
    if value:
        print(f"shrinkkit {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: Context,
    version: Annotated[bool, Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Declare the options that go before a command, and check variables that stand for options."""
    command: Any = context.command
    for name, subcommand in command.commands.items():
        known = [one.envvar for one in subcommand.params if one.envvar]
        for variable in os.environ:
            if variable.startswith(_variable(name, "")) and variable not in known:
                raise InvalidInput(f"{variable} must be named after an option of `{name}`.{nearest(variable, known)}")


def _variable(command: str, option: str) -> str:
    return f"SHRINKKIT_{command}_{option.strip('-').replace('-', '_')}".upper()


def _program() -> Any:
    """Return the program, each option of which has a variable."""
    program: Any = typer.main.get_command(app)
    for name, command in program.commands.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                # Help names the rule once, and not a variable for each option.
                parameter.envvar, parameter.show_envvar = _variable(name, max(parameter.opts, key=len)), False
    return program


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    with _signals() as received:
        try:
            # Exits by SystemExit, with 130 for a KeyboardInterrupt.
            _program().main(args=argv, prog_name="shrinkkit")
        except SystemExit as ended:
            if ended.code != 128 + signal.SIGINT:
                return int(ended.code or 0)
            text = "interrupted; run the same command again to resume."
            status = 128 + (received or [signal.SIGINT])[-1]
        except ShrinkkitError as error:
            text, status = str(error), 2 if isinstance(error, InvalidInput) else 1
        except Exception as error:  # a full disk, or a defect: one sentence, and the rest on request
            if os.environ.get(TRACEBACK):
                raise
            text, status = f"{type(error).__name__}: {brief(error)}.", 1
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.strerror}: {error.filename}." if error.filename else f"{error.strerror}."
            text += f" Set {TRACEBACK}=1 to see where it happened."
        else:
            return 0
    print(f"shrinkkit: {text}", file=sys.stderr)
    return status


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, and list them; one that is ignored, as under `nohup`, stays ignored."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # Only the main thread receives signals.
    is_main = threading.current_thread() is threading.main_thread()
    handled = [number for number in numbers if is_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)
