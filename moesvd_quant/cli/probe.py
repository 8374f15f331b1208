"""Verb that looks at a model before anything is done to it: probe."""

import json
from dataclasses import asdict
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated

import typer

from ..model.named import resolve_device, resolve_model
from .common import Device, Json, Out, Overrides, app, progress_bars


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub name, or `reference`.")],
    overrides: Overrides = None,
    text: Annotated[list[str] | None, typer.Option(help="Judge on this text too; as for eval; repeat it.")] = None,
    alone: Annotated[
        list[float] | None, typer.Option(help="Also decompose each layer by itself at this ratio; repeat it.")
    ] = None,
    out: Out = Path("probe"),
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What a model can bear: spectra, similarity of experts, routing, sensitivity, and the cost of `svd`, rehearsed."""
    with progress_bars(as_json) as report:
        from ..evaluation.table import Table, render
        from ..memory.files import write_json
        from ..probe.report import plot_survey, survey_tables
        from ..probe.texts import probe_folder
        from ..probe.verdict import verdict
        from ..recipe.load import load_recipe
        from ..recipe.texts import named_texts
        from ..run.threads import sync_threads

        sync_threads()
        recipe = load_recipe("svd", overrides or ())
        texts, folder = named_texts(text or []), resolve_model(model)
        found = probe_folder(folder, recipe, texts, resolve_device(device), report, alone or ())
    sentences = verdict(found)
    content = {"model": str(model), "verdict": sentences} | asdict(found)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "probe.json", json.loads(json.dumps(content)))
    pictures = plot_survey(found, out)
    if as_json:
        print(json.dumps(content))
        return
    for table in survey_tables(found):
        print(render(Table(*table)))
    for sentence in sentences:
        print(fill(f"- {sentence}", get_terminal_size().columns, subsequent_indent="  ", break_on_hyphens=False))
    print(f"figures: {out}/probe.json\nplots: {', '.join(map(str, pictures))}")
