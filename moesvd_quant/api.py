"""The Python interface: what the commands do, as functions with typed results. Heavy modules load on use."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas

    from .evaluation.difference import Difference
    from .run.forecast import Needs
    from .run.run import Run
    from .run.seconds import Seconds

Report = Callable[[str, int, int], None]  # of what is done, how much of it, of how much
Overrides = Mapping[str, Any] | Sequence[str]


def _quiet(what: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model. perplexity: by text. divergence: of its predictions from the original's, by text,
    mean in nats per token; agreement: share of tokens at which both find the same token likeliest; both empty where no
    original was given. accuracy: by task. record: all of it, as eval.json has it."""

    name: str
    folder: Path
    disk_bytes: int
    resident_bytes: int
    perplexity: dict[str, float]
    divergence: dict[str, float]
    agreement: dict[str, float]
    accuracy: dict[str, float]
    record: dict


@dataclass(frozen=True)
class StagePlan:
    """What a stage will do. accounting: exact bytes and parameters of its checkpoint (`checkpoint.accounting`);
    decisions: by the path of each experts module; notes: on the whole model; layout: of its tensors; expert_bits:
    stored bits per original weight of each expert, by the same path."""

    stage: str
    accounting: dict
    decisions: dict[str, dict]
    notes: dict
    layout: dict
    expert_bits: dict[str, list[float]]


@dataclass(frozen=True)
class Plan:
    """The plan of a recipe. needs: memory and disk that the run will use; seconds: its time on this machine."""

    stages: list[StagePlan]
    needs: "Needs"
    seconds: "Seconds"

    def to_pandas(self) -> "pandas.DataFrame":
        """A row per stage: its bytes, bits per expert weight, shares removed."""
        import pandas

        return pandas.DataFrame([{"stage": one.stage, **one.accounting} for one in self.stages])


@dataclass(frozen=True)
class Compressed:
    """What a run made. checkpoints: a folder per stage, the last one the result. evaluation: of the original and each
    checkpoint, on the texts of the recipe; empty where it names none. address: of the result on the hub, if pushed."""

    checkpoints: list[Path]
    evaluation: list[Evaluation]
    address: str | None = None

    @property
    def folder(self) -> Path:
        """Of the result."""
        return self.checkpoints[-1]

    def to_pandas(self) -> "pandas.DataFrame":
        """A row per evaluated model, of `frame`."""
        return frame(self.evaluation)


def frame(evaluations: Sequence[Evaluation]) -> "pandas.DataFrame":
    """A row per evaluation: name, bytes, perplexity on each text ("demo"), how predictions differ from the original's
    ("demo: divergence", "demo: agreement"), accuracy of each task."""
    import pandas

    rows = [
        {
            "name": one.name,
            "disk_bytes": one.disk_bytes,
            "resident_bytes": one.resident_bytes,
            **one.perplexity,
            **{f"{text}: divergence": value for text, value in one.divergence.items()},
            **{f"{text}: agreement": value for text, value in one.agreement.items()},
            **one.accuracy,
        }
        for one in evaluations
    ]
    return pandas.DataFrame(rows)


def start(
    model: str | Path | None, recipe: str | Path | dict, out: str | Path, overrides: Overrides = (), *,
    device: str = "auto", memory: str | None = None, workers: int = 1,
    executor: Literal["processes", "ray"] = "processes", report: Report = _quiet,
) -> "Run":  # fmt: skip
    """A run that has checked all it can and done nothing yet; see `compress`."""
    from .memory.limits import parse_bytes
    from .model.named import resolve_device, resolve_model
    from .recipe.load import load_recipe
    from .run.run import Run
    from .run.threads import sync_threads

    loaded = load_recipe(recipe, _listed(overrides))
    sync_threads()
    folder = resolve_model(str(model) if model else loaded.model)
    limit = None if memory is None else parse_bytes(memory)
    return Run(
        loaded, folder, Path(out), resolve_device(device), report, memory=limit, workers=workers, executor=executor
    )


def compress(
    model: str | Path | None, recipe: str | Path | dict, out: str | Path, overrides: Overrides = (), *,
    device: str = "auto", memory: str | None = None, workers: int = 1,
    executor: Literal["processes", "ray"] = "processes", push: str | None = None, report: Report = _quiet,
) -> Compressed:  # fmt: skip
    """Runs a recipe on a model; each stage writes a checkpoint under `out`. Called again, it goes on where it was.

    model: a folder, `reference`, or a hub name; None takes the recipe's. recipe: a shipped name, a YAML file, or the
    content of one. overrides: {"svd.ratio": 0.6} or ["svd.ratio=0.6"]. memory: a limit such as "16GB", kept to but for
    what the C library holds of freed tensors, as it may not in the command line's process (`memory/allocator.py`).
    push: a name on the hub, user/name, that the result goes to.

    Raises RecipeError for all that is wrong with the recipe, ModelError, TextError, RunError and StageError (all of
    them MoesvdError) with what to do.
    """
    from . import hub

    job = start(
        model, recipe, out, overrides, device=device, memory=memory, workers=workers, executor=executor, report=report
    )
    _require_evaluation(job)
    if push:
        hub.require_push(push)
    folders = job.run()
    found = _evaluated(job, folders, report)
    _write_costs(folders, found)
    return Compressed(folders, found, hub.push(folders[-1], push) if push else None)


