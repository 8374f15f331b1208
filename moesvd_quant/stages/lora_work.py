"""The work of stage `lora`."""

import json
import math
from pathlib import Path

import torch

from ..checkpoint.layout import layout_of
from ..healing.adapters import Updates, save_peft, update_file
from ..healing.layerwise import heal_layerwise
from ..healing.needs import healing_needs
from ..healing.record import write_curve
from ..healing.rounding import heal_layer, validation_loss
from ..healing.terms import TermError, healed_layout
from ..healing.whole import heal_whole
from ..memory.files import write_json
from ..model.stream import StreamedModel
from ..planning.context import Context, Plan, StageError, require_experts
from .lora import TRAINING, Lora

RECORD, ADAPTER = "healing.json", "adapter"
OBJECTIVE = {"lm": "loss, nats per token", "distill": "KL, nats per token", "layerwise": "relative output error"}


def plan(context: Context, options: Lora) -> Plan:
    """The parent's layout; beside what is packed, where adapters are trained, a low-rank term."""
    require_experts(context.parent)
    packed = layout_of(context.parent).packed
    if packed and options.train == "factors":
        raise StageError("lora.train: factors: this checkpoint's are packed; use adapters, or heal before gptq")
    if not packed and options.train == "scales":
        raise StageError("lora.train: scales: nothing is packed yet; put lora after gptq or sparsify")
    if packed and options.frozen == "nf4":
        raise StageError("lora.frozen: nf4: this checkpoint is packed already; leave it out")
    require_recomputable(context, options)
    _require_original(context, options)
    try:
        layout = healed_layout(context.parent, options.rank, options.train == "adapters", options.attention)
    except TermError as error:
        raise StageError(str(error)) from error
    needs = healing_needs(context.parent, layout, options, context.training.train.shape, context.statistics)
    needs.require(free_memory(context), context.statistics.store, options)
    return Plan(layout, notes={"needs": needs.to_dict()}, storages=context.storages)


def require_recomputable(context: Context, options: Lora) -> None:
    """StageError where activations are to be recomputed and the model cannot."""
    if options.checkpointing and not context.parent.model.supports_gradient_checkpointing:
        kind = type(context.parent.model).__name__
        raise StageError(f"checkpointing: {kind} cannot recompute activations; set checkpointing: false")


def free_memory(context: Context) -> int:
    """Bytes that training may take."""
    if context.device.type == "cuda":
        return torch.cuda.mem_get_info(context.device)[0]
    return context.statistics.memory.free()


def _require_original(context: Context, options: Lora) -> None:
    """StageError where the model to learn from is the very one to heal."""
    if options.objective == "lm":
        return
    original = layout_of(StreamedModel(context.statistics.folder))
    if original.experts or original.packed:
        raise StageError(
            f"lora.objective: {options.objective} learns from the original, and {context.statistics.folder} is "
            "compressed already; run the whole recipe on the original model, or use objective: lm"
        )


def prepare(context: Context, options: Lora, planned: Plan, folder: Path) -> Plan:
    """Trains, once; state and result lie in folder/training. The plan is the input's own where healing did not help."""
    record = folder / RECORD
    if not record.is_file():
        _heal(context, options, planned, folder)
    outcome = json.loads(record.read_text())
    if outcome["healed"]:
        return Plan(planned.layout, notes={"healing": outcome})
    return Plan(healed_layout(context.parent, 0, False, False), notes={"healing": outcome})


def _heal(context: Context, options: Lora, planned: Plan, folder: Path) -> None:
    state = folder / TRAINING
    if options.objective != "lm" and context.parent.folder == context.statistics.folder:
        raise StageError(
            f"lora.objective: {options.objective}: nothing is compressed yet; put lora after svd, d2 or gptq"
        )
    state.mkdir(exist_ok=True)
    validation, known = context.training.validation, context.statistics
    scratch = known.scratch(2 * validation.numel() * known.sizes.row)
    history, adapters = (heal_layerwise if options.objective == "layerwise" else heal_whole)(
        context, options, planned.layout, state
    )

    def loss(heal) -> float:
        return validation_loss(known.model(context.parent.folder), validation, heal, scratch)

    before = loss(None)
    streamed = known.model(context.parent.folder)
    trained = 0

    def heal(index: int, layer) -> None:
        nonlocal trained
        updates = Updates.read(update_file(state, index))
        trained += updates.parameters()
        heal_layer(streamed, index, layer, planned.layout, updates, context.seed)

    after = validation_loss(streamed, validation, heal, scratch)
    if not math.isfinite(after):
        raise StageError(f"lora: the healed model's validation loss is {after}; lower lora.lr")
    write_curve(folder, history, OBJECTIVE[options.objective])
    if adapters.config is not None and after < before:
        save_peft(folder / ADAPTER, adapters.config, adapters.tensors, context.parent.folder.name)
    outcome = {
        "healed": after < before,
        "validation_perplexity_before": math.exp(before),
        "validation_perplexity_after": math.exp(after),
        "validation_tokens": validation.numel(),
        "training_tokens": options.batch * context.training.train.shape[1] * sum("loss" in e for e in history),
        "distinct_training_tokens": context.training.train.unique(dim=0).numel(),
        "trained_parameters": trained,
    }
    if after >= before:
        outcome["why_not"] = "the healed weights, as they would ship, are not better on held-out text: the input stays"
    write_json(folder / RECORD, outcome)


def run_layer(context: Context, options: Lora, index: int, layer, statistics: dict, plan: Plan) -> dict:
    """Merges what was trained into a loaded layer, or leaves it as it is."""
    updates = Updates({}, {}, {})
    if plan.notes["healing"]["healed"]:
        updates = Updates.read(update_file(context.folder / TRAINING, index))
    heal_layer(context.parent, index, layer, plan.layout, updates, context.seed)
    return {}


def changes(context: Context, plan: Plan) -> set[str]:
    """Names of all that training changed."""
    if not plan.notes["healing"]["healed"]:
        return set()
    count = len(context.parent.layer_names)
    return set().union(*(Updates.read(update_file(context.folder / TRAINING, index)).names() for index in range(count)))
