"""The card of a result, and the way to the hub, behind an API that only remembers."""

import re

import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from moesvd_quant import compress
from moesvd_quant.checkpoint.finish import origin_of
from moesvd_quant.errors import UsageError
from moesvd_quant.memory.files import read_json
from moesvd_quant.recipe.load import load_recipe


class FakeApi:
    """Stands for huggingface_hub.HfApi."""

    def __init__(self):
        self.calls: list[tuple] = []
        self.refused: Exception | None = None

    def whoami(self):
        if self.refused:
            raise self.refused
        return {"name": "someone"}

    def create_repo(self, name, **how):
        self.calls.append(("create", name, how))
        return f"https://huggingface.co/{name}"

    def upload_folder(self, **how):
        folder = how["folder_path"]
        names = [str(path.relative_to(folder)) for path in folder.rglob("*")]
        kept = set(huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=how["ignore_patterns"]))
        self.calls.append(("upload", how["repo_id"], kept))


@pytest.fixture
def api(monkeypatch):
    made = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: made)
    return made


@pytest.fixture(scope="module")
def options(text):
    small = {"calibration.dataset": str(text), "calibration.samples": 24, "calibration.length": 64}
    return small | {"calibration.self_written": 0.0, "evaluate.perplexity": [f"words={text}"], "evaluate.length": 64}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("card") / "out"


def test_the_card_says_what_was_done_what_it_cost_and_how_to_run_it(make_model, options, out, api):
    made = compress(make_model("mixtral"), "svd-gptq3", out, options, push="someone/small")
    card = (made.folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "moesvd_quant" and "base_model" not in front  # a local folder is no name of the hub
    account = read_json(made.folder / "moesvd.json")["accounting"]
    assert f"{account['disk_bytes'] / 1e6:.2f} MB" in card and f"{account['bits_per_expert_weight']:.3f}" in card
    before, _, here = (one.perplexity["words"] for one in made.evaluation)
    assert f"| words | {before:.5g} | {here:.5g} | {here / before - 1:+.2%} |" in card
    assert "`svd`, `gptq`, as this recipe says" in card
    (out / "again.yaml").write_text(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1])
    assert (
        load_recipe(out / "again.yaml").stages
        == load_recipe("svd-gptq3", [f"{k}={v}" for k, v in options.items()]).stages
    )
    for command in ("moesvd serve 02-gptq", "moesvd export 02-gptq --to dense", "trust_remote_code=True"):
        assert command in card
    assert made.address == "https://huggingface.co/someone/small"
    (created, (upload, name, files)) = api.calls
    assert created == ("create", "someone/small", {"private": True, "exist_ok": True})
    assert (upload, name) == ("upload", "someone/small")
    assert {"README.md", "config.json", "moesvd.json", "tokenizer.json", "model-outer.safetensors"} <= files
    assert not files & {"run.json", "eval.json"}


def test_nothing_is_pushed_unasked_and_a_card_without_figures_says_so(make_model, options, out, api):
    made = compress(make_model("mixtral"), "gptq4", out.parent / "plain", options | {"evaluate.perplexity": []})
    assert not api.calls and made.address is None
    assert "Not measured on held-out text yet" in (made.folder / "README.md").read_text()


@pytest.mark.parametrize("name", ["small", "a/b/c", "https://huggingface.co/a/b", "some one/small"])
def test_a_wrong_name_stops_before_any_work(make_model, options, tmp_path, name, api):
    with pytest.raises(UsageError, match="give a name of the hub, user/name"):
        compress(make_model("mixtral"), "gptq4", tmp_path / "out", options, push=name)
    assert not (tmp_path / "out").exists()


def test_a_missing_token_stops_before_any_work(make_model, options, tmp_path, api):
    api.refused = LocalTokenNotFoundError("no token")
    with pytest.raises(UsageError, match="someone/small: the hub does not know you: log in"):
        compress(make_model("mixtral"), "gptq4", tmp_path / "out", options, push="someone/small")
    assert not (tmp_path / "out").exists()


def test_a_model_from_the_hub_keeps_its_name(tmp_path):
    folder = tmp_path / "hub" / "models--acme--tiny-moe" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    assert origin_of(folder)["base_model"] == "acme/tiny-moe"
    assert origin_of(tmp_path)["base_model"] == tmp_path.name
