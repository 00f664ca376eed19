"""The entry point: it catches what a user can mend, and turns signals into exit codes."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

import lowres_ft
from lowres_ft import deferred, stopping
from lowres_ft.cli import bundles, chat, checks, comparing, machine, recipes, terminal
from lowres_ft.errors import LowresError
from lowres_ft.stopping import Stopped

app = typer.Typer(
    name="lowres-ft",
    help="Fine-tune small pretrained models on small machines, and share what comes of it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it takes "[default: ...]" for markup, and a third of the time
    add_completion=False,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    *(recipes.recipe, recipes.list_, recipes.show, checks.check, checks.curve, recipes.new),
    *(machine.plan, machine.models, machine.doctor),
    *(bundles.evaluate, comparing.compare, bundles.predict, chat.chat, bundles.merge, bundles.verify, bundles.base),
)
for _command in _COMMANDS:
    app.command(_command.__name__.rstrip("_"))(_command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"lowres-ft {lowres_ft.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Fine-tune small pretrained models on small machines, and share what comes of it."""


def main() -> None:
    """Run the command line. Exit 2 for a LowresError, 130 and 143 for signals; anything else keeps its traceback."""
    stopping.install()
    deferred.begin()
    with terminal.guarded():
        _run()


def _run() -> None:
    try:
        _command_line()
    except LowresError as error:
        _complain(f"error: {error.message}", f"hint: {error.hint}" if error.hint else "")
        _complain(*getattr(error, "__notes__", ()))
        sys.exit(2)
    except Stopped as stopped:
        _complain("interrupted", *getattr(stopped, "__notes__", ()))
        sys.exit(stopped.code)


def _command_line() -> None:
    try:
        app(prog_name="lowres-ft")
    except SystemExit:
        terminal.finish()
        raise


def _complain(*lines: str) -> None:
    for line in lines:
        if line:
            print(line, file=sys.stderr)
