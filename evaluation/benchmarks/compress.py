"""Processor and wall seconds per million expert weights that compression takes, by what it does.

    python -m moesvd_quant.evaluation.benchmarks.compress

(make bench-compress; a quarter of an hour on a core that nothing else uses).

Random models of two layers in bfloat16: eight experts of which a token takes two (as Mixtral's), and 16 of which it
takes four (as Qwen3's). Each recipe begins without statistics. Time per weight hardly depends on the number of experts
or layers, but for the walk, which costs by the token. Prints Markdown; exit code 1 where a whole is above its bar.
"""

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from moesvd_quant.run.run import Run

SHAPES = {
    "coarse": ("mixtral", dict(hidden_size=1024, intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2)),
    "fine": (
        "qwen3_moe",
        dict(hidden_size=2048, moe_intermediate_size=768, num_experts=16, num_experts_per_tok=4, head_dim=128),
    ),
}
TINY = {
    "mixtral": dict(hidden_size=64, intermediate_size=96, num_local_experts=4, vocab_size=320),
    "qwen3_moe": dict(hidden_size=64, moe_intermediate_size=32, num_experts=4, head_dim=16, vocab_size=320),
}
RECIPES = {
    "gptq3": ("gptq3", []),
    "svd40-gptq3": ("svd-gptq3", ["svd.ratio=0.4"]),
    "fit2.3": ("fit", ["budget=2.3bpw"]),
}
BARS = {"gptq3": 0.4, "fit2.3": 0.8}  # processor seconds per million expert weights
# The functions that do each kind of work: module, and name in it. Time within a function that is called by another one
# counts for its own kind.
PHASES = {
    "reading": ["model.layered:LayeredModel.load"],
    "walk, statistics": [
        "calibration.recording:record_layer", "calibration.recording:pass_on", "calibration.recording:head_gram",
        "calibration.paired:PairedExperts.__init__", "calibration.paired:PairedExperts.down",
        "calibration.paired:PairedWalk._observe", "model.visit:LayerVisit.outputs",
    ],
    "effects": ["calibration.effect:measure_effects", "planning.tables:error_price"],
    "decomposition": ["decompose.whitening:whitened_directions"],
    "plan": ["planning.allocation:plan_budget", "planning.allocation:plan_ratio", "quantize.noise:factor_noise"],
    "targets": [
        "calibration.paired:corrected", "decompose.whitening:left_sums", "decompose.whitening:solved_left",
        "decompose.whitening:refit_right",
    ],
    "Cholesky": [
        "quantize.feedback:HessianFactor.of", "quantize.feedback:conditional_variance",
        "quantize.trellis_codec:TrellisCodec.inputs",
    ],
    "grids": ["quantize.grid:best_grid"],
    "feedback": ["quantize.gptq:gptq"],
    "trellis search": ["quantize.viterbi:Encoder.encode", "quantize.trellis_codec:TrellisCodec.pack"],
    "packing": ["quantize.rounding:packed_matrix"],
    "reading back": ["quantize.codec:PackedMatrix.dense", "runtime.factorized_experts:FactorizedExperts.dense"],
    "errors": [
        "decompose.whitening:whitened_error", "decompose.whitening:energy", "calibration.paired:output_error",
    ],
    "writing": ["memory.files:write_tensors", "memory.files:TensorFile.put"],
    "hashes, verification": [
        "run.stage_work:StageWork._verify", "checkpoint.verify:outputs", "runtime.modeling_moesvd:file_digest",
    ],
}  # fmt: skip
OTHER = "other"


class Seconds(NamedTuple):
    processor: float
    wall: float

    def __add__(self, other) -> "Seconds":
        return Seconds(self.processor + other.processor, self.wall + other.wall)

    def __sub__(self, other) -> "Seconds":
        return Seconds(self.processor - other.processor, self.wall - other.wall)


def now() -> Seconds:
    """Of this process with all of its threads."""
    return Seconds(time.process_time(), time.perf_counter())


def whole(spent: dict[str, Seconds]) -> Seconds:
    """Of all phases together."""
    return functools.reduce(Seconds.__add__, spent.values())


