"""Recipes: what is valid, and that everything wrong is said at once with its place."""

import pytest
import yaml

from moesvd_quant.recipe.budget import parse_budget
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import RecipeError
from moesvd_quant.recipe.shipped import read_shipped, shipped

GOOD = """\
seed: 3
stages:
  - svd: {ratio: 0.4}
  - gptq:
      bits: 4
"""


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def errors(tmp_path, text, *overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), overrides)
    return str(caught.value)


def test_defaults_are_filled_in_and_written_out(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.seed == 3 and [s.name for s in recipe.stages] == ["svd", "gptq"]
    assert recipe.stages[0].method == "global" and recipe.stages[1].group_size == "auto"
    again = load_recipe(write(tmp_path, recipe.to_yaml()))
    assert again.model_dump() == recipe.model_dump() and again.stages == recipe.stages


@pytest.mark.parametrize(
    "given", ["trim_u: 0", "share: none", "share: equation_6", "select: owl", "keep_u: 4, groups: 8", "layers: [1]"]
)
def test_options_of_one_reading_are_written_out_and_load_back(tmp_path, given):
    recipe = load_recipe(write(tmp_path, f"stages: [{{svd: {{method: moe_svd, ratio: 0.4, {given}}}}}]"))
    assert load_recipe(write(tmp_path, recipe.to_yaml())).model_dump() == recipe.model_dump()


@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_every_shipped_recipe_loads_and_says_what_it_is(name):
    recipe, line = load_recipe(name), dict(shipped())[name]
    assert recipe.stages and recipe.evaluate.perplexity and len(line) > 20
    assert (recipe.model is not None) == name.startswith("models/")
    assert f"moesvd run {name} " in read_shipped(name)


@pytest.mark.parametrize(
    "text,budget",
    [("20GB", (20e9, "bytes")), ("512 MiB", (2**29, "bytes")), ("1.5bpw", (1.5, "bpw")), ("7b", (7, "bytes"))],
)
def test_budgets(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["20", "GB", "-1GB", "0bpw", "1,5bpw", "2 GB 3"])
def test_no_budgets(text):
    with pytest.raises(ValueError, match="is no budget"):
        parse_budget(text)


@pytest.mark.parametrize(
    "text,messages",
    [
        ("stages: [{svd: {ratio: 1.7}}]", ["mine.yaml:1: stages[0].svd.ratio: 1.7 is not between 0 and 1"]),
        ("stages:\n  - svd: {ratoi: 0.4}", ["mine.yaml:2: stages[0].svd.ratoi: unknown key; did you mean 'ratio'?"]),
        ("stages:\n  - svd", ["mine.yaml:2: stages[0].svd.ratio: is required, or give a budget (20GB, 1.5bpw)"]),
        ("stages:\n  - gptq: {}", ["mine.yaml:2: stages[0].gptq.bits: is required, or give a budget"]),
        ("stages: [{svd: {method: moe_svd}}]", ["ratio: is required"]),
        ("budget: 20 apples\nstages: [svd]", ["mine.yaml:1: budget: '20 apples' is no budget; write bytes (20GB"]),
        ("stages: [{gptq: {bits: 4}}]\nbudget: 2bpw", ["mine.yaml:2: budget: gptq.bits is already set; remove it"]),
        ("sede: 1\nstages: [svd]", ["mine.yaml:1: sede: unknown key; did you mean 'seed'?"]),
        ("stages: [svdd]", ["mine.yaml:1: stages[0]: unknown stage 'svdd'; did you mean 'svd'?"]),
        (
            "stages:\n - gptq: {bits: 5}",
            ["mine.yaml:2: stages[0].gptq.bits: 5 is none of the 2, 3, 4, 8 bits"],
        ),
        ("stages:\n - gptq: {bits: '4'}", ["mine.yaml:2: stages[0].gptq.bits:", "got '4'"]),
        ("stages:\n - gptq: {bits: 4}\n - svd: {ratio: 0.4}", ["mine.yaml:3: stages[1].svd: cannot come after gptq"]),
        ("stages: [{svd: {ratio: 0.4, keep_u: 2}}]", ["keep_u: only with method: moe_svd"]),
        ("stages: [{svd: {ratio: 0.4, alpha: 1.0}}]", ["mine.yaml:1: stages[0].svd: alpha: only with method: asvd"]),
        ("stages: [{svd: {ratio: 0.4, method: asvd, update: true}}]", ["update: only with method: svd_llm"]),
        ("stages: [{svd: {ratio: 0.4, method: moe_svd, keep_u: 2, trim_u: 6}}]", ["keep_u: only with trim_u left out"]),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, select: pf}}]",
            ["mine.yaml:1: stages[0].svd.select:", "got 'pf'"],
        ),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, select: fp, outlier: 3.0}}]",
            ["outlier: only with a in select"],
        ),
        (
            "stages: [{d2: {ratio: 0.4, static: 0.5, dynamic: 0.5}}]",
            ["mine.yaml:1: stages[0].d2: static 0.5 and dynamic"],
        ),
        ("stages: [{d2: {ratio: 0.4, delta_ratio: 0.5}}]", ["ratio: follows from delta_ratio"]),
        ("stages: [{d2: {ratio: 0.4, count: used}}]", ["count: only with dynamic"]),
        ("stages: [{d2: {delta_ratio: 0.4, dynamic: 0.1, count: used}}]", ["count: only with a ratio"]),
        ("stages: [{d2: {ratio: 0.4, dynamic: 1.0}}]", ["mine.yaml:1: stages[0].d2.dynamic:", "got 1.0"]),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, share: none, groups: 2, trim_u: 1}}]",
            ["groups: only with a share of V", "trim_u: only with a share that trims U"],
        ),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, share: equation_6, keep_u: 2}}]",
            ["keep_u: only with a share that trims U"],
        ),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, layers: [1, 2], select: fp, rank: 8}}]",
            ["select: only with layers left out"],
        ),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, layers: [1, 2], rank: 8}}]",
            ["ratio: follows from layers and rank"],
        ),
        ("stages: [{svd: {ratio: 0.4, method: moe_svd, layers: [1, 1]}}]", ["stages[0].svd.layers: give the numbers"]),
        ("stages: [{svd: {method: moe_svd, layers: [1], rank: 12}}]", ["stages[0].svd.rank:", "multiple of 8"]),
        ("stages: [{svd: {method: moe_svd, rank: 8}}]", ["rank: only with layers"]),
        ("stages: [{svd: {ratio_of: model}}]", ["ratio_of: only with a ratio"]),
        (
            "stages: [{svd: {ratio: 0.4, method: moe_svd, share: eq8}}]",
            ["mine.yaml:1: stages[0].svd.share:", "'equation_8'", "got 'eq8'"],
        ),
        ("stages: [{gptq: {bits: 4, group_size: 12}}]", ["12 is not a positive multiple of 8"]),
        (
            "stages: []",
            ["mine.yaml:1: stages: give at least one of drop, prune, merge, slim, sparsify"],
        ),
        ("stages: [svd\n", ["mine.yaml:2:"]),
        ("seed: 1\nseed: 2\nstages: [svd]", ["mine.yaml:2: key 'seed' stands here twice"]),
        ("- svd", ["a recipe is a mapping"]),
        ("stages: [{svd: {ratio: !!python/name:os.system x}}]", ["mine.yaml:1"]),
        ("stages: [{gptq: {bits: 4}}]\nevaluate: {perplexity: [a/x.txt, b/x.txt]}", ["mine.yaml:2", "named 'x'"]),
        ("stages: [{gptq: {bits: 4}}]\ncalibration: {samples: 0}", ["mine.yaml:2: calibration.samples:", "got 0"]),
    ],
)
def test_what_is_wrong_and_where(tmp_path, text, messages):
    said = errors(tmp_path, text)
    for message in messages:
        assert message in said, said


