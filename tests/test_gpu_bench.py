"""The benchmark of GPUs, rehearsed on the CPU in tiny shapes: every part runs, and a wrong kernel is seen."""

import json

import pytest
import torch
import typer

from moesvd_quant.evaluation.benchmarks import gpu
from moesvd_quant.runtime.grids import Grid


def test_all_parts_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MOESVD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(typer.Exit) as ended:
        gpu.main("cpu", True, 600, tmp_path / "out")
    assert ended.value.exit_code == 0
    printed = capsys.readouterr().out
    assert "not reached: nothing" in printed and (tmp_path / "out" / "gpu.md").exists()
    found = json.loads((tmp_path / "out" / "speed-Mixtral-8x7B.json").read_text())
    names = {cell["model"] for cell in found["cells"]}
    assert names == {"original", "factors, 20% fewer", "factors, 60% fewer", "gptq4", "gptq2", "trellis2", "fit2.3"}
    assert all(f"| {recipe} |" in printed for recipe in gpu.RECIPES)


def test_a_wrong_kernel_is_seen(monkeypatch):
    products = Grid.products
    monkeypatch.setattr(Grid, "products", lambda *given: products(*given) + 1)
    said = {row[0]: row[-1] for row in gpu.kernel_errors(torch.device("cpu"), 48, 128).rows}
    assert all((said[name] == "equal") is name.startswith("trellis") for name in said)


def test_what_time_does_not_reach_is_named(tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended:
        gpu.main("cpu", True, 0, tmp_path / "out")
    assert ended.value.exit_code == 1
    assert "not reached: speed of Mixtral-8x7B, speed of Qwen3-30B-A3B, compression by gptq3" in capsys.readouterr().out
