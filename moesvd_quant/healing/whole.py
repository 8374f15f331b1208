"""Healing of the whole model at once, by next-token loss or by the original's predictions."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from ..model.stream import StreamedModel
from ..runtime.parts import Layout
from .adapters import Adapters, Trained, update_file
from .nf4 import freeze_in_nf4
from .rounding import layer_seed
from .rows import RowPruning
from .targets import float_targets
from .teacher import predictions
from .terms import into_layout
from .trainer import Loss, distill_loss, lm_loss, train

if TYPE_CHECKING:
    from ..stages.lora import Lora


Shape = Callable[..., list[str]]  # as `terms.into_layout`
Prune = Callable[[dict[str, nn.Parameter]], RowPruning]


def planned(
    streamed: StreamedModel, layout: Layout, options: "Lora", seed: int, shape: Shape = into_layout
) -> tuple[nn.Module, list[str]]:
    """The parent with all layers in memory, brought into `layout` by `shape`, in NF4 if so wanted (layer by layer, so
    that it is never whole in 16 bit); and the names of its new parameters."""
    streamed.load_outer()
    new = []
    for index, name in enumerate(streamed.layer_names):
        layer = streamed.load_layer(index)
        made = shape(layer, name, layout, streamed.dtype, layer_seed(seed, index))
        new += [f"{name}.{path}" for path in made]
        if options.frozen == "nf4":
            freeze_in_nf4(layer, *float_targets(layer, [""], options.attention))
    return streamed.model, new


def heal_whole(
    context, options: "Lora", layout: Layout, folder: Path, shape: Shape = into_layout, prune: Prune | None = None
) -> tuple[list[dict], Adapters]:
    """Trains as the stage's options say, with its state in `folder`, where the updates of every layer are left. Returns
    the log and the adapters.

    shape: how each layer is brought into the layout. prune: makes what takes rows away meanwhile, from the trained
    parameters by name.
    """
    work = partial(_train, context, options, layout, folder, shape, prune)
    if options.objective == "lm":
        return work(lm_loss)
    original = context.statistics.model()
    say = partial(context.report, "lora: what the original predicts")
    with predictions(original, context.training.train, context.statistics.store, say) as predict:
        return work(distill_loss(predict))


def _train(
    context, options: "Lora", layout: Layout, folder: Path, shape: Shape, prune: Prune | None, loss: Loss
) -> tuple[list[dict], Adapters]:
    streamed = context.statistics.model(context.parent.folder)
    model, new = planned(streamed, layout, options, context.seed, shape)
    trained = Trained(model, streamed.layer_names, options, new, context.seed)
    sides = ["left", "right"] if options.in_turn else ["both"]
    history: list[dict] = []
    for phase, side in enumerate(sides):
        steps = options.steps // len(sides) + (phase < options.steps % len(sides))
        say = partial(context.report, f"lora: training {side}")
        tensors = trained.tensors(side)
        log = train(
            model, tensors, loss, options, context.training, steps, folder / side, context.device, context.seed, say,
            prune and prune(tensors),
        )  # fmt: skip
        history += [entry | {"phase": phase} for entry in log]
    updates = trained.updates()
    for index, name in enumerate(streamed.layer_names):
        updates.write(update_file(folder, index), name + ".")
    return history, Adapters(trained.config, trained.peft_tensors())
