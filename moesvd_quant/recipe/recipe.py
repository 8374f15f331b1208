"""YAML -> a validated Recipe. A recipe is a list of stages; everything wrong with it is said at once."""

import difflib
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, ValidationInfo, field_validator

from ..errors import MoesvdError, UsageError
from .budget import parse_budget
from .stage import STAGES, Stage, form_after, packing_stage
from .tasks import Tasks, data_folder, require_files, require_known
from .yaml_lines import YamlProblem, apply_override, parse


class RecipeError(MoesvdError, ValueError):
    """Everything that is wrong with a recipe: a line each, `file:line: key: what, and what to do`."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(_Part):
    dataset: str = Field("mixture", description="a known name, local files or folders, joined by commas")
    samples: Annotated[int, Field(gt=0)] = Field(256, description="windows of text")
    length: Literal["auto"] | Annotated[int, Field(ge=16)] = Field("auto", description="tokens per window")
    self_written: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="share of the windows that the model writes itself"
    )


def named_texts(sources: Sequence[str]) -> dict[str, str]:
    """{name: source} of texts, each `name=source`, a known name, or a file that its first name part names.

    ValueError where two have one name.
    """
    named: dict[str, str] = {}
    for source in sources:
        name, given, rest = source.partition("=")
        name = name if given else Path(source).name.split(".")[0]
        if name in named:
            raise UsageError(f"two texts are named {name!r}; give one of them another name: {name}2={source}")
        named[name] = rest if given else source
    return named


class Evaluate(_Part):
    perplexity: list[str] | dict[str, str] = Field(
        default_factory=list, description="texts: known names, or name: source"
    )
    length: Literal["auto"] | Annotated[int, Field(ge=16)] = Field("auto", description="tokens per window")
    tasks: str | list[str] = Field(
        default_factory=list, description="tasks of lm-eval, without examples; zero-shot: the paper's seven"
    )
    task_data: str | None = Field(
        None, validate_default=True, description="folder of local task files; else lm-eval loads from the hub"
    )
    limit: Annotated[int, Field(gt=0)] | None = Field(None, description="only so many documents of each task")

    def wanted_tasks(self) -> Tasks:
        return Tasks(tuple([self.tasks] if isinstance(self.tasks, str) else self.tasks), self.task_data, self.limit)

    def texts(self) -> dict[str, str]:
        """{name: source}; a list names known texts or files."""
        named = self.perplexity
        return dict(named) if isinstance(named, dict) else named_texts(named)

    @field_validator("perplexity")
    @classmethod
    def _distinct(cls, value):
        if isinstance(value, list):
            named_texts(value)
        return value

    @field_validator("tasks")
    @classmethod
    def _known(cls, value):
        require_known([value] if isinstance(value, str) else value)
        return value

    @field_validator("task_data", "limit")
    @classmethod
    def _of_tasks(cls, value, info: ValidationInfo):
        if "tasks" not in info.data:  # which is wrong, and said
            return value
        tasks = info.data["tasks"]
        if value is not None and not tasks:
            raise ValueError("only with tasks")
        if info.field_name == "task_data":
            try:
                require_files([tasks] if isinstance(tasks, str) else tasks, data_folder(value))
            except FileNotFoundError as error:
                raise ValueError(str(error)) from error
        return value


class KvCache(_Part):
    context: Annotated[int, Field(gt=0)] = Field(description="tokens of a sequence")
    batch: Annotated[int, Field(gt=0)] = Field(1, description="sequences at a time")


class Limits(_Part):
    """What a budget counts, and what its allocation must respect. Patterns match `model.layers.3.mlp.experts.down`."""

    of: Literal["disk", "resident"] = Field("disk", description="a budget in bytes: of all files, or when loaded")
    kv_cache: KvCache | None = Field(None, description="bytes of the budget that are left to keys and values")
    widths: list[float] | None = Field(None, description="the only widths there are kernels for; 16: not quantized")
    formats: list[str] | None = Field(None, description="the only formats there are kernels for, of those of `gptq`")
    one_width_per_layer: bool = Field(False, description="all experts of a layer in one width, as kernels want it")
    keep: list[str] = Field(default_factory=list, description="patterns of matrices that stay as they are")
    min_bits: dict[str, Annotated[float, Field(ge=1, le=16)]] = Field(
        default_factory=dict, description="pattern: fewest bits of the matrices it matches"
    )


class Recipe(_Part):
    """A validated recipe; see `load_recipe`."""

    name: str = Field(description="of its file")
    model: str | None = Field(None, description="folder, hub name or `reference`; --model goes before it")
    seed: int = Field(0, description="chooses windows of text; all else is deterministic")
    calibration: Calibration = Field(Calibration(), description="text whose statistics steer the compression")
    experts: Literal["routed", "all"] = Field(
        "routed", description="what is compressed as experts; all: shared experts as well, which every token passes"
    )
    unused_tensors: Literal["keep", "leave_out"] = Field(
        "keep",
        description="tensors that transformers does not use, such as layers for multi-token prediction",
    )
    stages: tuple[SerializeAsAny[Stage], ...] = Field(description="what is done, in this order")
    evaluate: Evaluate = Field(Evaluate(), description="what is measured of the original and of every checkpoint")
    keep: Literal["all", "last"] = Field("all", description="the checkpoints of all stages, or of the last one alone")
    budget: str | None = Field(
        None, description="bytes (20GB) or bits per expert weight (1.5bpw); decides what stages leave open"
    )
    limits: Limits = Field(Limits(), description="what a budget counts, and what its allocation must respect")

    @field_validator("budget")
    @classmethod
    def _budget(cls, value):
        if value is not None:
            parse_budget(value)
        return value

    def to_yaml(self) -> str:
        """The resolved recipe, every default written out; loads back equal."""
        content = self.model_dump(exclude={"name", "stages"})
        content["stages"] = [{s.name: _given(s)} for s in self.stages]
        return f"# resolved recipe {self.name}\n" + yaml.safe_dump(content, sort_keys=False)


def _given(stage: Stage) -> dict:
    """Options of a stage written out, without those that have no effect beside the others."""
    unused = stage.unused_options()
    return {name: value for name, value in stage.model_dump().items() if name not in unused and value is not None}


def shipped() -> list[tuple[str, str]]:
    """(name, first line of its comment) of every recipe of the package."""
    root = resources.files("moesvd_quant.recipes")
    found = [(f.name, f) for f in root.iterdir() if f.name.endswith(".yaml")]
    folder = root.joinpath("models")
    if folder.is_dir():
        found += [(f"models/{f.name}", f) for f in folder.iterdir() if f.name.endswith(".yaml")]
    lines = {name[: -len(".yaml")]: f.read_text().splitlines()[0].lstrip("# ") for name, f in found}
    return sorted(lines.items())


def read_shipped(name: str) -> str:
    """Text of a shipped recipe; RecipeError with the nearest names where there is none."""
    names = [n for n, _ in shipped()]
    if name not in names:
        raise RecipeError(f"{name}: no such recipe or file{_near(name, names)}; shipped: {', '.join(names)}")
    return resources.files("moesvd_quant.recipes").joinpath(f"{name}.yaml").read_text()


def _text_of(source: str | Path | dict) -> tuple[str, str, str]:
    """Text of a recipe, where that stands, and the recipe's name."""
    if isinstance(source, dict):
        return yaml.safe_dump(source, sort_keys=False), "recipe", "recipe"
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        return read_shipped(str(source)), f"{source}.yaml", str(source)
    if not path.is_file():
        raise RecipeError(f"{path}: no such file")
    return _read(path), str(path), path.stem


