"""`nexus board`: pages that this machine serves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nexus_scale.cli.base import Debug, guarded
from nexus_scale.cli.runs import Root, root_of
from nexus_scale.io.terminal import visible

Host = Annotated[
    str,
    typer.Option(help="address to listen on; 0.0.0.0 opens it to others, by the address with a token that is printed"),
]
Port = Annotated[int, typer.Option(min=0, max=65_535, help="0: any that is free")]
TokenFile = Annotated[
    Path | None, typer.Option(help="a file with the token (default: a new one where the address is open)")
]
Names = Annotated[
    list[str] | None, typer.Option("--name", help="a name by which others reach this machine, as of a proxy")
]
"""Of all commands that serve pages; see `web.access`."""


def board(
    root: Root = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    token_file: TokenFile = None,
    name: Names = None,
    debug: Debug = False,
) -> None:
    """Show all runs of a folder in a browser, live: states, curves, samples, incidents, comparisons. It changes nothing."""

    def action() -> None:
        from nexus_scale.board.server import board as made
        from nexus_scale.web.access import access_to
        from nexus_scale.web.server import serve

        where, access = root_of(root), access_to(host, port, token_file, name or ())
        serve(made(where, access), access, lambda address: print(visible(f"{where}: {address}", keep=""), flush=True))

    guarded(action, debug)
