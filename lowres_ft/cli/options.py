"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; results and errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Where the base lies, if not where the recipe says. It must be the same one."),
]
BundleFolder = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle's folder.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as train.epochs=1.", show_default=False),
]