def load_recipe(source: str | Path | dict, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped name, a YAML file or the content of one, with `key=value` overrides. RecipeError names all that is
    wrong; of a content, lines are those that it has as YAML."""
    text, where, name = _text_of(source)
    try:
        content, lines = parse(text)
    except YamlProblem as problem:
        raise RecipeError(f"{where}:{problem.line}: {problem}") from problem
    if not isinstance(content, dict):
        raise RecipeError(f"{where}:1: a recipe is a mapping with the key 'stages'")
    origin: dict[tuple, str] = {}
    entries = content.get("stages")
    listed = entries if isinstance(entries, list) else []
    names = [next(iter(entry)) if isinstance(entry, dict) and entry else str(entry) for entry in listed]
    for override in overrides:
        try:
            origin[apply_override(content, override, names)] = f"override {override!r}"
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise RecipeError(f"override {override!r}: {error}") from error
    problems: list[str] = []

    def place(at: tuple, message: str = "") -> str:
        """Where a key stands: the line, or the override that set it, or that set an option which a message names."""
        shared = [path for path in origin if path[: len(at)] == at or at[: len(path)] == path]
        named = [path for path in shared if re.search(rf"\b{path[-1]}\b", message.partition(":")[0])]
        if shared:
            return origin[max(reversed(named or shared), key=lambda path: min(len(path), len(at)))]
        line = next((lines[at[:end]] for end in range(len(at), -1, -1) if at[:end] in lines), 1)
        return f"{where}:{line}"

    stages = _stages(content, place, problems)
    body = {k: v for k, v in content.items() if k != "stages"}
    recipe = _validate(Recipe, body | {"name": name, "stages": stages}, (), place, problems)
    open_stages = [(i, s) for i, s in enumerate(stages) if s.needs_budget()]
    if content.get("budget") is None:
        for index, stage in open_stages:
            where_ = place(("stages", index, stage.name))
            key = f"stages[{index}].{stage.name}.{stage.budget_option}"
            problems.append(f"{where_}: {key}: is required, or give a budget (20GB, 1.5bpw)")
    elif stages and not open_stages:
        given = [f"{s.name}.{s.budget_option}" for s in stages if s.budget_option]
        remedy = f"{' and '.join(given)} is already set; remove it" if given else "add a stage that has a budget"
        problems.append(f"{place(('budget',))}: budget: {remedy} to let the budget decide")
    if recipe is not None and recipe.limits != Limits():
        problems += [f"{place(('limits',))}: {problem}" for problem in _limit_problems(recipe)]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text; save the file as UTF-8") from error


def _limit_problems(recipe: Recipe) -> list[str]:
    """What limits ask for that there is nothing to apply to."""
    if recipe.budget is None:
        return ["limits: only with a budget (20GB, 1.5bpw)"]
    limits, problems = recipe.limits, []
    if parse_budget(recipe.budget).unit == "bpw" and (limits.of != "disk" or limits.kv_cache):
        problems.append("limits.of, limits.kv_cache: only with a budget in bytes, not in bits per weight")
    packing = packing_stage(recipe.stages)
    storages = packing.storages() if packing is not None else []
    rates, formats = [*(storage.rate for storage in storages), 16], [storage.format for storage in storages]
    for name, given, known in (("widths", limits.widths, rates), ("formats", limits.formats, formats)):
        if given is not None and (not given or set(given) - set(known)):
            problems.append(f"limits.{name}: give some of {', '.join(map(str, dict.fromkeys(known)))}")
    if limits.widths is not None:
        problems += [
            f"limits.min_bits.{pattern}: {bits} is more than any of limits.widths {limits.widths}"
            for pattern, bits in limits.min_bits.items()
            if bits > max(limits.widths)
        ]
        if packing is not None and not packing.needs_budget():
            key = f"{packing.name}.{packing.budget_option}"
            problems.append(f"limits.widths: {key} is given; remove it, or remove the widths")
    return problems


def _stages(content: dict, place, problems: list[str]) -> tuple[Stage, ...]:
    entries = content.get("stages")
    if not isinstance(entries, list) or not entries:
        problems.append(f"{place(('stages',))}: stages: give at least one of {', '.join(STAGES)}")
        return ()
    stages: list[Stage] = []
    for index, entry in enumerate(entries):
        at: tuple = ("stages", index)
        name: object = entry
        given: dict = {}
        if isinstance(entry, dict):
            if len(entry) != 1:
                problems.append(f"{place(at)}: stages[{index}]: one stage per item, found {sorted(entry)}")
                continue
            name, given = next(iter(entry.items()))
        if name not in STAGES:
            hint = _near(str(name), STAGES)
            problems.append(
                f"{place((*at, name))}: stages[{index}]: unknown stage {name!r}{hint} (valid: {', '.join(STAGES)})"
            )
            continue
        kind = STAGES[name]
        if form_after(stages) > kind.takes:
            before = ", ".join(s.name for s in stages if s.leaves > kind.takes)
            problems.append(f"{place((*at, name))}: stages[{index}].{name}: cannot come after {before}")
        stage = _validate(kind, given or {}, (*at, name), place, problems)
        if stage is not None:
            stages.append(stage)
    return tuple(stages)


def _validate(kind, value, at: tuple, place, problems: list[str]):
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        for item in error.errors():
            problems.append(_say(kind, item, at, place))
        return None


def _say(kind, item, at, place) -> str:
    inner = [p for p in item["loc"] if not str(p).startswith(("literal[", "constrained-", "list[", "dict["))]
    path = (*at, *[p for p in inner if p not in ("int", "str", "function-after")])
    key = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
    if item["type"] == "extra_forbidden":
        owner = kind
        for part in inner[:-1]:
            owner = owner.model_fields[part].annotation
        valid = sorted(set(owner.model_fields) - {"name"})
        return f"{place(path)}: {key}: unknown key{_near(str(inner[-1]), valid)} (valid: {', '.join(valid)})"
    if item["type"] == "missing":
        return f"{place(path)}: {key}: is required ({kind.model_fields[inner[-1]].description})"
    message = item["msg"].removeprefix("Value error, ")
    got = "" if item["type"] == "value_error" else f", got {item['input']!r}"
    return f"{place(path, message)}: {key or 'recipe'}: {message}{got}"


def _near(word: str, known) -> str:
    found = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {found[0]!r}?" if found else ""
