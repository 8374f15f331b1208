"""The forecast of memory against what a process then takes, on models whose layers are most of it."""

import json
import os
import subprocess
import sys

import pytest

from moesvd_quant.evaluation.benchmarks.synthetic import synthetic

SMALLER = dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=8)
SHAPES = {"mixtral": dict(intermediate_size=1792), "qwen3_moe": dict(moe_intermediate_size=256)}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    return lambda name: synthetic(tmp_path_factory.mktemp("models") / name, name, 2, **SMALLER, **SHAPES[name])


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("architecture", SHAPES)
@pytest.mark.parametrize("room", [0, 0.35])
def test_the_peak_is_forecast_to_a_tenth(architecture, room, folder_of, tmp_path, text):
    overrides = [f"calibration.dataset={text}", "calibration.samples=16", "calibration.length=256"]
    one = [str(folder_of(architecture)), str(tmp_path / "out"), str(room)]
    command = [sys.executable, "-m", "moesvd_quant.evaluation.benchmarks.scale", *overrides, "evaluate.perplexity=[]"]
    environment = os.environ | {"MOESVD_CACHE": str(tmp_path / "cache"), "MOESVD_THREADS": "1"}
    done = subprocess.run([*command, "--one", *one], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    # Of all that the process takes: libraries are forecast as well.
    assert figures["imports"] + figures["peak"] == pytest.approx(figures["imports"] + figures["forecast"], rel=0.1)
    if room:
        assert figures["peak"] <= room * 1e9
