"""Operations against torch's own counter; models that take turns; configs without weights."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, JetMoeConfig
from typer.testing import CliRunner

from moesvd_quant.calibration.store import fingerprint
from moesvd_quant.checkpoint.layout import dense_part, factor_part
from moesvd_quant.cli import app
from moesvd_quant.evaluation.flops import flops_per_token
from moesvd_quant.evaluation.plot import plot_speed
from moesvd_quant.evaluation.random_model import open_model, uniform_layout
from moesvd_quant.evaluation.record import collect
from moesvd_quant.evaluation.roofline import bytes_touched
from moesvd_quant.evaluation.speed import measure, run_speed, write_speed
from moesvd_quant.evaluation.speed_table import speed_table
from moesvd_quant.model.experts import expert_count, find_experts, shapes_of
from moesvd_quant.model.named import resolve_model
from moesvd_quant.runtime.factorized_experts import FactorizedExperts
from moesvd_quant.runtime.parts import DensePart
from tiny import tiny_model

LENGTH = 24


def counted(model) -> float:
    """What torch counts in a forward pass over one sequence, per token."""
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 300, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    return counter.get_total_flops() / LENGTH


def factorize(model, kind):
    for path, native in list(find_experts(model)):
        everyone = list(range(expert_count(native)))
        layout = {}
        for name in shapes_of(native):
            layout[name] = {
                "own": [factor_part(everyone, 16)],
                "shared right": [factor_part(everyone, 16, right=[0] * len(everyone))],
                "base": [DensePart(everyone, [0] * len(everyone)), factor_part(everyone, 16)],
                "mixed": [dense_part([0, 2]), factor_part([1, 3], 32)],
            }[kind]
        made = FactorizedExperts(native, layout)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.zero_()
        model.set_submodule(path, made)
    return model


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "deepseek_v2"])
def test_operations_are_those_that_torch_counts(architecture):
    model = tiny_model(architecture)
    model.set_experts_implementation("eager")
    assert flops_per_token(model, LENGTH)["total"] == pytest.approx(counted(model), rel=1e-6)


def test_operations_of_a_model_whose_attention_is_a_mixture():
    """JetMoE: attention is called otherwise, and its query and output projections are experts, of which two are met."""
    config = JetMoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_key_value_heads=2, kv_channels=16,
        intermediate_size=96, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
    )  # fmt: skip
    found = flops_per_token(AutoModelForCausalLM.from_config(config), LENGTH)
    scores, projections = 2 * LENGTH * 4 * (16 + 16), 2 * (64 * 64 + 2 * 2 * 32 * 64)
    assert found["attention"] == 2 * (scores + projections)
    assert found["experts"] == 2 * 2 * 2 * 3 * 64 * 96
    assert found["router"] == 2 * 2 * 2 * 4 * 64  # of attention and of the experts
    assert found["other"] == 2 * 64 * 256


@pytest.mark.parametrize("kind", ["own", "shared right", "base", "mixed"])
def test_operations_of_every_form_of_experts(kind):
    # Four experts of four are chosen, so that a mean over ranks is what every token meets.
    model = factorize(tiny_model("mixtral", num_experts_per_tok=4 if kind == "mixed" else 2), kind)
    assert flops_per_token(model, LENGTH)["total"] == pytest.approx(counted(model), rel=1e-6)


def test_mixtral_at_full_shape_needs_what_its_active_parameters_say(tmp_path):
    """12.9 B active parameters, embeddings not counted: twice that per token, and the paper's 5.27e14 for 20480."""
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights():
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig())
    flops = flops_per_token(model, 0)["total"]
    assert flops == pytest.approx(2 * (12.88e9 - 32000 * 4096), rel=0.005)
    assert 20480 * flops == pytest.approx(5.27e14, rel=0.02)
    everything = bytes_touched(model, 10**4)["total"]
    assert everything == pytest.approx(4 * (46.7e9 - 32000 * 4096), rel=0.005)
    assert bytes_touched(model, 1)["experts"] == pytest.approx(everything * 45.1 / 46.6 / 4, rel=0.01)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config-only")
    tiny_model("mixtral", torch.bfloat16).config.save_pretrained(folder)
    return folder


