"""Several recipes on one model, side by side: the only honest way to say that one is better."""

from collections.abc import Callable, Sequence
from pathlib import Path

from .checkpoint.files import read_json
from .evaluation.plot import plot_bytes
from .evaluation.record import RECORD, Wanted, evaluate, same_protocol, write
from .evaluation.table import Table, save, table8
from .recipe import Evaluate, load_recipe
from .runner import Run

Report = Callable[[str, int, int], None]


def compare(
    model: Path,
    recipes: Sequence[str],
    out: Path,
    texts: dict[str, str],
    length: int | None = None,
    overrides: Sequence[str] = (),
    device: str = "cpu",
    report: Report = lambda what, done, total: None,
    more: Sequence[dict] = (),
) -> tuple[list[dict], Table]:
    """Runs each recipe under OUT/NAME and evaluates its last checkpoint and the original on `texts`.

    Writes OUT/table8.md, .csv, .json and OUT/perplexity-against-bytes.png. Recipes are loaded before any runs;
    finished runs and records by the same protocol stay. Returns the records and their table, with the records `more` of
    what no recipe makes.
    """
    measure = Wanted(texts, length=length)
    loaded = [load_recipe(name, [*overrides, "evaluate.perplexity=[]", "keep=last"]) for name in recipes]
    evaluated = Evaluate(perplexity=texts, length=length or "auto")  # a stage that trains refuses these as its text
    wanted = [recipe.model_copy(update={"evaluate": evaluated}) for recipe in loaded]
    records = [measured(model, out / "00-original", measure, device)]
    for done, recipe in enumerate(wanted):
        report("recipes", done, len(wanted))
        folder = Run(recipe, model, out / recipe.name.replace("/", "-"), device, report).run()[-1]
        records.append(measured(folder, folder, measure, device))
    report("recipes", len(wanted), len(wanted))
    records += more
    table = table8(records)
    save(table, out / "table8")
    plot_bytes(records, out / "perplexity-against-bytes.png")
    return records, table


def written(recipes: dict[str, tuple[str, list[str]]], folder: Path, overrides: Sequence[str] = ()) -> dict[str, Path]:
    """YAML files of recipes that differ from others by overrides: {name: (recipe, overrides)} -> {name: file}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.yaml" for name in recipes}
    for name, (recipe, own) in recipes.items():
        files[name].write_text(load_recipe(recipe, [*overrides, *own]).to_yaml())
    return files


def measured(source: Path, folder: Path, wanted: Wanted, device: str = "cpu", report: Report | None = None) -> dict:
    """The record of a model in `folder`: the one that is there if it was made by the same protocol, else a new one."""
    file = folder / RECORD
    if file.is_file():
        found = read_json(file)
        if same_protocol(found, wanted):
            return found
    record = evaluate(source, wanted, device, progress=report or (lambda what, done, total: None))
    write(record, file)
    return record
