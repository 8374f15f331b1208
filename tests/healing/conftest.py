"""Checkpoints to heal, made once."""

import pytest

from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run


@pytest.fixture(scope="session")
def compressed(make_model, tmp_path_factory, text):
    """compressed(recipe, architecture, *overrides) -> folder of the last checkpoint of a recipe."""
    made: dict = {}

    def make(recipe: str, architecture: str = "mixtral", *overrides: str):
        key = recipe, architecture, *overrides
        if key not in made:
            small = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
            wanted = load_recipe(recipe, [*small, "evaluate.perplexity=[]", *overrides])
            made[key] = Run(wanted, make_model(architecture), tmp_path_factory.mktemp("compressed")).run()[-1]
        return made[key]

    return make


@pytest.fixture
def heal(tmp_path, small):
    """heal(folder, key=value, ...) -> folder of the healed checkpoint; options are small unless given.

    after: stages that come first, and then the folders of all their checkpoints are returned.
    """
    options = dict(steps=6, batch=4, microbatch=2, rank=8, lr=0.003, validation=4, validate_every=3)

    def heal(folder, after="", **more):
        given = ", ".join(f"{key}: {value}" for key, value in (options | more).items())
        (tmp_path / "heal.yaml").write_text(f"stages: [{after}{{lora: {{{given}}}}}]")
        out = tmp_path / f"healed-{len(list(tmp_path.glob('healed-*')))}"
        folders = Run(load_recipe(tmp_path / "heal.yaml", small), folder, out).run()
        return folders if after else folders[0]

    return heal
