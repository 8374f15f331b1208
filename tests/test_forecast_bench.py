"""Random plans fill the budget and differ; carried out in memory they are what the stages of a recipe make."""

import numpy as np
import pytest
import torch

from moesvd_quant.evaluation.benchmarks.forecast import Bench, cost_of, forecast_of, measured, plan_from, random_plan
from moesvd_quant.evaluation.perplexity import in_memory, perplexity
from moesvd_quant.model.load import load
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run


@pytest.fixture
def bench(make_model, tmp_path, small):
    wanted = [*small, "budget=2bpw", "gptq.attention=false"]
    job = Run(load_recipe("fit-fast", wanted), make_model("mixtral", torch.bfloat16), tmp_path)
    return Bench(job, torch.randint(0, 300, (4, 64), generator=torch.Generator().manual_seed(0)))


def test_random_plans_of_equal_bytes(bench):
    draw, budget = np.random.default_rng(0), bench.budget(2.0)
    plans = [random_plan(bench.tables, budget, draw) for _ in range(4)]
    assert all(0.98 * budget <= cost_of(bench.tables, plan) <= budget for plan in plans)
    assert len({str(plan) for plan in plans}) == 4
    assert all(len({c for c in chosen if c.rank}) <= 4 for plan in plans for chosen in plan.values())


def test_a_plan_in_memory_is_what_the_recipe_makes(bench, tmp_path):
    from moesvd_quant.planning.allocation import allocate
    from moesvd_quant.run.plan import plan_stages

    chosen = allocate(bench.tables, bench.budget(2.0)).choices  # what the recipe's planner chooses too
    assert forecast_of(bench.tables, chosen) == pytest.approx(
        plan_stages(bench.job)[0]["notes"]["allocation"]["forecast"]
    )
    made = load(bench.job.run()[-1], dtype=torch.float32)
    assert bench.loss(chosen) == pytest.approx(perplexity(in_memory(made), bench.windows).nll, abs=1e-6)


def test_measured_plans_stay(bench, tmp_path):
    file = tmp_path / "plans.json"
    first = measured(bench, 2.0, 2, file, lambda what, done, total: None)
    bench.loss = None  # is not called again
    assert measured(bench, 2.0, 2, file, lambda what, done, total: None) == first
    draw = np.random.default_rng(0)
    assert plan_from(first[1]) == [random_plan(bench.tables, bench.budget(2.0), draw) for _ in range(2)][1]
