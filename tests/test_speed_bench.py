"""The benchmark of speed: its layouts have the bits they are named for, and its bars are those of the whole model."""

import pytest
import torch

from moesvd_quant.evaluation.benchmarks import layouts as made
from moesvd_quant.evaluation.benchmarks import speed
from moesvd_quant.evaluation.benchmarks.loading import OPEN, READ, seconds, write_checkpoint


@pytest.mark.parametrize("shape", list(speed.SHAPES))
def test_layouts_have_the_bits_of_their_names(shape, tmp_path):
    folder = speed.write_config(tmp_path / shape, shape)
    inner = {"coarse": 3584, "fine": 512}[shape]
    count = {"coarse": 8, "fine": 64}[shape]
    sizes = {"gate_up": (2 * inner, 1024), "down": (1024, inner)}
    weights = 3 * inner * 1024 * count
    for name, layout in made.layouts(folder).items():
        assert len(layout.experts) == 2 and len(layout.linears) == 8
        for projections in layout.experts.values():
            held = [
                bank for n, parts in projections.items() for part in parts for bank in part.banks(*sizes[n]).values()
            ]
            bits = 8 * sum(bank.form.bank_bytes(bank.shape, torch.bfloat16) for bank in held) / weights
            named = float(name.lstrip("abcdefghijklmnopqrstuvwxyz"))
            assert named <= bits + 0.1 and bits < named + 0.2, (name, bits)
            covered = [sorted(e for part in parts for e in part.experts) for parts in projections.values()]
            assert covered == [list(range(count))] * 2


def cell(model, batch, decode, prefill):
    phases = {"decode": decode, "prefill": prefill}
    return {"model": model, "batch": batch} | {
        phase: {"tokens_per_second": 50.0, "roofline": 100.0, "speedup": ratio, "experts_speedup": 9.0}
        for phase, ratio in phases.items()
    }


@pytest.mark.parametrize(
    ("decode", "later", "prefill", "fine"),
    [(1.5, 1.6, 0.8, True), (1.4, 1.6, 0.8, False), (1.6, 1.4, 0.9, False), (2, 2, 0.7, False)],
)
def test_bars_are_of_every_batch_and_of_prefill(decode, later, prefill, fine):
    cells = [cell("original", 1, 1, 1), cell("gptq4", 1, decode, prefill), cell("gptq4", 8, later, 0.1)]
    rows, met = speed.rows_of("coarse", cells)
    assert met is fine
    assert [row[:2] for row in rows] == [["coarse", "original"], ["coarse", "gptq4"]]
    assert rows[1][2:6] == ["50", f"{decode:.2f}", "9.00", "50%"] and rows[1][-1] == f"{prefill:.2f}"


@pytest.mark.slow
def test_loading_is_timed_in_processes_of_its_own(tmp_path):
    size = write_checkpoint(tmp_path / "packed", tmp_path / "config", layers=1, hidden=128)
    assert size == sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors")) > 0
    assert 0 < seconds(READ, tmp_path / "packed") < seconds(OPEN, tmp_path / "packed")
