"""The error-aware walk against least squares on the activations themselves, and what it is for."""

import importlib

import pytest
import torch

import moesvd_quant
from moesvd_quant.calibration.metric import Grams, blend
from moesvd_quant.calibration.paired import RIDGE, PairedExperts, corrected, output_error
from moesvd_quant.model.experts import find_experts
from moesvd_quant.planning.context import Context
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.stages.svd import Svd


def inputs(seed=0, tokens=200, size=24):
    generator = torch.Generator().manual_seed(seed)
    x = (
        torch.randn(tokens, size, generator=generator, dtype=torch.float64)
        @ torch.randn(size, size, generator=generator).double()
    )
    z = x + 0.3 * torch.randn(tokens, size, generator=generator, dtype=torch.float64) + 0.1
    return x, z, torch.randn(16, size, generator=generator, dtype=torch.float64)


def test_corrected_weight_is_ridge_regression_on_the_activations():
    x, z, weight = inputs()
    ridge = (RIDGE * (z.T @ z).diagonal().mean()).sqrt() * torch.eye(z.shape[1], dtype=torch.float64)
    wanted = torch.linalg.lstsq(torch.cat([z, ridge]), torch.cat([x @ weight.T, ridge @ weight.T])).solution.T
    torch.testing.assert_close(corrected(weight, z.T @ z, x.T @ z), wanted)


def test_without_errors_nothing_is_corrected():
    x, _, weight = inputs()
    torch.testing.assert_close(corrected(weight, x.T @ x, x.T @ x), weight)


def test_output_error_is_that_of_the_outputs():
    x, z, weight = inputs()
    other = weight + 0.1
    wanted = float((x @ weight.T - z @ other.T).square().sum() / (x @ weight.T).square().sum())
    assert abs(output_error(weight, other, x.T @ x, z.T @ z, x.T @ z) - wanted) < 1e-9


def test_inputs_are_those_of_the_compressed_model(make_model, tmp_path, small):
    """Cross sums of the second layer against the inputs that hooks see when both models run as a whole."""
    folder = make_model("mixtral")
    run = Run(load_recipe("gptq2", small), folder, tmp_path)
    parent = run.run()[-1]
    context = Context(None, run.statistics, Svd(), 0, run.device)
    context.parent = type("Parent", (), {"folder": parent})
    walk = context.paired_walk()
    for _ in range(2):
        walk.enter()
    pair = walk.experts("mlp.experts", [[expert] for expert in range(4)])
    one_by_one = PairedExperts(pair.native, pair.sources, pair.pairs, lambda size: 1, pair.folder)
    assert all(torch.equal(a, b) for a, b in zip(pair.gate_up, one_by_one.gate_up))
    made = walk.compressed.layer.get_submodule("mlp.experts")
    assert all(torch.equal(a, b) for a, b in zip(pair.down(made), one_by_one.down(made)))
    seen = []
    for source in (folder, parent):
        model, kept = moesvd_quant.load(source), []
        (_, experts), *_ = find_experts(model.get_submodule("model.layers.1"))
        experts.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args))
        with torch.no_grad():
            for batch in run.windows.split(8):
                model(input_ids=batch, use_cache=False)
        seen.append(kept)
    for expert in range(4):
        rows = [(one[1] == expert).any(1) for one in seen[0]]
        x, z = (torch.cat([call[0][row] for call, row in zip(calls, rows)]) for calls in seen)
        assert int(pair.tokens[expert]) == len(x)
        torch.testing.assert_close(pair.gate_up[0][expert], z.T @ z, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(pair.gate_up[1][expert], x.T @ z, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("recipe,stage", [("gptq2", "gptq"), ("svd", "svd")])
def test_error_aware_stages_follow_the_original_closer_and_resume_to_the_same_bits(
    recipe, stage, make_model, tmp_path, small, monkeypatch
):
    folder = make_model("mixtral", num_hidden_layers=3)
    plain = Run(load_recipe(recipe, small), folder, tmp_path / "plain").run()[-1]
    aware = load_recipe(recipe, [*small, f"{stage}.error_aware=true"])
    whole = Run(aware, folder, tmp_path / "aware").run()[-1]
    windows = Run(aware, folder, tmp_path / "aware").windows[:8]

    def last_hidden(source):
        model = moesvd_quant.load(source)
        with torch.no_grad():
            return model.model(input_ids=windows, use_cache=False).last_hidden_state

    original = last_hidden(folder)
    errors = [float((last_hidden(f) - original).square().sum()) for f in (plain, whole)]
    assert errors[1] < 0.95 * errors[0]

    module = importlib.import_module(f"moesvd_quant.stages.{stage}_work")
    real = module.run_layer

    def breaks(context, options, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        return real(context, options, index, *rest)

    monkeypatch.setattr(module, "run_layer", breaks)
    again = Run(aware, folder, tmp_path / "again")
    try:
        again.run()
    except KeyboardInterrupt:
        monkeypatch.setattr(module, "run_layer", real)
    resumed = Run(aware, folder, tmp_path / "again").run()[-1]
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()


def test_what_gets_nothing_but_zeros_is_fitted_as_what_no_token_reaches():
    """Down, where gate and up of all experts of a layer are gone."""
    _, z, weight = inputs()
    nothing = torch.zeros(2, 24, 24)
    assert torch.equal(corrected(weight, nothing[0], nothing[0]), weight)
    grams = Grams(nothing, torch.tensor([9, 4]), blend)
    assert all(torch.equal(gram, torch.eye(24)) for gram in grams)
    assert output_error(weight, weight, z.T @ z, nothing[0], nothing[0]) == pytest.approx(1)
