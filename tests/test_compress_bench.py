"""The benchmark of compression: where its seconds go, in miniature."""

import time

import pytest

from moesvd_quant.evaluation.benchmarks import compress as bench
from moesvd_quant.quantize import gptq, grid_codec
from moesvd_quant.quantize.feedback import HessianFactor


def spin(seconds):
    """Works for so long."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_what_is_called_within_a_phase_counts_for_its_own():
    clock = bench.Clock()
    inner = clock.timed("grids", lambda: spin(0.2))

    def work():
        spin(0.1)
        inner()
        spin(0.1)

    clock.timed("feedback", work)()
    spin(0.05)
    total = clock.total()
    assert clock.spent["grids"].processor == pytest.approx(0.2, abs=0.04)
    assert clock.spent["feedback"].processor == pytest.approx(0.2, abs=0.04)
    assert clock.spent[bench.OTHER].processor == pytest.approx(0.05, abs=0.04)
    assert total.processor == pytest.approx(0.45, abs=0.1)


@pytest.mark.parametrize(
    "recipe, busy, idle",
    [
        ("gptq3", ("grids", "feedback", "packing"), ("trellis search", "decomposition", "targets", "plan", "effects")),
        ("fit2.3", ("decomposition", "plan", "targets", "effects"), ()),
    ],
)
def test_a_run_spends_its_seconds_in_its_own_phases(recipe, busy, idle, make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESVD_CACHE", str(tmp_path / "cache"))
    before, method = gptq.gptq, HessianFactor.of
    started = time.process_time()
    clock = bench.compress(bench.prepared(make_model("mixtral"), recipe, tmp_path / "out", 8, 64))
    whole = time.process_time() - started
    always = ("reading", "walk, statistics", "Cholesky", "errors", "writing", "hashes, verification")
    assert [phase for phase in (*always, *busy) if clock.spent[phase].processor <= 0] == []
    assert [phase for phase in idle if clock.spent[phase].processor > 0] == []
    found = sum(seconds.processor for seconds in clock.spent.values())
    assert 0.5 * whole < found <= whole  # imports come before the clock runs
    assert grid_codec.gptq is before and HessianFactor.of == method


def test_bars_are_of_wholes():
    half = dict.fromkeys([*bench.PHASES, bench.OTHER], bench.Seconds(0.0, 0.0)) | {
        "walk, statistics": bench.Seconds(0.15, 0.1),
        "grids": bench.Seconds(0.2, 0.2),
    }
    more = half | {"packing": bench.Seconds(0.1, 0.1)}
    rows = bench.rows_of({("coarse", "gptq3"): half, ("fine", "gptq3"): more})
    assert rows[-1] == ["**whole**", "0.350 (0.300)", "0.450 (0.400)"]
    assert bench.missed({("coarse", "gptq3"): half}) == []
    assert bench.missed({("fine", "gptq3"): more}) == ["gptq3 on fine experts: 0.45 s, the bar is 0.4"]