def test_a_config_is_enough_and_models_take_turns(config, tmp_path):
    result = run_speed([config], [0.2, 0.6], [1, 2], [8], 3, 2, "cpu", lambda *_: None)
    assert [(c["model"], c["batch"]) for c in result["cells"]] == [
        (name, batch) for batch in (1, 2) for name in ("original", "uniform20", "uniform60")
    ]
    for cell in result["cells"]:
        for phase in ("prefill", "decode"):
            figures = cell[phase]
            assert 0 < figures["min"] <= figures["tokens_per_second"] <= figures["max"]
            assert figures["experts_seconds"] > 0
        if cell["model"] == "original":
            assert cell["decode"]["speedup"] == 1
    assert len(speed_table(result).rows) == 6 and "GFLOP/s" in speed_table(result).title
    plot_speed(result, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    write_speed(result, config)
    assert not (config / "speed.json").exists()  # there are no weights to say anything of


@pytest.mark.parametrize("ratio", [0.2, 0.6])
def test_uniform_factors_hold_what_the_ratio_leaves(config, ratio):
    original, made = open_model(config), open_model(config, layout=uniform_layout(config, ratio))
    size = lambda model: sum(p.numel() for _, e in find_experts(model) for p in e.parameters())  # noqa: E731
    assert 1 - ratio - 0.1 < size(made) / size(original) <= 1 - ratio
    assert all(torch.isfinite(p).all() for p in made.parameters())
    assert made.dtype == torch.bfloat16


def test_speed_of_folders_is_kept_beside_their_weights(make_model, tmp_path):
    folder = make_model("mixtral")
    write_speed(run_speed([folder], [], [1], [4], 2, 1, "cpu", lambda *_: None), folder)
    assert json.loads((folder / "speed.json").read_text())["cells"][0]["model"] == "original"
    record = {"fingerprint": fingerprint(folder), "name": "original", "perplexity": {}}
    for own, shown in ((record, True), (record | {"fingerprint": "of other weights"}, False)):
        (folder / "eval.json").write_text(json.dumps(own))
        assert ("speed" in collect([folder])[0]) == shown
    (folder / "eval.json").unlink()
    (folder / "speed.json").unlink()
    with pytest.raises(ValueError, match="is called 'original' like another"):
        run_speed([folder, folder], [], [1], [4], 2, 1, "cpu", lambda *_: None)


def test_nothing_is_written_into_the_embedded_model():
    given = ["speed", "reference", "--batch", "1", "--length", "4", "--tokens", "2", "--repeats", "1", "--json"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    assert not (resolve_model("reference") / "speed.json").exists()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_factorized_experts_are_faster_than_the_originals_in_16_bit(tmp_path):
    """Medians of paired turns: at least 1.05 times at 20 % and 1.5 times at 60 % fewer expert parameters."""
    import transformers

    transformers.MixtralConfig(
        hidden_size=1024, intermediate_size=3584, num_local_experts=8, num_experts_per_tok=2, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=1024, dtype="bfloat16",
    ).save_pretrained(tmp_path)  # fmt: skip
    models = {"original": open_model(tmp_path)}
    for ratio in (0.2, 0.6):
        models[f"{ratio}"] = open_model(tmp_path, layout=uniform_layout(tmp_path, ratio))
    result = measure(models, (1, 8), (128,), 16, 11)
    for cell in result["cells"]:
        bar = {"original": 0.9, "0.2": 1.05, "0.6": 1.5}[cell["model"]]
        for phase in ("prefill", "decode"):
            # Of processor time, so that what else runs on the machine does not decide.
            assert cell[phase]["experts_processor_speedup"] >= bar, (cell["model"], cell["batch"], phase)
