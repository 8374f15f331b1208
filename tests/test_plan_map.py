"""Plans side by side, and from a config alone: as those with weights are."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from expert_runs import job
from moesvd_quant.cli import app
from moesvd_quant.errors import UsageError
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.from_config import plan_from_config
from moesvd_quant.run.plan import plan_stages


@pytest.fixture
def config(make_model, tmp_path):
    (tmp_path / "config").mkdir()
    shutil.copy(make_model("mixtral") / "config.json", tmp_path / "config")
    return tmp_path / "config"


@pytest.mark.parametrize(
    "stages",
    [
        "{d2: {ratio: 0.4, merge: mean}}",
        "{svd: {method: plain, ratio: 0.3}}",
        "{svd: {method: moe_svd, layers: [1], ratio: 0.2, share: equation_6}}, {gptq: {bits: 4}}",
        "{sparsify: {pattern: '2:4'}}",
    ],
)
def test_a_plan_from_a_config_is_that_of_the_model(stages, config, make_model, tmp_path, small):
    run = job(make_model("mixtral"), tmp_path, small, stages)
    wanted = plan_stages(run)[-1]
    _, plan, accounting = plan_from_config(config, run.recipe)
    assert plan.layout.to_dict()["experts"] == wanted["layout"]["experts"]
    names = ("disk_bytes", "resident_bytes", "params", "expert_params", "expert_bytes")
    assert {name: accounting[name] for name in names} == {name: wanted["accounting"][name] for name in names}


@pytest.mark.parametrize("given", ["{svd: {method: moe_svd, ratio: 0.2}}", "{svd: {ratio: 0.2}}"])
def test_what_weights_decide_is_refused(given, config, tmp_path):
    (tmp_path / "r.yaml").write_text(f"stages: [{given}]")
    with pytest.raises(UsageError, match="stage svd is planned by what weights and text say"):
        plan_from_config(config, load_recipe(tmp_path / "r.yaml"))


def test_a_recipe_without_a_ratio_is_refused_before_any_plan(tmp_path):
    with pytest.raises(UsageError, match="gptq3: stage gptq has no ratio"):
        CliRunner().invoke(app, ["map", str(tmp_path), "svd", "gptq3", "--ratio", "0.2"], catch_exceptions=False)


def test_the_map_has_a_column_for_each_ratio(config, tmp_path):
    (tmp_path / "r.yaml").write_text("stages: [{svd: {method: moe_svd, layers: [1], ratio: 0.3, share: none}}]")
    asked = ["map", str(config), str(tmp_path / "r.yaml"), "--ratio", "0.2", "--ratio", "0.35", "--json"]
    done = CliRunner().invoke(app, [*asked, "--plot", str(tmp_path / "map.png")])
    assert done.exit_code == 0, done.output
    one, two = json.loads(done.stdout.splitlines()[0])
    assert (one["name"], two["name"]) == ("r 0.2", "r 0.35")
    for plan, ratio in ((one, 0.2), (two, 0.35)):  # all of it is taken from one layer of two
        assert plan["left"]["0"] == 1
        assert plan["left"]["1"] == pytest.approx(1 - 2 * ratio, abs=0.02)
    assert (tmp_path / "map.png").stat().st_size > 10_000
