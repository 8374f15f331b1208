"""Several recipes on one model, side by side: the only honest way to say that one is better."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..calibration.store import fingerprint
from ..errors import UsageError
from ..evaluation.inputs import EvalSpec, protocol_of, require_possible
from ..evaluation.paper_tables import table8
from ..evaluation.plot import plot_bytes, plot_divergence
from ..evaluation.record import RECORD, answers, evaluate, write
from ..evaluation.table import Table, save
from ..evaluation.task_table import task_table
from ..memory.files import read_json
from ..recipe.load import load_recipe
from ..recipe.recipe import Evaluate
from ..recipe.tasks import NO_TASKS, Tasks
from ..run.run import Run

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
    tasks: Tasks = NO_TASKS,
) -> tuple[list[dict], Table]:
    """Runs each recipe under OUT/NAME and evaluates its last checkpoint and the original on `texts` and `tasks`.

    Writes OUT/table8.md, .csv, .json, OUT/perplexity-against-bytes.png and OUT/divergence-against-bytes.png; with tasks
    OUT/tasks.md and so on. Recipes are loaded before any runs; finished runs and records by the same protocol stay.
    Returns the records, those of `more` that no recipe makes among them, and their table.
    """
    measure = EvalSpec(texts, ("gptq",), length, None, None, *tasks, original=model)
    require_possible(measure)
    loaded = [load_recipe(name, [*overrides, "evaluate.perplexity=[]", "keep=last"]) for name in recipes]
    require_distinct(recipes)
    evaluated = Evaluate(perplexity=texts, length=length or "auto")  # a stage that trains refuses these as its text
    wanted = [recipe.model_copy(update={"evaluate": evaluated}) for recipe in loaded]
    records = [cached_evaluate(model, out / "00-original", measure, device)]
    for done, recipe in enumerate(wanted):
        report("recipes", done, len(wanted))
        folder = Run(recipe, model, out / recipe.name.replace("/", "-"), device, report).run()[-1]
        records.append(cached_evaluate(folder, folder, measure, device))
    report("recipes", len(wanted), len(wanted))
    records += more
    table = table8(records)
    save(table, out / "table8")
    plot_bytes(records, out / "perplexity-against-bytes.png")
    plot_divergence(records, out / "divergence-against-bytes.png")
    if tasks.names:
        save(task_table(records), out / "tasks")
    return records, table


def folder_of(recipe: str | Path) -> str:
    """Name of the folder that a recipe's results go to: a file's without its ending, a shipped one's without slash."""
    path = Path(recipe)
    return path.stem if path.suffix in (".yaml", ".yml") else str(recipe).replace("/", "-")


def require_distinct(recipes: Sequence[str | Path]) -> None:
    """UsageError where two recipes would write into one folder."""
    seen: dict[str, str | Path] = {}
    for given in recipes:
        name = folder_of(given)
        if name in seen:
            raise UsageError(f"{seen[name]} and {given}: both would write into {name}; give one of them another name")
        seen[name] = given


def written(
    recipes: Mapping[str, tuple[str | dict, list[str]]], folder: Path, overrides: Sequence[str] = ()
) -> dict[str, Path]:
    """YAML files of recipes that differ from others by overrides: {name: (recipe, overrides)} -> {name: file}."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.yaml" for name in recipes}
    for name, (recipe, own) in recipes.items():
        files[name].write_text(load_recipe(recipe, [*overrides, *own]).to_yaml())
    return files


def cached_evaluate(
    source: Path, folder: Path, wanted: EvalSpec, device: str = "cpu", report: Report | None = None
) -> dict:
    """The record of a model, kept in `folder`: the one that is there if it is of the same model, by the same protocol,
    else a new one."""
    file = folder / RECORD
    if file.is_file():
        found = read_json(file)
        if answers(found, fingerprint(source), protocol_of(source, wanted, device), wanted):
            return found
    record = evaluate(source, wanted, device, progress=report or (lambda what, done, total: None))
    write(record, file)
    return record