def plan(
    model: str | Path | None, recipe: str | Path | dict, out: str | Path = "out", overrides: Overrides = (), *,
    device: str = "auto", memory: str | None = None, workers: int = 1,
    executor: Literal["processes", "ray"] = "processes", report: Report = _quiet,
) -> Plan:  # fmt: skip
    """What `compress` with these arguments will do: exact bytes of every stage, memory, disk, and time of what is then
    left to do. Changes no weight."""
    from .checkpoint.density import density
    from .run.plan import plan_stages
    from .runtime.parts import layout_from

    job = start(
        model, recipe, out, overrides, device=device, memory=memory, workers=workers, executor=executor, report=report
    )
    needs = job.needs()
    needs.require(job.statistics.store)
    try:
        made = plan_stages(job)
    finally:
        job.pool.close()
    stages = [StagePlan(**one, expert_bits=density(job.meta, layout_from(one["layout"]))) for one in made]
    return Plan(stages, needs, job.seconds())


def evaluate(
    model: str | Path, texts: Sequence[str] | Mapping[str, str], *, original: str | Path | None = None,
    length: int | None = None, device: str = "auto", report: Report = _quiet,
) -> Evaluation:  # fmt: skip
    """Perplexity of a model on texts (known names, files, or {name: source}), and its bytes.

    original: the model that it was made of; how predictions differ from its is measured as well."""
    from .evaluation.inputs import EvalSpec
    from .evaluation.record import evaluate as measure
    from .model.named import resolve_device, resolve_model

    source = None if original is None else resolve_model(str(original))
    wanted = EvalSpec(_named(texts), length=length, original=source)
    return _evaluation(measure(resolve_model(str(model)), wanted, resolve_device(device), None, report))


def compare(
    original: str | Path, models: Mapping[str, str | Path], texts: Sequence[str] | Mapping[str, str], *,
    length: int | None = None, device: str = "auto", report: Report = _quiet,
) -> dict[str, dict[str, "Difference"]]:  # fmt: skip
    """{text: {model: how its predictions differ from the original's}}; models by names of your choice."""
    from .evaluation.compare import compare as measure
    from .evaluation.inputs import EvalSpec
    from .model.named import resolve_device, resolve_model

    found = {name: resolve_model(str(folder)) for name, folder in models.items()}
    wanted = EvalSpec(_named(texts), length=length)
    return measure(resolve_model(str(original)), found, wanted, resolve_device(device), report)


def _named(texts: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    from .recipe.texts import named_texts

    return dict(texts) if isinstance(texts, Mapping) else named_texts([texts] if isinstance(texts, str) else texts)


def _listed(overrides: Overrides) -> list[str]:
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    return list(overrides)


def _require_evaluation(job: "Run") -> None:
    """Before any work: TextError for a text that the recipe evaluates on and that cannot be read or is too short,
    UsageError for tasks on a model that does not fit."""
    from .calibration.rows import TextError
    from .evaluation.inputs import read_text, spec_of
    from .evaluation.opening import require_room
    from .model.tokenizer import load_tokenizer

    asked, wanted = job.recipe.evaluate, spec_of(job.recipe.evaluate)
    require_room(job.model, wanted, str(job.device))
    for index, (name, source) in enumerate(asked.texts().items()):
        key = f"[{index}]" if isinstance(asked.perplexity, list) else f".{name}"
        try:
            read_text(source, wanted, load_tokenizer(job.model), job.meta.config)
        except TextError as error:
            raise TextError(
                f"evaluate.perplexity{key}: {error}. Nothing was computed; name local files, or leave the evaluation "
                "out with evaluate.perplexity=[]"
            ) from error


def _evaluated(job: "Run", folders: list[Path], report: Report) -> list[Evaluation]:
    """Of the original and every checkpoint of a run, on the recipe's texts and tasks."""
    from .comparison.bench import cached_evaluate
    from .evaluation.inputs import spec_of

    wanted, found = replace(spec_of(job.recipe.evaluate), original=job.model), []
    if not wanted.texts and not wanted.tasks:
        return []
    for source, folder in [(job.model, job.out / "00-original"), *((f, f) for f in folders)]:
        say = lambda what, done, total, folder=folder: report(f"{folder.name}: {what}", done, total)  # noqa: E731
        found.append(_evaluation(cached_evaluate(source, folder, wanted, str(job.device), say)))
    return found


def _write_costs(folders: list[Path], found: list[Evaluation]) -> None:
    """What was measured goes into the card of each checkpoint. found: the original's, then theirs; or nothing."""
    from .checkpoint.card import Cost, write_card
    from .memory.files import read_json
    from .runtime.modeling_moesvd import MANIFEST

    for folder, here in zip(folders, found[1:]):
        before = found[0].perplexity
        costs = [Cost(text, before[text], value) for text, value in here.perplexity.items()]
        write_card(folder, read_json(folder / MANIFEST), costs)


def _evaluation(record: dict) -> Evaluation:
    from .evaluation.task_table import score

    figures = {name: one["ppl"] for name, one in record["perplexity"].items() if "ppl" in one}
    differences = {name: one["difference"] for name, one in record["perplexity"].items() if "difference" in one}
    divergence = {name: one["mean"] for name, one in differences.items()}
    agreement = {name: one["top1"] for name, one in differences.items()}
    tasks = record.get("zero_shot", {}).get("tasks", {})
    correct = {name: found[0] for name, one in tasks.items() if (found := score(one))}
    memory = record["memory"]
    folder = Path(record["folder"])
    return Evaluation(
        record["name"], folder, memory["disk_bytes"], memory["resident_bytes"], figures, divergence, agreement, correct,
        record,
    )  # fmt: skip
