"""The verb compare."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from ..model.named import resolve_device, resolve_model
from .common import Device, Json, Texts, app, progress_bars


@app.command()
def compare(
    original: Annotated[str, typer.Argument(help="The model that the others were made of.")],
    models: Annotated[list[str], typer.Argument(help="Models to compare with it.")],
    text: Texts = None,
    length: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Show what each model writes after it; repeat it.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to write after a prompt.")] = 48,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How models differ from their original: divergence of predictions, share of equal ones, what they write."""
    with progress_bars(as_json) as report:
        from ..evaluation.compare import compare as measure
        from ..evaluation.compare import difference_table, kind_table, position_table, write_beside
        from ..evaluation.inputs import EvalSpec
        from ..recipe.texts import named_texts
        from ..run.threads import sync_threads

        sync_threads()
        source, others = resolve_model(original), _named(models)
        wanted = EvalSpec(named_texts(text or ([] if prompt else ["wikitext2"])), length=length)
        found = measure(source, others, wanted, resolve_device(device), report)
        written = write_beside(source, others, prompt or [], tokens, resolve_device(device), report)
    if as_json:
        figures = {at: {name: one.to_dict() for name, one in models.items()} for at, models in found.items()}
        print(json.dumps({"texts": figures, "prompts": [[asdict(one) for one in beside] for beside in written]}))
        return
    from ..evaluation.table import render

    for at, differences in found.items():
        print(f"{at}: divergence from the original, in thousandths of a nat per token")
        for table in (difference_table, kind_table, position_table):
            print(render(table(differences)))
    for given, beside in zip(prompt or [], written):
        print(f"\n{given!r} (>> before the first token that differs)")
        for one in beside:
            print(f"  {one.model} ({one.same} of {one.tokens} tokens the same): {one.text!r}")


def _named(models: list[str]) -> dict[str, Path]:
    """{name for tables: folder}: the last part of each, the whole where two have it in common."""
    short = [Path(given).name for given in models]
    if len(set(models)) < len(models):
        raise UsageError(f"{' '.join(models)}: give each model once")
    names = [given if short.count(last) > 1 else last for given, last in zip(models, short)]
    return {name: resolve_model(given) for name, given in zip(names, models)}
