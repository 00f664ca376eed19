"""Talking to a chat bundle in the terminal."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from lowres_ft.cli.bundles import Dtype, loaded, streamed, typed
from lowres_ft.cli.options import Base, BundleFolder, Device, Quiet
from lowres_ft.errors import DataError

if TYPE_CHECKING:
    from lowres_ft.generation import Session

_COLDEST = 0.01  # a temperature below which one token alone is drawn, and logits that it divides are too large
_HELP = "An empty line or Ctrl-D ends, /reset begins anew."


def chat(
    bundle: BundleFolder,
    system: Annotated[
        str | None, typer.Option("--system", help="A message that tells the model how to answer.")
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 writes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Longest answer.  [default: the recipe's]")
    ] = None,
    dtype: Dtype = None,
    base: Base = None,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Talk to a chat bundle; each line of standard input is a message."""
    from lowres_ft.bundle import open_bundle
    from lowres_ft.generation import Session, Writer, require_chat

    if 0 < temperature < _COLDEST:
        raise typer.BadParameter(f"take {_COLDEST} at least, or 0 for the likeliest token", param_hint="--temperature")
    opened = open_bundle(bundle)
    require_chat(opened)
    adapted, _ = loaded(opened, device, dtype, base, quiet)
    session = Session(Writer(adapted, max_new_tokens=max_tokens, temperature=temperature), system=system)
    if not quiet and sys.stdin.isatty():
        print(_HELP, file=sys.stderr)
    for line in _messages():
        if line.strip() == "/reset":
            session.reset()
            continue
        _answer(session, line, quiet=quiet)


def _answer(session: "Session", line: str, *, quiet: bool) -> None:
    """Print the answer to a message; at a terminal, one that cannot be answered does not end the conversation."""
    before = session.forgotten
    try:
        session.say(line, streamed(sys.stdout))
    except DataError as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error.message}", file=sys.stderr)
        return
    print(flush=True)
    if session.forgotten > before and not quiet:
        print("note: the first messages were left out: the conversation is too long", file=sys.stderr)


def _messages() -> Iterator[str]:
    """Lines that are typed, up to an empty one; lines from elsewhere, to their end."""
    if not sys.stdin.isatty():
        yield from typed()
        return
    while True:
        try:
            line = input("> ")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"the line is not {error.encoding}: {error.reason}", hint="Type UTF-8 text.") from error
        if not line.strip():
            return
        yield line
