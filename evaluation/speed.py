"""Tokens per second of models side by side: they take turns in one process, so that what else the machine does
meets all of them."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from accelerate import init_empty_weights
from torch import nn

from ..calibration.store import fingerprint
from ..errors import UsageError
from ..memory.files import read_json, write_json
from ..model.experts import expert_count, find_experts
from ..runtime.parts import Layout
from ..runtime.stored import Stored
from .flops import flops_per_token
from .memory import resident_bytes
from .record import SPEED

Report = Callable[[str, int, int], None]
PHASES = ("prefill", "decode")


def open_model(folder: str | Path, device: str = "cpu", layout: Layout | None = None, dtype: torch.dtype | None = None):
    """A model in 16 bit (or its own dtype) to be timed. A folder with a config and no weights gives random ones at full
    shape; so does `layout`, a layout of ours for the config."""
    import moesvd_quant

    folder = Path(folder)
    if layout is None and any(folder.glob("*.safetensors")):
        return moesvd_quant.load(folder, device=device)
    return _filled(describe_model(folder, layout, dtype), device).eval()


def describe_model(folder: Path, layout: Layout | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a folder with a config, or of a layout of ours for that, on the meta device."""
    from ..model.folder import class_for, read_config
    from ..runtime.modeling_moesvd import config_class, model_class

    config = read_config(folder)
    dtype = dtype or config.dtype or torch.bfloat16
    if layout is not None:
        config = config_class(layout.native_type).from_dict(config.to_dict() | {"moesvd": layout.to_dict()})
    with init_empty_weights(include_buffers=False):
        described = getattr(config, "moesvd", None)
        kind = model_class(described["native_type"]) if described else class_for(config)
        return kind._from_config(config, dtype=dtype)


def _filled(model: nn.Module, device: str) -> nn.Module:
    """The model with random parameters of a usual size in the place of its meta ones."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        formats = module.stored_tensors() if isinstance(module, Stored) else {}
        for name, old in module._parameters.items():
            if old is None:
                continue
            tensor = torch.empty(old.shape, dtype=old.dtype, device=device)
            if tensor.dim() == 1 and "norm" in type(module).__name__.lower():
                tensor.fill_(1)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=generator)
            elif name in formats:
                form, kind = formats[name]
                form.random(kind, tensor, generator)
            else:  # channels of a base
                tensor.zero_()
            module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    return model.to(device)


def uniform_layout(folder: str | Path, ratio: float) -> Layout:
    """Layout in which every expert matrix, gate and up as one, has factors of one rank share, `ratio` of the parameters
    gone."""
    from ..checkpoint.layout import factor_part
    from ..decompose.ranks import level_ranks
    from ..model.experts import shapes_of
    from ..model.folder import class_for, read_config
    from ..runtime.parts import joined

    config = read_config(Path(folder))
    with init_empty_weights():
        model = class_for(config)._from_config(config)
    layout, items = Layout(config.model_type), []
    for path, experts in find_experts(model):
        items += [(path, name, shape, expert_count(experts)) for name, shape in joined(shapes_of(experts)).items()]
    budget = int((1 - ratio) * sum(out * inner * count for *_, (out, inner), count in items))
    ranks = level_ranks([count * sum(shape) for *_, shape, count in items], [min(i[2]) for i in items], budget)
    for (path, name, _, count), rank in zip(items, ranks):
        layout.experts.setdefault(path, {})[name] = [factor_part(list(range(count)), rank)]
    return layout


def measure(
    models: dict[str, nn.Module],
    batches: Sequence[int] = (1, 4, 16),
    lengths: Sequence[int] = (32, 128),
    tokens: int = 16,
    repeats: int = 7,
    report: Report = lambda what, done, total: None,
) -> dict:
    """Times models (the first is what others are compared with) over batch sizes and prompt lengths.

    In every repeat each model, in turn, reads random prompts (prefill) and writes `tokens` tokens greedily (decode).
    {"machine": {...}, "cells": [{"model", "batch", "length", "prefill": {...}, "decode": {...}}]}; a phase has tokens/s
    (median, min, max over repeats), "experts_seconds", "speedup" and "experts_speedup" (median of the ratios to the
    first model within each repeat), "experts_processor_speedup" (the same of processor time on a CPU, which other
    processes hardly touch), "gflops" per token, "bytes" moved at least, and "roofline", the tokens/s that the
    machine's measured arithmetic and memory rates would allow.
    """
    device = next(next(iter(models.values())).parameters()).device
    machine, cells = machine_peaks(device, _dtype(next(iter(models.values())))), []
    grid = [(batch, length) for batch in batches for length in lengths]
    for done, (batch, length) in enumerate(grid):
        report("speed: batch and length", done, len(grid))
        times = _alternate(models, batch, length, tokens, repeats)
        cells += [_cell(name, models, times, batch, length, tokens, machine) for name in models]
    report("speed: batch and length", len(grid), len(grid))
    return {"machine": machine, "cells": cells}


def run_speed(
    folders: Sequence[Path], ratios: Sequence[float], batches: Sequence[int], lengths: Sequence[int], tokens: int,
    repeats: int, device: str, report: Report,
) -> dict:  # fmt: skip
    """`measure` of the folders, and of the first one with uniform factors and random weights at each ratio; writes
    speed.json beside the weights of each folder that has some. ValueError where two models have one name."""
    models: dict[str, nn.Module] = {}
    for folder in folders:
        name = _name(folder)
        if name in models:
            raise UsageError(f"{folder}: is called {name!r} like another; give each model once")
        models[name] = open_model(folder, device)
    for ratio in ratios:
        layout, dtype = uniform_layout(folders[0], ratio), _dtype(models[_name(folders[0])])
        models[f"uniform{round(100 * ratio)}"] = open_model(folders[0], device, layout, dtype)
    result = measure(models, batches, lengths, tokens, repeats, report)
    for folder in folders:
        if any(folder.glob("*.safetensors")):
            mine = [cell for cell in result["cells"] if cell["model"] == _name(folder)]
            found = {"fingerprint": fingerprint(folder), "machine": result["machine"], "cells": mine}
            write_json(folder / SPEED, found)
    return result


def _name(folder: Path) -> str:
    manifest = folder / "moesvd.json"
    return read_json(manifest)["name"] if manifest.is_file() else "original"


def _alternate(models, batch, length, tokens, repeats) -> dict:
    """{model: {phase: (seconds, seconds in experts, processor seconds there) per repeat}}; the first round warms up
    and is not kept."""
    times: dict = {name: {phase: [] for phase in PHASES} for name in models}
    vocabulary = min(model.config.vocab_size for model in models.values())
    for repeat in range(repeats + 1):
        generator = torch.Generator().manual_seed(repeat)
        prompt = torch.randint(0, vocabulary, (batch, length), generator=generator)
        for name, model in models.items():
            for phase, seconds in _run(model, prompt, tokens).items():
                if repeat:
                    times[name][phase].append(seconds)
    return times


@torch.no_grad()
def _run(model, prompt, tokens) -> dict[str, tuple[float, float, float]]:
    device = next(model.parameters()).device
    prompt, seconds = prompt.to(device), {}
    with _expert_clock(model, device) as clock:
        start = _now(device)
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        seconds["prefill"] = _now(device) - start, *_taken(clock)
        start = _now(device)
        for _ in range(tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        seconds["decode"] = _now(device) - start, *_taken(clock)
    return seconds


def _taken(clock: dict[str, float]) -> tuple[float, float]:
    return clock.pop("seconds", 0.0), clock.pop("processor", 0.0)


def _now(device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _expert_clock(model, device):
    """Adds up the time that is spent inside experts modules, and this process's processor time."""
    clock: dict[str, float] = {}

    def before(module, args):
        clock["start"], clock["processor start"] = _now(device), time.process_time()

    def after(module, args, out):
        clock["seconds"] = clock.get("seconds", 0.0) + _now(device) - clock["start"]
        clock["processor"] = clock.get("processor", 0.0) + time.process_time() - clock["processor start"]

    handles = []
    for _, experts in find_experts(model):
        handles += [experts.register_forward_pre_hook(before), experts.register_forward_hook(after)]
    try:
        yield clock
    finally:
        for handle in handles:
            handle.remove()


