"""The memory-perplexity front of a model: many budgets, and what else one could do with the same bytes."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..calibration.store import fingerprint
from ..checkpoint.finish import origin_of
from ..errors import UsageError
from ..evaluation.inputs import EvalSpec, protocol_of
from ..evaluation.paper_tables import table8
from ..evaluation.plot import plot_bytes
from ..evaluation.record import RECORD, answers, evaluate, write
from ..evaluation.table import Table, render, save
from ..evaluation.text_figures import is_compared
from ..memory.files import read_json
from ..model.carried import carry_files
from ..model.experts import find_experts, find_linears, weight_parameters
from ..model.hf_internals import no_loading_bars
from ..model.load import load
from ..model.stream import StreamedModel
from ..recipe.load import load_recipe
from ..run.run import Run
from .bench import compare, written
from .routes import alike, best, planned_bytes, routes

Report = Callable[[str, int, int], None]
BASELINES = ("gptq4", "gptq3", "gptq2", "moe-svd-paper", "moe-svd-paper-gptq4")
PRESETS = {"fast": "fit-fast", "balanced": "fit", "best": "fit-best"}


def front(
    model: Path,
    out: Path,
    budgets: Sequence[str],
    texts: dict[str, str],
    length: int | None = None,
    preset: str = "balanced",
    overrides: Sequence[str] = (),
    device: str = "cpu",
    report: Report = lambda what, done, total: None,
) -> tuple[list[dict], Table, Table]:
    """Records, their table, and the best route to each size, of a recipe at every budget (`2.3bpw`, `20GB`), of all
    other routes to the same bytes (`routes`), of the BASELINES and of NF4.

    One calibration serves all. Writes what `compare` writes, and OUT/routes.md, .csv, .json with the best route to each
    size. UsageError for an unknown preset.
    """
    if preset not in PRESETS:
        raise UsageError(f"preset {preset!r}: is none of {', '.join(PRESETS)}")
    fit = PRESETS[preset]
    recipes: dict[str, tuple[str | dict, list[str]]] = {f"{fit}@{b}": (fit, [f"budget={b}"]) for b in budgets}
    job = Run(load_recipe(fit, [*overrides, f"budget={budgets[0]}"]), model, out / "sizes", device, report)
    sizes = {b: planned_bytes(job, [*overrides, f"budget={b}"], fit) for b in budgets}
    shared = alike(fit, overrides)
    drawn = routes(job, sizes, shared)
    recipes |= {one.name: (shared | {"stages": one.stages}, []) for one in drawn if one.stages}
    recipes |= {name: (name, []) for name in BASELINES}
    files = written(recipes, out / "recipes", overrides)
    nf4 = nf4_record(model, out / "nf4", EvalSpec(texts, length=length, original=model), device)
    found, _ = compare(model, [str(file) for file in files.values()], out, texts, length, (), device, report, [nf4])
    named = {name: record | {"name": name} for name, record in zip(["original", *files, "nf4"], found)}
    table, judged = table8(list(named.values())), best(named, budgets)
    save(table, out / "table8")
    plot_bytes(list(named.values()), out / "perplexity-against-bytes.png")
    save(judged, out / "routes")
    absent = "".join(f"- {one.name}: {one.why}\n" for one in drawn if not one.stages)
    (out / "routes.md").write_text(f"{render(judged, 'markdown')}\nRoutes that do not come there:\n\n{absent}")
    return list(named.values()), table, judged


def nf4_record(model: Path, out: Path, wanted: EvalSpec, device: str = "cpu") -> dict:
    """The record of a model whose experts and linears are in bitsandbytes' NF4: evaluated as dense weights that hold
    its values, with the bytes that it would store (codes, and a float32 scale for each block). Needs the whole model
    in memory."""
    file, source = out / RECORD, fingerprint(model)
    if file.is_file():
        found = read_json(file)
        of_source = found | {"fingerprint": found.get("source_fingerprint")}
        compared = all(is_compared(figures, model) for figures in found["perplexity"].values())
        if compared and answers(of_source, source, protocol_of(model, wanted, device), wanted):
            return found
    made = load(model)
    layers = made.get_submodule(StreamedModel(model).layers_path)
    weights = sum(p.numel() for _, experts in find_experts(layers) for p in weight_parameters(experts))
    with torch.no_grad():
        saved_experts = sum(_round_to_nf4(p) for _, experts in find_experts(layers) for p in weight_parameters(experts))
        saved = saved_experts + sum(_round_to_nf4(linear.weight) for _, linear in find_linears(layers))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        with no_loading_bars():
            made.save_pretrained(folder)
        carry_files(model, Path(folder))
        record = evaluate(folder, wanted, device, "nf4") | {"path": out.name, "source_fingerprint": source}
        record["base_model"] = origin_of(model)["base_model"]  # not the folder's that is gone
    for key in ("disk_bytes", "resident_bytes"):
        record["memory"][key] -= saved
    item = next(layers.parameters()).element_size()
    record["accounting"]["bits_per_expert_weight"] = 8 * (item * weights - saved_experts) / weights
    write(record, file)
    return record


def _round_to_nf4(parameter: torch.Tensor) -> int:
    """Rounds in place; the bytes that NF4 saves."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(parameter.data.contiguous(), quant_type="nf4")
    parameter.copy_(dequantize_4bit(codes, state))
    stored = codes.numel() * codes.element_size() + state.absmax.numel() * state.absmax.element_size()
    return parameter.numel() * parameter.element_size() - stored
