"""Tensor parallelism's cost model against the paper's example, done right, and against counts by hand."""

import json

import pytest
from transformers import MixtralConfig
from typer.testing import CliRunner

from moesvd_quant.cli import app
from moesvd_quant.evaluation.random_model import describe_model, uniform_layout
from moesvd_quant.evaluation.tensor_parallel import Device, experts_cost, product_cost

A100 = Device(19.5e12, 600e9)


def test_the_papers_example_without_its_factor_of_a_hundred():
    """B.4: H = 4096, r = 1024, B = 128, FP32. Its volumes and its sending times are right."""
    before, after = (product_cost((4096, 4096), 128, rank, 4) for rank in (None, 1024))
    assert (before.macs, after.macs) == (128 * 4096**2, 128 * 4096**2 / 2)
    assert (before.sent, after.sent) == (524_288, 655_360)
    assert before.sending(A100) == pytest.approx(3.5e-6, rel=0.01)
    assert after.sending(A100) == pytest.approx(4.37e-6, rel=0.01)
    assert before.macs == pytest.approx(2.15e11 / 100, rel=0.01)  # not 2.15e11
    assert before.computing(A100, 1) == pytest.approx(0.22e-3, rel=0.01)  # not 11 ms
    assert after.computing(A100, 1) == pytest.approx(0.11e-3, rel=0.01)
    assert before.computing(A100, 4) == before.computing(A100, 1) / 4


@pytest.fixture
def config(tmp_path):
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4}
    made = MixtralConfig(**shape, num_attention_heads=4, num_key_value_heads=2, vocab_size=128, num_experts_per_tok=2)
    made.architectures = ["MixtralForCausalLM"]
    made.save_pretrained(tmp_path)
    return tmp_path


def test_experts_of_a_model_by_hand(config):
    dense = experts_cost(describe_model(config), 10)
    assert dense.macs == 10 * 2 * 2 * 3 * 64 * 96 and dense.sent == 10 * 2 * 64
    layout = uniform_layout(config, 0.5)
    cost = experts_cost(describe_model(config, layout), 10)
    parts = [(name, part.rank) for found in layout.experts.values() for name, (part,) in found.items()]
    shapes = {"gate_up": (2 * 96, 64), "down": (64, 96)}
    assert cost.macs == 10 * 2 * sum(rank * sum(shapes[name]) for name, rank in parts)  # two experts of a token
    assert cost.sent == 10 * (2 * 64 + 2 * sum(rank for _, rank in parts))


def test_the_command_needs_a_config_alone(config):
    found = CliRunner().invoke(app, ["speed", str(config), "--tp", "4", "--ratio", "0.5", "--batch", "1,8", "--json"])
    assert found.exit_code == 0, found.output
    rows = json.loads(found.stdout)
    assert [(row["tokens"], row["x"] == 1) for row in rows] == [(1, True), (1, False), (8, True), (8, False)]
