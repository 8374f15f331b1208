"""The forecast of time: operations as torch counts them, and what is left of a run."""

import json
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import moesvd_quant
from expert_runs import job
from moesvd_quant.calibration.effect import TOKENS
from moesvd_quant.calibration.written import ROUNDS
from moesvd_quant.cli import app
from moesvd_quant.recipe.effort import Effort, decomposed, judged
from moesvd_quant.run.seconds import Rates, Seconds, forecast_seconds, measured_rates

ONE = Rates(1.0, 10.0, 100.0, {"grid": 7.0, "trellis": 9.0})
LENGTH = 64


def counted(work) -> int:
    """Operations of what is computed in it."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_product_with_a_gram_matrix_has_the_operations_that_torch_counts():
    weight, gram = torch.randn(24, 40), torch.randn(40, 40)
    assert judged((24, 40)).products == counted(lambda: weight @ gram)
    assert judged((24, 40), 3).products == 3 * judged((24, 40)).products
    assert decomposed((24, 40)).eigen == decomposed((40, 24)).eigen == 24**3


def forecast(run, known=True, written=0, trained=0, workers=1) -> Seconds:
    return forecast_seconds(run.meta, run.recipe.stages, ONE, (10, LENGTH), written, known, trained, workers)


@pytest.fixture
def model(make_model):
    return make_model("mixtral")


def forward_of(folder) -> float:
    """Operations of a token."""
    model = moesvd_quant.load(folder)
    model.set_attn_implementation("eager")  # what torch counts
    model.set_experts_implementation("eager")
    return counted(lambda: model(torch.ones(1, LENGTH, dtype=torch.long))) / LENGTH


def test_walks_are_counted_by_the_token(model, tmp_path, small):
    """2 layers, hidden 32 or whatever the tiny model has; experts top-2: a Gram matrix of each linear's inputs."""
    run = job(model, tmp_path, small, "{gptq: {bits: 3}}")
    config = run.meta.config
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    linears = 3 * hidden**2 + heads**2  # q, k, v, o
    sums = config.num_hidden_layers * (linears + max(hidden, heads) ** 2 + 2 * (hidden**2 + inner**2))
    forward = forward_of(model)
    assert forecast(run).text == 0
    assert forecast(run, known=False).text == pytest.approx(10 * LENGTH * (forward + sums), rel=0.02)
    assert forecast(run, written=5).text == pytest.approx(ROUNDS * 5 * LENGTH * forward, rel=0.02)
    aware = job(model, tmp_path, small, "{gptq: {bits: 3, error_aware: true}}")
    assert forecast(aware).text == pytest.approx(10 * LENGTH * (2 * forward + 3 * sums), rel=0.02)
    fit = job(model, tmp_path, small, "{svd: {ratio: 0.2}}")
    effects = forecast(fit, known=False).text - forecast(run, known=False).text
    assert TOKENS > 10 * LENGTH  # all of them
    assert effects == pytest.approx(10 * LENGTH * forward * (4 + 3 * config.num_hidden_layers / 2), rel=0.02)
    assert forecast(run, trained=100).training == pytest.approx(400 * forward, rel=0.02)


def test_weights_are_counted_by_the_matrix(model, tmp_path, small):
    run = job(model, tmp_path, small, "{svd: {ratio: 0.2}}, {gptq: {bits: 3}}")
    svd, gptq = run.recipe.stages
    config, expected = run.meta.config, 0.0
    for shape in [(config.intermediate_size, config.hidden_size)] * 2 + [
        (config.hidden_size, config.intermediate_size)
    ]:
        for stage in (svd, gptq):
            one = stage.effort(shape)
            assert isinstance(one, Effort)
            expected += one.products + 10 * one.factors + 100 * one.eigen + 9 * one.coded * shape[0] * shape[1]
    expected *= config.num_hidden_layers * config.num_local_experts
    assert forecast(run).weights == pytest.approx(expected)
    assert forecast(run, workers=2).weights == pytest.approx(expected / 2)


def test_rates_are_seconds_of_this_machine(model, tmp_path, small):
    run = job(model, tmp_path, small, "{gptq: {format: best, bits: 2}}")
    rates = measured_rates(run.recipe.stages, torch.device("cpu"))
    assert rates.coded.keys() == {"grid", "trellis"} and min(rates.coded.values()) > 0
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - started)
    assert 0.05 < rates.products / (min(times) / 2 / 1024**3) < 20  # other tests share the machine


def test_a_plan_says_what_is_left_to_do(model, tmp_path, small, monkeypatch):
    monkeypatch.setenv("MOESVD_CACHE", str(tmp_path / "cache"))
    given = ["plan", "gptq3", *small, "--model", str(model), "--out", str(tmp_path)]
    told = CliRunner().invoke(app, given)
    assert "time: about" in told.output and "without evaluation" in told.output, told.output
    asked = lambda: json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout.splitlines()[0])[0]["seconds"]  # noqa: E731
    before = asked()
    assert before["text"] > 0 and before["weights"] > 0 and before["training"] == 0
    assert CliRunner().invoke(app, ["run", *given[1:]]).exit_code == 0
    assert asked() == {"text": 0, "weights": 0, "training": 0}


def test_seconds_are_told_in_words():
    told = Seconds(7200.0, 119.0, 0.0).describe()
    assert told.startswith("time: about 2 hours on this machine") and "training" not in told
    assert "2 hours for the calibration text, 119 seconds for the weights" in told
    assert "some seconds" in Seconds(0.0, 0.0, 3.0).describe()