class Clock:
    """Seconds by phase; what is called within a phase counts for its own."""

    def __init__(self) -> None:
        self.spent: dict[str, Seconds] = dict.fromkeys([*PHASES, OTHER], Seconds(0.0, 0.0))
        self._phases, self._since = [OTHER], now()

    def _charge(self) -> None:
        at = now()
        self.spent[self._phases[-1]] += at - self._since
        self._since = at

    def timed(self, phase: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            self._charge()
            self._phases.append(phase)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._phases.pop()

        return call

    def total(self) -> Seconds:
        """Of all phases, up to now."""
        self._charge()
        return whole(self.spent)


@contextmanager
def measured() -> Iterator[Clock]:
    """A clock that hears of every function of PHASES, wherever it was imported."""
    undone: list[tuple] = []
    clock = Clock()

    def put(owner, name: str, value) -> None:
        undone.append((owner, name, vars(owner)[name]))
        setattr(owner, name, value)

    for package in ("quantize", "run", "stages"):  # what loads on use has to be there to be timed
        home = import_module(f"moesvd_quant.{package}")
        for module in iter_modules(home.__path__, f"{home.__name__}."):
            import_module(module.name)
    for phase, places in PHASES.items():
        for place in places:
            where, _, name = place.partition(":")
            owner = import_module(f"moesvd_quant.{where}")
            kind, _, method = name.rpartition(".")
            if kind:
                found = vars(getattr(owner, kind))[method]
                plain = clock.timed(phase, getattr(found, "__func__", found))
                put(getattr(owner, kind), method, classmethod(plain) if isinstance(found, classmethod) else plain)
                continue
            function = getattr(owner, name)
            timed = clock.timed(phase, function)
            ours = [other for key, other in sys.modules.items() if key.startswith("moesvd_quant")]
            for other in ours:
                for key in [key for key, value in vars(other).items() if value is function]:
                    put(other, key, timed)
    try:
        yield clock
    finally:
        for owner, name, value in reversed(undone):
            setattr(owner, name, value)


def prepared(folder: Path, recipe: str, out: Path, windows: int, length: int, device: str = "cpu") -> "Run":
    """The run of a recipe of RECIPES on a model, without evaluation."""
    from moesvd_quant.recipe.load import load_recipe
    from moesvd_quant.run.run import Run

    name, overrides = RECIPES[recipe]
    text = ["calibration.dataset=demo", f"calibration.samples={windows}", f"calibration.length={length}"]
    # The walks in which a model writes its own text cost by the token, as evaluation does.
    loaded = load_recipe(name, [*overrides, *text, "calibration.self_written=0", "evaluate.perplexity=[]"])
    return Run(loaded, folder, out, device)


def compress(run: "Run") -> Clock:
    """Does a run, by the clock."""
    with measured() as clock:
        run.run()
        clock.total()
    return clock


def expert_weights(folder: Path) -> int:
    from moesvd_quant.model.experts import expert_count, find_experts, shapes_of
    from moesvd_quant.model.stream import StreamedModel

    modules = [experts for layer in StreamedModel(folder).layers for _, experts in find_experts(layer)]
    return sum(expert_count(m) * out * columns for m in modules for out, columns in shapes_of(m).values())


def rows_of(figures: dict[tuple[str, str], dict[str, Seconds]]) -> list[list[str]]:
    """A row for each phase and the whole, with processor and wall seconds of each (shape, recipe)."""
    wholes = [whole(spent) for spent in figures.values()]
    rows = []
    for phase in [*PHASES, OTHER]:
        rows.append([phase, *(_cell(spent[phase]) for spent in figures.values())])
    return [*rows, ["**whole**", *map(_cell, wholes)]]


def _cell(seconds: Seconds) -> str:
    return f"{seconds.processor:.3f} ({seconds.wall:.3f})"


def missed(figures: dict[tuple[str, str], dict[str, Seconds]]) -> list[str]:
    """What is above its bar."""
    wholes = {key: sum(seconds.processor for seconds in spent.values()) for key, spent in figures.items()}
    return [
        f"{recipe} on {shape} experts: {whole:.2f} s, the bar is {BARS[recipe]}"
        for (shape, recipe), whole in wholes.items()
        if whole > BARS.get(recipe, float("inf"))
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, help="instead of the shape's own number")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    given = parser.parse_args()
    import torch

    from moesvd_quant.evaluation.benchmarks.synthetic import synthetic
    from moesvd_quant.run.threads import sync_threads

    sync_threads()
    figures: dict[tuple[str, str], dict[str, Seconds]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for shape in given.shapes:
            kind, options = SHAPES[shape]
            if given.experts:
                options |= {key: given.experts for key in options if key in ("num_local_experts", "num_experts")}
            model = synthetic(Path(scratch) / shape, kind, given.layers, torch.bfloat16, **options, vocab_size=4096)
            tiny = synthetic(Path(scratch) / f"tiny-{shape}", kind, 1, torch.bfloat16, **TINY[kind])
            for recipe in given.recipes:
                for folder, windows, length in ((tiny, 4, 64), (model, given.windows, given.length)):
                    # The first loads and compiles what the second needs.
                    with tempfile.TemporaryDirectory() as own:
                        os.environ["MOESVD_CACHE"] = f"{own}/cache"
                        run = prepared(folder, recipe, Path(own) / "out", windows, length)
                        forecast, clock = run.seconds().total, compress(run)
                millions = expert_weights(model) / 1e6
                spent = clock.spent.items()
                figures[shape, recipe] = {phase: Seconds(*(t / millions for t in took)) for phase, took in spent}
                took = f"{whole(clock.spent).wall:.0f} s ({forecast:.0f} s were forecast)"
                print(f"{shape}, {recipe}: {millions:.0f} million weights in {took}", file=sys.stderr, flush=True)
    head = ["processor (wall) seconds", *(f"{recipe}, {shape}" for shape, recipe in figures)]
    for line in [head, ["-"] * len(head), *rows_of(figures)]:
        print("| " + " | ".join(line) + " |")
    print(f"\n{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    late = missed(figures)
    print("\n".join(late) or "all within their bars")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
