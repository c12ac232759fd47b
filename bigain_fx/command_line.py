"""How every command line ends: an error of ours is one line on standard error, and exit status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import typer

from bigain_fx.passes.errors import BigainError


def ending_well(run: Callable[[], object]) -> None:
    """Call ``run``; an error of ours ends the process, in one line."""
    try:
        run()
    except BigainError as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        sys.exit(2)


def run(main: Callable[..., Any]) -> None:
    """Run ``main`` with the arguments of this process, as typer does."""
    ending_well(lambda: typer.run(main))