def test_all_problems_at_once(tmp_path):
    said = errors(tmp_path, "sede: 1\nkeep: some\nstages:\n  - svd: {ratio: 2}\n  - gptq: {bits: 7}\n")
    assert sorted(line.split(": ")[0].split(":")[-1] for line in said.splitlines()) == ["1", "2", "4", "5"]


@pytest.mark.parametrize(
    "override,path,value",
    [
        ("seed=7", ("seed",), 7),
        ("svd.ratio=0.6", ("stages", 0, "svd", "ratio"), 0.6),
        ("stages.gptq.bits=3", ("stages", 1, "gptq", "bits"), 3),
        ("calibration.dataset=my file.txt", ("calibration", "dataset"), "my file.txt"),
        ("evaluate.perplexity=[a, b]", ("evaluate", "perplexity"), ["a", "b"]),
    ],
)
def test_overrides_set_what_they_name(tmp_path, override, path, value):
    content = yaml.safe_load(load_recipe(write(tmp_path, GOOD), [override]).to_yaml())
    for part in path:
        content = content[part]
    assert content == value


@pytest.mark.parametrize(
    "override,message",
    [
        ("svd.ratio=1.7", "override 'svd.ratio=1.7': stages[0].svd.ratio: 1.7 is not between 0 and 1"),
        ("svd.ratoi=0.3", "did you mean 'ratio'?"),
        ("svd.ratio", "has no '='"),
        ("stages.d2.ratio=0.3", "the recipe's stages are: svd, gptq"),
    ],
)
def test_overrides_that_cannot_be(tmp_path, override, message):
    assert message in errors(tmp_path, GOOD, override)


def test_unknown_recipes_have_near_names(tmp_path):
    with pytest.raises(RecipeError, match="did you mean 'svd-gptq4'"):
        load_recipe("svd-gtpq4")
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("stages", ["5", "svd", "null", "[1, 2]", "{svd: {ratio: 0.4}}", "[null]"])
def test_stages_that_are_no_list_of_stages_are_said(tmp_path, stages):
    assert "mine.yaml:1" in errors(tmp_path, f"stages: {stages}")


def test_characters_that_yaml_does_not_allow_are_said(tmp_path):
    assert r"mine.yaml:2: character '\x00' is not allowed in YAML" in errors(tmp_path, "seed: 1\nstages: [\x00svd]")


def test_a_file_that_is_no_utf8_is_said(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"seed: 1\nstages: [svd]  # \xff\n")
    with pytest.raises(RecipeError, match=r"mine\.yaml:2: is not UTF-8 text"):
        load_recipe(tmp_path / "mine.yaml")


def test_the_override_that_is_wrong_is_blamed():
    with pytest.raises(RecipeError) as caught:
        load_recipe("svd", ["svd.method=moe_svd", "svd.update=true", "svd.ratio=0.3"])
    assert str(caught.value).startswith("override 'svd.update=true'"), caught.value