def _cell(name, models, times, batch, length, tokens, machine) -> dict:
    model, base = models[name], next(iter(models))
    device = next(model.parameters()).device
    cell: dict = {"model": name, "batch": batch, "length": length}
    for phase, count in (("prefill", batch * length), ("decode", batch * tokens)):
        mine, theirs = times[name][phase], times[base][phase]
        rates = [count / seconds for seconds, *_ in mine]
        at_once, context = (count, length) if phase == "prefill" else (batch, length + tokens / 2)
        flops = flops_per_token(model, context)
        moved = bytes_touched(model, at_once)
        limit = at_once / max(at_once * flops["total"] / machine["flops"], moved["total"] / machine["bandwidth"])
        cell[phase] = {
            "tokens_per_second": median(rates),
            "min": min(rates),
            "max": max(rates),
            "experts_seconds": median(seconds for _, seconds, _ in mine),
            "speedup": median(t[0] / m[0] for t, m in zip(theirs, mine)),
            "experts_speedup": median(t[1] / m[1] for t, m in zip(theirs, mine)),
            "experts_processor_speedup": None
            if device.type == "cuda"
            else median(t[2] / m[2] for t, m in zip(theirs, mine)),
            "gflops": flops["total"] / 1e9,
            "experts_gflops": flops["experts"] / 1e9,
            "bytes": moved["total"],
            "roofline": limit,
        }
    return cell


def bytes_touched(model: nn.Module, tokens: int) -> dict[str, float]:
    """Bytes of weights that a forward pass over so many tokens reads: all but the experts that nobody was routed to
    (in expectation, by a router that balances) and the rows of embeddings that are not looked up."""
    top_k, experts_size, touched = getattr(model.config, "num_experts_per_tok", 0), 0, 0.0
    for _, experts in find_experts(model):
        size, count = resident_bytes(experts), expert_count(experts)
        experts_size += size
        touched += size * (1 - (1 - top_k / count) ** tokens)
    embeddings = model.get_input_embeddings().weight
    tied = embeddings is getattr(model.get_output_embeddings(), "weight", None)
    rest = resident_bytes(model) - experts_size - (0 if tied else embeddings.numel() * embeddings.element_size())
    return {"experts": touched, "total": touched + rest}


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def machine_peaks(device: torch.device, dtype: torch.dtype) -> dict:
    """{"flops": per second of a large matrix product in dtype, laid out as that of a linear, "bandwidth": bytes per
    second read from memory}: the best of several, measured here and now."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    big = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)  # float32, beyond any cache

    def best(run: Callable, repeats: int = 8) -> float:
        found = []
        for _ in range(repeats):
            start = _now(device)
            run()
            found.append(_now(device) - start)
        return min(found)

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "dtype": str(dtype),
        "flops": 2 * size**3 / best(lambda: a @ b.T),
        "bandwidth": big.numel() * 4 / best(lambda: big.sum()),
    }
