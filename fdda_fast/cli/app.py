"""The application: how errors and interruptions end, and what all commands share."""

from __future__ import annotations

import io
import os
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..runs import environment

# Everything that a user can get wrong ends in one of these; any other exception is a bug.
_USER_ERRORS = (ValueError, OSError)
_USAGE_ERROR = typer.BadParameter.__bases__[0]
_MAX_MESSAGE = 600


class _Commands(TyperGroup):
    """Bad input is one line on stderr and exit code 2, an interruption exit code 130."""

    def main(self, *args: Any, **kwargs: Any) -> None:
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except _USAGE_ERROR as error:
            code = _complain(error.format_message())
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` is no error; typer leaves quietly
            raise
        except _USER_ERRORS as error:
            raise typer.Exit(_complain(error)) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from error


def _complain(error: object) -> int:
    message = " ".join(str(error).split()) or type(error).__name__
    if len(message) > _MAX_MESSAGE:
        message = message[:_MAX_MESSAGE] + " ..."
    print(f"error: {message}", file=sys.stderr)
    return 2


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Low-bit quantisation of CNNs from a few real images, and integer inference.",
)


def main() -> None:
    app(prog_name="fdda-fast")


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for module:factory; an installed script does not look there
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    if version:
        print(f"fdda-fast {environment()['fdda_fast']}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


def print_table(title: str, table: Table) -> None:
    # What is not a terminal has no width; the usual guess of 80 columns would fold rows.
    print(title)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
