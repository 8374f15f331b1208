"""A budget of bytes for methods with one unknown, the parameters of their factors: a search over their plans."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checkpoint.layout import dense_part
from ..model.experts import expert_count, find_experts, shapes_of
from ..model.stream import StreamedModel
from ..runtime.formats import FLOAT, Format
from ..runtime.parts import Projections
from .allocation import named, plain_storage
from .context import Context, StageError
from .shares import parameters_of

Layouts = dict[str, Projections]  # by path
Shapes = dict[str, dict[str, tuple[int, int, int]]]  # (experts, out, in) of each projection, by path
TOLERANCE = 10**6  # the search ends at this part of all parameters; ranks go in far larger steps


class NotReachable(StageError):
    """No plan spends so many parameters; `fewer`: the nearest smaller number that one does, where it is known."""

    def __init__(self, message: str, fewer: int | None = None):
        super().__init__(message)
        self.fewer = fewer


@dataclass(frozen=True)
class Made:
    """A plan of experts: their layouts, decisions, and bytes at the recipe's end."""

    experts: Layouts
    decisions: dict
    size: int


def require_one_unknown(context: Context, key: str) -> None:
    """Before any walk: StageError where the budget would have to decide more than `key`."""
    packing, limits = context.packing, context.limits
    if packing is not None and packing.needs_budget():
        other = f"{packing.name}.{packing.budget_option}"
        raise StageError(f"{other}: is open as well as {key}, and the budget can decide one of them here; give {other}")
    for name in ("keep", "min_bits"):
        if getattr(limits, name):
            raise StageError(f"limits.{name}: matrices are chosen one by one with svd.method: global alone; remove it")


def spend(context: Context, decide: Callable[[int], tuple[Layouts, dict]]) -> Made:
    """The plan of the most parameters whose experts take at most `context.budget` bytes at the recipe's end; the
    smallest one where that is zero.

    decide: the layouts and decisions of so many parameters for all experts; NotReachable where none does. StageError
    with the least possible where that is more.
    """
    limit, least, best = context.budget or 0, None, None
    shapes = shapes_of_all(context.parent)
    total = parameters_of(context.parent)
    low, high = 0, total
    while high - low > max(1, total // TOLERANCE):
        middle = (low + high) // 2
        made = _made(context, shapes, middle, decide)
        if made is not None and (least is None or made.size < least.size):
            least = made
        if made is not None and made.size > limit:
            high = middle
            continue
        low, best = middle, made or best
    if best is not None:
        return best
    if least is None:
        raise StageError("budget: no number of parameters fits these options; change them")
    if limit:
        raise StageError(f"budget: {limit / 1e6:.3f} MB of experts cannot be met: the least is {least.size / 1e6:.3f}")
    return least


def _made(context: Context, shapes: Shapes, parameters: int, decide) -> Made | None:
    """The plan that spends at most so many parameters; None where there is none."""
    try:
        experts, decisions = decide(parameters)
    except NotReachable as error:
        if error.fewer is None or error.fewer >= parameters:
            return None
        return _made(context, shapes, error.fewer, decide)
    return Made(experts, decisions, expert_bytes(experts, shapes, context))


def expert_bytes(experts: Layouts, shapes: Shapes, context: Context) -> int:
    """Bytes of all banks of these layouts as the recipe's last stage will store them: quantized, or in the stored
    precision where none quantizes. shapes: of all experts; those without a layout stay dense."""
    packing: Any = context.packing
    form: Format = FLOAT
    codec = packing.codec() if packing is not None else None
    storage = plain_storage(packing, context.limits, codec) if codec is not None else None
    total = 0
    for path, matrices in shapes.items():
        for name, (count, *shape) in matrices.items():
            for part in experts.get(path, {}).get(name) or [dense_part(list(range(count)))]:
                for bank, (rows, columns) in part.sizes(*shape).items():
                    if codec is not None:
                        with named(f"{path}.{name}"):
                            form = codec.form(storage, columns, bank, part.columns is not None)
                    size = max(part.users(bank)) + 1, rows, columns
                    total += form.bank_bytes(size, context.parent.stored_dtype)
    return total


def shapes_of_all(parent: StreamedModel) -> Shapes:
    """Of all experts of a model."""
    return {
        f"{name}.{path}": {
            projection: (expert_count(experts), *shape) for projection, shape in shapes_of(experts).items()
        }
        for layer, name in zip(parent.layers, parent.layer_names)
        for path, experts in find_experts(layer)
    }
