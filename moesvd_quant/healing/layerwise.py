"""Healing layer by layer: each layer of the compressed model learns its original's output, one layer of each in memory.

The compressed layer is given what the healed layers before it put out, so that it also mends their errors.
"""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from ..memory.files import write_json, write_tensors
from ..model.stream import StreamedModel
from ..model.visit import LayerVisit
from ..runtime.parts import Layout
from .adapters import Adapters, Trained, Updates, lora_config, update_file
from .losses import output_error
from .nf4 import freeze_in_nf4
from .rounding import BATCH, heal_layer, layer_seed
from .targets import float_targets
from .terms import into_layout

if TYPE_CHECKING:
    from ..stages.lora import Lora


def heal_layerwise(context, options: "Lora", layout: Layout, folder: Path) -> tuple[list[dict], Adapters]:
    """Trains each layer and leaves its updates in `folder`; a layer that is finished is not trained again. Returns the
    log {"phase": layer, "step", "loss"} and the adapters."""
    known, windows = context.statistics, context.training.train
    scratch = known.scratch(4 * windows.numel() * known.sizes.row)  # of both models, in and out
    original = known.model()
    streamed = known.model(context.parent.folder)
    history: list[dict] = []
    adapters: dict[str, torch.Tensor] = {}
    linears: list[str] = []
    banks: list[str] = []
    for wanted, visit in zip(*(model.walk(windows, BATCH, scratch) for model in (original, streamed))):
        index, name, file = visit.index, streamed.layer_names[visit.index], update_file(folder, visit.index)
        log, adapter = folder / f"losses-{index:05d}.json", folder / f"adapter-{index:05d}.safetensors"
        targets = wanted.outputs()
        original.drop_layer(index)
        if not file.is_file():
            trained, losses = _heal_layer(context.seed, options, streamed, visit, targets, layout)
            write_json(log, losses)
            write_tensors(adapter, trained.peft_tensors(name + "."))
            trained.updates(name + ".").write(file)
            del trained
            streamed.load_layer(index)
        del targets
        history += [{"phase": index, "step": i + 1, "loss": loss} for i, loss in enumerate(json.loads(log.read_text()))]
        adapters |= load_file(adapter)
        heal_layer(streamed, index, visit.layer, layout, Updates.read(file), context.seed)
        if options.train == "adapters":
            found = float_targets(visit.layer, [""], options.attention)
            linears, banks = (had + [f"{name}.{path}" for path in paths] for had, paths in zip((linears, banks), found))
        context.report("lora: layers", index + 1, len(streamed.layer_names))
    return history, Adapters(lora_config(options.rank, linears, banks) if adapters else None, adapters)


def _heal_layer(seed: int, options: "Lora", streamed: StreamedModel, visit: LayerVisit, targets: list, layout: Layout):
    """What was trained of one layer, and the loss of every step. A copy is trained; the streamed layer is empty
    afterwards."""
    index = visit.index
    name, seed, layer = streamed.layer_names[index], layer_seed(seed, index), copy.deepcopy(visit.layer)
    streamed.drop_layer(index)
    new = into_layout(layer, name, layout, streamed.dtype, seed)
    if options.frozen == "nf4":
        freeze_in_nf4(layer, *float_targets(layer, [""], options.attention))
    trained = Trained(layer, [""], options, new, seed)
    sides = ["left", "right"] if options.in_turn else ["both"]
    losses = []
    for phase, side in enumerate(sides):
        steps = options.steps // len(sides) + (phase < options.steps % len(sides))
        losses += _train(layer, trained, side, visit, targets, options, steps, seed + phase)
    return trained, losses


def _train(layer: nn.Module, trained: Trained, side: str, visit, targets, options, steps: int, seed: int):
    parameters = list(trained.tensors(side).values())
    for parameter in trained.tensors().values():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(options.warmup * steps), steps)
    generator, losses = torch.Generator().manual_seed(seed), []
    order: list[int] = []
    per_step = max(1, options.batch // BATCH)
    for _ in range(steps):
        total = 0.0
        for _ in range(per_step):
            if not order:
                order = torch.randperm(len(targets), generator=generator).tolist()
            batch = order.pop()
            with torch.enable_grad():
                loss = output_error(visit.run_batch(layer, batch), targets[batch]) / per_step
                loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
