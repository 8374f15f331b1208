"""Every form in which architectures hold and call experts, and every way in which they call their layers."""

import pytest
import torch
from test_factorized_experts import factorize
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moesvd_quant
from architecture_check import IDS, STEPS, apart, check, logits
from architecture_table import DONE
from architectures import NO_CLASS, REFUSED, SURVEY, tiny_architecture
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.experts import expert_count, find_experts, split_projections, weight_parameters
from moesvd_quant.model.folder import ModelError, class_for
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.planning.context import require_experts
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.grids import Grid
from moesvd_quant.runtime.parts import LinearLayout
from moesvd_quant.runtime.stored import StoredLinear
from tiny import tensor_bytes

# Of each form one: all experts at once, identity experts, a block with its router, flat matrices, undecorated, own.
FORMS = ["llama4_text", "longcat_flash", "jetmoe", "dbrx", "step3p7", "deepseek", "nemotron_h", "granitemoe"]
# Layers that hand each other router states or chosen indices: a family each.
STATE = ["zaya", "glm_moe_dsa", "hy_v4"]
# Layers that hand on router states or chosen indices; keys shared by layers; recurrent ones; a composite model.
WALKS = ["zaya", "glm_moe_dsa", "gemma4_text", "jamba", "qwen3_vl_moe", "granitemoe", "deepseek_v4"]


@pytest.mark.parametrize("name", FORMS)
def test_full_rank_gives_the_same_logits(name):
    expected, model = logits(tiny_architecture(name)), tiny_architecture(name)
    found = [(path, native) for path, native in find_experts(model) if "vision" not in path]
    assert found
    for path, native in found:
        model.set_submodule(path, factorize(native))
    assert apart(logits(model), expected) < 1e-4
    for path, _ in found:  # and the experts matter
        down = model.get_submodule(path).get_parameter("down_0_left")
        down.data.zero_()
    assert apart(logits(model), expected) > 0.1


@pytest.mark.parametrize("name", WALKS)
def test_the_walk_gives_the_logits_of_the_whole_model(name, make_architecture):
    streamed = StreamedModel(make_architecture(name))
    got = torch.cat(list(streamed.logits(IDS, batch_size=2)))
    assert apart(got, logits(tiny_architecture(name))) < 1e-4
    assert streamed.stateful == (name in STATE)


def test_a_walk_with_state_can_be_left_early(make_architecture):
    before = torch.get_num_threads()
    walk = StreamedModel(make_architecture("zaya")).walk(IDS, 1)
    next(walk)
    walk.close()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", STATE)
def test_what_layers_hand_on_waits_on_the_disk(name, make_architecture, tmp_path):
    """The same predictions, bit for bit, and no batch holds anything in memory while it waits."""

    def walk(windows, scratch) -> tuple[torch.Tensor, list[int]]:
        streamed = StreamedModel(make_architecture(name))
        held, before = [], tensor_bytes()
        for visit in streamed.walk(windows, 1, scratch):
            found = visit.run(visit.hidden)
            assert all(torch.equal(a, b) for a, b in zip(found, visit.outputs(), strict=True))
            held.append(tensor_bytes() - before)
        with streamed.output():
            pairs = zip(streamed.hidden, streamed.batches)
            return torch.cat([streamed.head(*pair) for pair in pairs]), held

    def growth(scratch) -> tuple[torch.Tensor, float]:
        few, (expected, held) = IDS, walk(IDS, scratch)
        many = IDS.repeat(4, 1)
        found, more = walk(many, scratch)
        assert torch.equal(found, expected.repeat(4, 1, 1))
        return expected, (max(more) - max(held)) / (many.numel() - few.numel())

    expected, in_memory = growth(None)
    found, on_disk = growth(tmp_path)
    assert torch.equal(found, expected)
    hidden = 4 * 64  # bytes per token
    assert in_memory > hidden and on_disk < hidden / 8  # token ids, 8 bytes each, are in memory


@pytest.mark.parametrize("name", NO_CLASS)
def test_what_predicts_no_text_is_refused(name):
    with pytest.raises(ModelError, match="no class for it that predicts text"):
        class_for(CONFIG_MAPPING[name]())


def test_experts_in_no_known_form_are_refused_with_the_reason(make_model):
    streamed = StreamedModel(make_model("mixtral"))

    class StrangeExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.empty(4, 64, 96))

        def forward(self, hidden_states, gates):
            return hidden_states

    for layer in streamed.layers:
        layer.mlp.experts = StrangeExperts()
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts.*class StrangeExperts.*\(4, 64, 96\).*gates"):
        require_experts(streamed)
    for layer in streamed.layers:
        layer.mlp.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    with pytest.raises(ModelError, match=r"3 modules of class Linear side by side, not fused"):
        require_experts(streamed)


def test_a_packed_linear_may_be_read_instead_of_called():
    """Mamba multiplies with `dt_proj.weight` itself."""
    linear = StoredLinear(64, 32, False, LinearLayout(Grid(4, 32, False)), torch.float32)
    for parameter in linear.parameters():
        parameter.data.zero_()
    assert linear.weight.shape == (32, 64) and linear.weight.dtype == torch.float32
    assert linear.to(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_views_into_the_parameters(name):
    """Rounding them in place is how effects are measured."""
    model = tiny_architecture(name)
    _, native = next(iter(find_experts(model)))
    with torch.no_grad():
        for weight in split_projections(native).values():
            weight.fill_(2.0)
    for parameter in weight_parameters(native):
        rows = parameter[: expert_count(native)] if parameter.ndim == 3 else parameter
        assert (rows == 2).all()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", FORMS)
def test_exported_it_is_the_native_model_with_the_same_logits(name, make_architecture, tmp_path, small):
    checkpoint = Run(load_recipe("svd", [*small, "svd.ratio=0.2"]), make_architecture(name), tmp_path / "out").run()[-1]
    export_checkpoint(checkpoint, tmp_path / "plain", "dense")
    plain = moesvd_quant.load(tmp_path / "plain")
    assert type(plain) is type(tiny_architecture(name))
    assert apart(logits(plain), logits(moesvd_quant.load(checkpoint))) < 1e-3


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", SURVEY)
def test_every_architecture_of_the_survey(name, tmp_path):
    row = check(name, tmp_path)
    step, reason = REFUSED.get(name, (None, ""))
    if step is None:
        assert [row[s] for s in STEPS[:-1]] == ["pass"] * (len(STEPS) - 1) and row["shared"] in DONE, row
    else:
        assert reason in row[step], row
