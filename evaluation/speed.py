"""Tokens per second of models side by side: they take turns in one process, so that what else the machine does
meets all of them."""

import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import torch
from torch import nn

from ..calibration.store import fingerprint
from ..errors import UsageError
from ..memory.files import read_json, write_json
from ..model.experts import find_experts
from .flops import flops_per_token
from .random_model import open_model, uniform_layout
from .record import SPEED
from .roofline import bytes_touched, machine_peaks, synchronized_time

Report = Callable[[str, int, int], None]
PHASES = ("prefill", "decode")


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
    """`measure` of the folders, and of the first one with uniform factors and random weights at each ratio. ValueError
    where two models have one name."""
    models: dict[str, nn.Module] = {}
    for folder in folders:
        name = _name(folder)
        if name in models:
            raise UsageError(f"{folder}: is called {name!r} like another; give each model once")
        models[name] = open_model(folder, device)
    for ratio in ratios:
        layout, dtype = uniform_layout(folders[0], ratio), _dtype(models[_name(folders[0])])
        models[f"uniform{round(100 * ratio)}"] = open_model(folders[0], device, layout, dtype)
    return measure(models, batches, lengths, tokens, repeats, report)


def write_speed(result: dict, folder: Path) -> None:
    """speed.json beside the weights of a folder, where it has some: its part of what was measured."""
    if any(folder.glob("*.safetensors")):
        mine = [cell for cell in result["cells"] if cell["model"] == _name(folder)]
        found = {"fingerprint": fingerprint(folder), "machine": result["machine"], "cells": mine}
        write_json(folder / SPEED, found)


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
        start = synchronized_time(device)
        out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        seconds["prefill"] = synchronized_time(device) - start, *_taken(clock)
        start = synchronized_time(device)
        for _ in range(tokens):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        seconds["decode"] = synchronized_time(device) - start, *_taken(clock)
    return seconds


def _taken(clock: dict[str, float]) -> tuple[float, float]:
    return clock.pop("seconds", 0.0), clock.pop("processor", 0.0)


@contextmanager
def _expert_clock(model, device):
    """Adds up the time that is spent inside experts modules, and this process's processor time."""
    clock: dict[str, float] = {}

    def before(module, args):
        clock["start"], clock["processor start"] = synchronized_time(device), time.process_time()

    def after(module, args, out):
        clock["seconds"] = clock.get("seconds", 0.0) + synchronized_time(device) - clock["start"]
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


def _dtype(model: nn.Module) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
