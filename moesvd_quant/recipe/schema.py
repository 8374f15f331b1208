"""The JSON schema of recipes: what editors complete and check by, and what the reference is made of."""

from typing import Any

from .recipe import Recipe
from .stage import STAGES


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file. What it accepts may still be refused: options that exclude each
    other, stages in an order that cannot be."""
    schema = Recipe.model_json_schema()
    definitions = {key: value for key, value in schema["$defs"].items() if key != "Stage"}
    stages = {name: stage.model_json_schema() for name, stage in sorted(STAGES.items())}
    definitions |= {f"stage_{name}": _own(options) for name, options in stages.items()}
    for options in stages.values():
        definitions |= options.get("$defs", {})
    properties = {key: value for key, value in schema["properties"].items() if key != "name"}
    properties["stages"] = {
        "type": "array",
        "minItems": 1,
        "description": schema["properties"]["stages"]["description"],
        "items": {"anyOf": [{"enum": list(stages)}, *map(_named, stages)]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moesvd_quant recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["stages"],
        "properties": properties,
        "$defs": definitions,
    }


def _own(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "$defs"}


def _named(name: str) -> dict[str, Any]:
    """A stage with its options, as an item of `stages`; without options its value may be empty."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": [name],
        "properties": {name: {"anyOf": [{"$ref": f"#/$defs/stage_{name}"}, {"type": "null"}]}},
    }
