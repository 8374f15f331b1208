"""Stage `losparse`: the rows that stay are those of the formula, what ships is what was trained, and it goes on."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

import moesvd_quant
from expert_runs import IDS, job, logits
from moesvd_quant.decompose.losparse import kept_share
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.healing import trainer
from moesvd_quant.healing.adapters import update_file
from moesvd_quant.healing.rows import MEMORY, RowPruning
from moesvd_quant.model.experts import find_experts
from moesvd_quant.planning.context import StageError
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.stages.losparse import LoSparse

GIVEN = "low_rank: 0.2, rest: 0.3, steps: 8, batch: 4, microbatch: 2, lr: 0.001, validation: 4, validate_every: 2"
STAGE = f"{{losparse: {{{GIVEN}}}}}"


def test_rows_are_taken_as_the_papers_equations_say():
    """A loop by hand: S after the step, zero where its row's smoothed |S dL/dS| is not among the largest."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 5, 3, generator=generator)
    bank, by_hand = nn.Parameter(start.clone()), start.clone()
    pruning = RowPruning({"a": bank}, 1, 4, 0.4)
    smooth, state, control = torch.zeros(10), TrainerState(), TrainerControl()
    for step in range(1, 7):
        gradient = torch.randn(2, 5, 3, generator=generator)
        smooth = MEMORY * smooth + (1 - MEMORY) * (by_hand * gradient).abs().mean(-1).flatten()
        by_hand = by_hand - 0.1 * gradient
        kept = int(kept_share(step, 1, 4, 0.4) * 10 + 1e-6)
        lost = smooth.sort().indices[: 10 - kept]
        by_hand.view(10, 3)[lost] = 0
        bank.grad = gradient
        pruning.on_pre_optimizer_step(None, state, control)
        with torch.no_grad():
            bank -= 0.1 * gradient
        pruning.on_optimizer_step(None, state, control)
        state.global_step += 1
        assert torch.allclose(bank, by_hand, atol=1e-6), step
    assert int(by_hand.any(-1).sum()) == 4


def test_what_ships_is_what_was_trained(make_model, tmp_path, small, monkeypatch):
    monkeypatch.setattr(LoSparse, "conclude", lambda self, folder: None)
    folder = make_model("mixtral")
    [made] = job(folder, tmp_path, small, STAGE).run()
    healed, total, left = moesvd_quant.load(made), 0, 0
    for index, layer in enumerate(healed.model.layers):
        trained = load_file(update_file(made / "training", index))
        for path, experts in find_experts(layer):
            for projection, shape in experts.shapes.items():
                at = f"put/model.layers.{index}.{path}.{projection}"
                rest, lefts, rights = (trained[f"{at}_{bank}"] for bank in ("0_dense", "1_left", "1_right"))
                total, left = total + rest.numel(), left + int(rest.any(-1).sum()) * shape[1]
                for expert in range(experts.experts):
                    wanted = rest[expert] + lefts[expert] @ rights[expert]
                    assert torch.allclose(experts.dense(projection, expert), wanted, atol=2e-6)
    assert 0.3 * total - 96 < left <= 0.3 * total
    export_checkpoint(made, tmp_path / "dense", "dense")
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(IDS).logits
    assert torch.allclose(plain, logits(made), atol=1e-4)


def test_an_interrupted_training_ends_in_the_same_files(make_model, tmp_path, small, monkeypatch):
    class Killed(BaseException):
        pass

    folder = make_model("mixtral")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    [whole] = job(folder, tmp_path / "a", small, STAGE).run()
    after = trainer.Watch.on_step_end

    def dying(self, args, state, control, **more):
        if state.global_step == 5:
            raise Killed
        return after(self, args, state, control, **more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.Watch, "on_step_end", dying)
        job(folder, tmp_path / "b", small, STAGE).run()
    [parts] = job(folder, tmp_path / "b", small, STAGE).run()
    for file in sorted(whole.glob("*.safetensors")):
        assert file.read_bytes() == (parts / file.name).read_bytes(), file.name
    assert not (parts / "training").exists()


def test_merged_experts_have_factors_and_a_rest_together(make_model, tmp_path, small):
    """MC-SMoE's second step: a matrix that experts share stays one."""
    merge = "{merge: {method: mc_smoe, ratio: 0.5}}"
    merged, made = job(make_model("qwen2_moe"), tmp_path, small, f"{merge}, {STAGE}").run()
    before, after = (moesvd_quant.load(folder) for folder in (merged, made))
    shared = 0
    for (_, old), (_, new) in zip(find_experts(before), find_experts(after)):
        part = old.layout["down"][0]
        factors = len(new.layout["down"]) - 1
        assert new.layout["down"][-1].left == part.dense
        assert len(getattr(new, f"down_{factors}_left")) == max(part.dense) + 1
        for one in range(len(part.dense)):
            for other in range(one):
                if part.dense[one] == part.dense[other]:
                    pair = (new.dense("up", part.experts[e]) for e in (one, other))
                    assert torch.equal(*pair)
                    shared += 1
    assert shared
    assert torch.isfinite(logits(made)).all()


def test_what_cannot_be_is_refused_before_any_work(make_model, tmp_path, small):
    with pytest.raises(RecipeError, match=r"low_rank 0.6 and rest 0.5: as large as the matrices"):
        job(make_model("mixtral"), tmp_path, small, "{losparse: {low_rank: 0.6, rest: 0.5}}")
    with pytest.raises(RecipeError, match="leave no step to prune"):
        job(make_model("mixtral"), tmp_path, small, "{losparse: {untouched: 0.6, settled: 0.5}}")
    slim = f"{{slim: {{ratio: 0.25}}}}, {STAGE}"
    with pytest.raises((StageError, RecipeError), match="losparse"):
        plan_stages(job(make_model("mixtral"), tmp_path, small, slim))
