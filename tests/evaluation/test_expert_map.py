"""The terminal's map of layers and experts, and tables at 80 columns."""

import pytest

from moesvd_quant.evaluation.expert_map import LEVELS, expert_map
from moesvd_quant.evaluation.table import Table, render


def test_a_character_says_how_much_is_left():
    lines = expert_map({"model.layers.0.mlp.experts": [0.0, 1.0, 2.0, 8.0], "model.layers.11.mlp.experts": [4.0] * 4})
    assert lines[0] == f" 0   {LEVELS[1]}{LEVELS[2]}{LEVELS[7]}  2.75"  # nothing is left of the first
    assert lines[1] == f"11  {LEVELS[4] * 4}  4.00"
    assert "each expert" in lines[2] and lines[2].endswith("0 to 8.00")


@pytest.mark.parametrize("experts", [1, 64, 128, 384])
def test_it_fits_into_80_columns(experts):
    lines = expert_map({f"model.layers.{index}.mlp.experts": [2.5] * experts for index in range(94)})
    assert len(lines) == 95 and max(map(len, lines)) <= 80
    assert sum(LEVELS[7] == character for character in lines[0]) >= min(experts, 64)


def test_neighbours_share_a_character_with_their_mean():
    (line, legend) = expert_map({"layers.3": [1.0, 3.0] * 100})
    assert "each 3 experts" in legend and line.startswith("3  ")
    # groups of three in turn: 1 3 1 (mean 1.67) and 3 1 3 (mean 2.33), of 3
    assert line.split()[1][:4] == (LEVELS[int(8 * 5 / 9)] + LEVELS[int(8 * 7 / 9)]) * 2


def test_eight_columns_fit_into_80(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    columns = [
        "method", "disk MB", "loaded MB", "bits per expert weight", "experts removed %", "model removed %",
        "wikitext2", "code",
    ]  # fmt: skip
    rows = [["svd-gptq-aware@2.3bpw", 93405.6, 93405.6, 16.0, 32.3, 25.8, 1234.5, 1234.5]]
    shown = render(Table("Memory and perplexity (windows of 2048 tokens)", columns, rows)).splitlines()
    assert max(len(line.rstrip()) for line in shown) <= 80
    assert shown[-1].split() == list(map(str, rows[0]))  # no cell is cut or wrapped
