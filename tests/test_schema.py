"""The JSON schema of recipes accepts what they may say, refuses what is wrong, and has a meaning for every key."""

import pytest
import yaml
from jsonschema import Draft202012Validator

from moesvd_quant.recipe.recipe import Recipe
from moesvd_quant.recipe.schema import recipe_schema
from moesvd_quant.recipe.shipped import read_shipped, shipped
from moesvd_quant.recipe.stage import STAGES


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    Draft202012Validator.check_schema(recipe_schema())
    return Draft202012Validator(recipe_schema())


@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_the_schema_accepts_the_shipped_recipes(schema, name):
    schema.validate(yaml.safe_load(read_shipped(name)))


@pytest.mark.parametrize(
    "wrong",
    [
        "{}", "stages: []", "stages: [svdd]", "stages: [{svd: {ratoi: 0.4}}]", "stages: [{svd: {ratio: a lot}}]",
        "{stages: [svd], sed: 1}", "{stages: [svd], calibration: {samples: 0}}", "{stages: [svd], keep: first}",
        "stages: [{svd: {}, gptq: {}}]", "{stages: [svd], limits: {kv_cache: {batch: 2}}}",
    ],
)  # fmt: skip
def test_the_schema_refuses_what_is_wrong(schema, wrong):
    assert not schema.is_valid(yaml.safe_load(wrong))


def test_every_key_has_a_meaning():
    content = recipe_schema()
    owners = {"recipe": content, **content["$defs"]}
    assert {f"stage_{name}" for name in STAGES} <= owners.keys() and "name" not in content["properties"]
    assert set(Recipe.model_fields) - {"name"} == content["properties"].keys()
    for owner, options in owners.items():
        for key, about in options["properties"].items():
            assert about.get("description"), f"{owner}.{key}: give its Field a description"
