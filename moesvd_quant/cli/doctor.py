"""The verb doctor."""

import json
from dataclasses import asdict

import typer

from .common import Json, app, hanging


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine can do, and what is missing. Asks nothing of the network; exit code 1 where something is."""
    from ..machine import State, examine

    found = examine()
    if as_json:
        print(json.dumps([asdict(one) for one in found]))
    else:
        width = max(len(one.name) for one in found)
        for one in found:
            print(hanging(f"{one.state:7} {one.name:{width}}  ", one.value))
            if one.advice:
                print(hanging(" " * (width + 10) + "-> ", one.advice))
    if any(one.state is State.MISSING for one in found):
        raise typer.Exit(1)
