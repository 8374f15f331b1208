"""MoE-SVD's own plan for stage `svd`: V is shared and U trimmed in the layers that `paper_layers` chooses, and one
share of the full rank is solved for all of them."""

from ..checkpoint.layout import dense_layout, factor_part
from ..decompose.ranks import STEP, level_ranks
from ..decompose.sharing import stored_factors
from ..planning.by_bytes import NotReachable
from ..planning.context import StageError
from ..planning.parts import parts_by_rank
from ..runtime.parts import FactorPart, Projections
from .paper_layers import choose_items, named_paths
from .svd import Svd

Item = tuple[str, str]  # path and projection


def plan_paper(survey: dict, budget: int, options: Svd) -> tuple[dict, dict]:
    """Layout and decisions of the experts: `budget` parameters for all of them, spent to within a step of a rank; not
    asked where the options give the rank."""
    units = {path: _units(path, entry, options) for path, entry in survey.items()}
    paths = list(survey)
    dense, full = [], []
    for path, entry in survey.items():
        sizes = {name: entry["experts"] * out * i for name, (out, i) in entry["shapes"].items()}
        entry["full"] = {
            name: min(min(shape), sizes[name] // units[path][name]) for name, shape in entry["shapes"].items()
        }
        dense.append(list(sizes.values()))
        full.append([units[path][name] * rank for name, rank in entry["full"].items()])
    names = {path: list(survey[path]["shapes"]) for path in paths}
    if options.layers is None:
        removed = sum(map(sum, dense)) - budget
        chosen = choose_items([survey[path]["sensitivity"] for path in paths], dense, full, removed, survey, options)
        items = [(paths[layer], names[paths[layer]][p]) for layer, p in chosen]
        items.sort(key=lambda item: -survey[item[0]]["sensitivity"])  # the most sensitive are rounded up first
    else:
        items = [(path, name) for path in named_paths(survey, options.layers) for name in names[path]]
    layout: dict[str, Projections] = {}
    decisions: dict[str, dict] = {}
    for path, entry in survey.items():
        decomposed = [name for name in names[path] if (path, name) in items]
        decisions[path] = {"sensitivity": entry["sensitivity"], "decomposed": decomposed}
        layout[path] = dense_layout(entry["experts"], entry["shapes"])
    for (path, name), found in _ranks(survey, items, units, dense, budget, options).items():
        if shares_factors(options, survey[path]["experts"]):
            layout[path][name] = [_shared_part(survey[path], found[0], options)]
        else:
            layout[path][name] = parts_by_rank(found)
        decisions[path].setdefault("ranks", {})[name] = found[0] if options.share != "none" else found
    return layout, decisions


def _ranks(survey, items: list[Item], units, dense, budget: int, options: Svd) -> dict[Item, list[int]]:
    """Ranks of the experts of each item, one for each: the given one, or what spends the budget."""
    if options.rank is not None:
        for path, name in items:
            full = survey[path]["full"][name]
            if options.rank > full:
                raise StageError(
                    f"{path}.{name}: svd.rank {options.rank}: above {full} factors are exact, or as large as the "
                    "matrices; lower it"
                )
        return {(path, name): [options.rank] * survey[path]["experts"] for path, name in items}
    total, held = sum(map(sum, dense)), {path: dict(zip(survey[path]["shapes"], d)) for path, d in zip(survey, dense)}
    chosen = sum(held[path][name] for path, name in items)
    left_over = budget - total + chosen
    most = sum(units[path][name] * survey[path]["full"][name] for path, name in items)
    least = sum(units[path][name] * STEP for path, name in items)
    if options.layers is not None and not least <= left_over <= most + 0.005 * total:
        raise NotReachable(
            f"svd.layers: these {len(options.layers)} layers can remove {(chosen - most) / total:.3f} to "
            f"{(chosen - least) / total:.3f} of the expert parameters, and {(total - budget) / total:.3f} are asked "
            "for; give others, or another ratio",
            total - chosen + most if left_over > most else None,
        )
    if options.share == "none":
        ranks = own_ranks(survey, items, left_over)
    else:
        full_ranks = [survey[path]["full"][name] for path, name in items]
        shared = level_ranks([units[path][name] for path, name in items], full_ranks, left_over)
        ranks = {item: [rank] * survey[item[0]]["experts"] for item, rank in zip(items, shared)}
    require_ranks(ranks)
    return ranks


def require_ranks(ranks: dict[Item, list[int]]) -> None:
    """StageError where a matrix would be nothing at all."""
    if nothing := next((f"{path}.{name}" for (path, name), found in ranks.items() if min(found) == 0), None):
        raise NotReachable(f"{nothing}: the ratio leaves some of its matrices no rank at all; lower it")


def own_ranks(survey: dict, items: list[Item], budget: int) -> dict[Item, list[int]]:
    """Ranks of each expert of the (path, projection) items: one share of the full rank, a step more for the first."""
    owners = [item for item in items for _ in range(survey[item[0]]["experts"])]
    shapes = [survey[path]["shapes"][name] for path, name in owners]
    found: dict[Item, list[int]] = {}
    for item, rank in zip(owners, level_ranks([sum(s) for s in shapes], [min(s) for s in shapes], budget)):
        found.setdefault(item, []).append(rank)
    return found


def shares_factors(options: Svd, experts: int) -> bool:
    """Whether so many experts have a right factor in common. A shared expert is alone and has its own factors."""
    return options.method == "moe_svd" and options.share != "none" and experts > 1


def kept_lefts(options: Svd, group: int) -> int:
    """How many left factors a group of so many experts keeps. ValueError where it does not have as many."""
    if options.share == "equation_6":
        return group
    kept = options.keep_u if options.trim_u is None else group - options.trim_u
    if 1 <= kept <= group:
        return kept
    if options.trim_u is None:
        raise ValueError(f"keep_u {options.keep_u}: a group has {group} experts; give 1 to {group}")
    raise ValueError(f"trim_u {options.trim_u}: a group has {group} experts; give 0 to {group - 1}")


def _units(path: str, entry: dict, options) -> dict[str, int]:
    """Parameters per unit of rank of each projection, all experts together."""
    count = entry["experts"]
    lefts = rights = count
    if shares_factors(options, count):
        if count % options.groups:
            raise StageError(f"{path}: {count} experts do not part into groups: {options.groups} equal ones")
        try:
            kept = kept_lefts(options, count // options.groups)
        except ValueError as error:
            raise StageError(f"{path}: {error}") from error
        lefts, rights = stored_factors(options.share, entry["frequency"], kept, options.groups)
    entry["lefts"], entry["rights"] = lefts, rights
    return {name: lefts * out + rights * in_features for name, (out, in_features) in entry["shapes"].items()}


def _shared_part(entry: dict, rank: int, options) -> FactorPart:
    """Which left factor an expert takes is known when the layer is done: the rows are filled in there."""
    count = entry["experts"]
    rights = [e * entry["rights"] // count for e in range(count)]
    lefts = [min(e, entry["lefts"] - 1) for e in range(count)]
    return factor_part(list(range(count)), rank, left=lefts, right=rights)
