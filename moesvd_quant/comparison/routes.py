"""Ways to a size: what of a model goes, experts, ranks or bits, so that it has so many bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import yaml

from ..errors import MoesvdError
from ..evaluation.table import Table
from ..recipe.load import load_recipe
from ..run.plan import plan_stages
from ..run.run import Run

PARTS = 128  # the shares that are tried are multiples of one part
WIDTHS = (8, 4, 3, 2)  # of grids
RATES = (4, 3.5, 3, 2.5, 2, 1.5, 1)  # of trellis codes
THREE = {"gptq": {"bits": 3, "format": "trellis"}}

# Stages by the share of the experts, or of their parameters, that goes.
BY_SHARE: dict[str, Callable[[float], list[dict]]] = {
    "drop+3bit": lambda share: [{"prune": {"ratio": share, "scope": "model"}}, THREE],
    "merge+3bit": lambda share: [{"merge": {"ratio": share}}, THREE],
    "ranks+16bit": lambda share: [{"svd": {"ratio": share}}],
    "ranks+3bit": lambda share: [{"svd": {"ratio": share}}, THREE],
}
# What has the same bytes, and is planned without a walk through the model.
SIZED_BY = {"merge+3bit": lambda share: [{"prune": {"ratio": share}}, THREE]}
# Stages that keep all, largest first.
BY_BITS: dict[str, list[list[dict]]] = {
    "grids": [[{"gptq": {"bits": bits}}] for bits in WIDTHS],
    "trellis": [[{"gptq": {"bits": bits, "format": "trellis"}}] for bits in RATES],
}


@dataclass(frozen=True)
class Drawn:
    """A way to a size. stages: of its recipe, None where it does not come there; why: not."""

    route: str
    budget: str
    stages: list[dict] | None
    why: str = ""

    @property
    def name(self) -> str:
        return f"{self.route}@{self.budget}"


def alike(recipe: str, overrides: Sequence[str]) -> dict:
    """What of a recipe is neither its stages nor its budget: the text, and how the model is read."""
    shared = yaml.safe_load(load_recipe(recipe, overrides).to_yaml())
    return {key: shared[key] for key in ("seed", "calibration", "balance", "experts", "unused_tensors")}


def routes(job: Run, sizes: Mapping[str, int], shared: dict) -> list[Drawn]:
    """Every route to every size. sizes: {budget: bytes on disk}; shared: the rest of their recipes (`alike`), which are
    of the calibration of `job`."""
    size = lambda content: planned_bytes(job, (), shared | content)  # noqa: E731
    return [
        found
        for budget, wanted in sizes.items()
        for found in (
            *(by_share(name, stages, budget, wanted, size) for name, stages in BY_SHARE.items()),
            *(by_bits(name, stages, budget, wanted, size) for name, stages in BY_BITS.items()),
        )
    ]


def planned_bytes(job: Run, overrides: Sequence[str], content: str | dict) -> int:
    """Bytes on disk of what a recipe would make."""
    job.recipe = load_recipe(content, [*overrides, "evaluate.perplexity=[]"])
    return plan_stages(job)[-1]["accounting"]["disk_bytes"]


def by_share(
    route: str, stages: Callable[[float], list[dict]], budget: str, wanted: int, size: Callable[[dict], int]
) -> Drawn:
    """The least share that has to go for `wanted` bytes, found by halving: the more goes, the fewer bytes. A share that
    a stage refuses is too large."""

    def tried(part: int) -> int | MoesvdError:
        try:
            return size({"stages": SIZED_BY.get(route, stages)(part / PARTS)})
        except MoesvdError as refused:
            return refused

    low, high = 0, PARTS - 1  # low leaves too much
    found: int | MoesvdError = tried(high)
    while high - low > 1:
        middle = (low + high) // 2
        made = tried(middle)
        if isinstance(made, MoesvdError) or made <= wanted:
            high, found = middle, made
        else:
            low = middle
    if isinstance(found, MoesvdError):
        return Drawn(route, budget, None, str(found))
    if found > wanted:
        return Drawn(route, budget, None, f"{found} bytes at the least, of {wanted}")
    if high == 1:
        return Drawn(route, budget, None, f"nothing has to go for {wanted} bytes")
    return Drawn(route, budget, stages(high / PARTS))


def by_bits(route: str, every: list[list[dict]], budget: str, wanted: int, size: Callable[[dict], int]) -> Drawn:
    """The most bits that fit in `wanted` bytes."""
    found = 0
    for stages in every:
        found = size({"stages": stages})
        if found <= wanted:
            return Drawn(route, budget, stages)
    return Drawn(route, budget, None, f"{found} bytes at the least, of {wanted}")


def best(records: Mapping[str, dict], budgets: Sequence[str]) -> Table:
    """For each size and text the best route and the one after it. records: by names of `Drawn` and `fit@budget`."""
    texts = list(dict.fromkeys(text for record in records.values() for text in record["perplexity"]))
    rows: list[list[str | float]] = []
    for budget in budgets:
        there = {name.partition("@")[0]: r for name, r in records.items() if name.endswith(f"@{budget}")}
        for text in texts:
            for measure, values in measures(there, text).items():
                first, *others = sorted(values, key=lambda route: values[route])
                second = others[0] if others else first
                rows.append([budget, text, measure, first, _short(values[first]), second, _short(values[second])])
    return Table("The best route at each size", ["size", "text", "by", "best", "its", "next", "its "], rows)


def measures(records: Mapping[str, dict], text: str) -> dict[str, dict[str, float]]:
    """{what was measured: {route: figure}}, less is better: perplexity, and mean divergence from the original where all
    records have it."""
    on = {route: record["perplexity"][text] for route, record in records.items()}
    found = {"perplexity": {route: figures["ppl"] for route, figures in on.items()}}
    if all("difference" in figures for figures in on.values()):
        found["divergence"] = {route: figures["difference"]["mean"] for route, figures in on.items()}
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")
