"""One reading of a folder: `load`, the walk, accounting and evaluation agree, whatever the config says; what cannot be
a whole model is refused by name before any work."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moesvd_quant
from architecture_check import IDS, apart, logits
from architectures import REFUSED, SURVEY, tiny_architecture
from faithful import stored, write_original
from moesvd_quant.checkpoint.accounting import account
from moesvd_quant.checkpoint.layout import layout_of
from moesvd_quant.evaluation.inputs import EvalSpec
from moesvd_quant.evaluation.memory import loaded_bytes, resident_bytes
from moesvd_quant.evaluation.record import evaluate
from moesvd_quant.export.export import export_checkpoint
from moesvd_quant.model.folder import ModelError
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.run.run import Run
from tiny import tiny_tokenizer

BF16 = torch.bfloat16


@pytest.fixture
def copied(make_model, tmp_path):
    """copied(config changes, tensor changes, **of the model) -> folder: changes are functions of a dict."""

    def copied(config=lambda content: None, tensors=lambda found: None, architecture="mixtral", dtype=BF16, **more):
        folder = shutil.copytree(make_model(architecture, dtype, **more), tmp_path / "model")
        content, found = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        config(content)
        tensors(found)
        (folder / "config.json").write_text(json.dumps(content))
        save_file(found, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copied


def walked(folder, dtype=None) -> torch.Tensor:
    return torch.cat([part.float() for part in StreamedModel(folder, dtype).logits(IDS, 2)])


def one_reading(folder, text) -> None:
    """Whoever reads the folder gets the same logits and sizes."""
    loaded = moesvd_quant.load(folder, torch.float32)
    assert apart(walked(folder, torch.float32), logits(loaded)) < 1e-5
    assert apart(walked(folder, "auto"), logits(moesvd_quant.load(folder)).float()) < 1e-2
    words = folder.parent / "words.txt"
    words.write_text(text.read_text()[:8000])
    whole, streamed = (evaluate(folder, EvalSpec({"w": str(words)}, length=64, stream=s)) for s in (False, True))
    assert whole["memory"] == streamed["memory"]
    assert whole["perplexity"]["w"]["ppl"] == pytest.approx(streamed["perplexity"]["w"]["ppl"], rel=1e-6)
    same_sizes(folder)


def same_sizes(folder) -> None:
    """Evaluation, plans and the model in memory say the same of bytes, and plans the same as the files."""
    loaded = moesvd_quant.load(folder)
    held = {id(tensor): tensor for tensor in [*loaded.parameters(), *loaded.buffers()]}.values()
    assert loaded_bytes(folder) == sum(tensor.numel() * tensor.element_size() for tensor in held)
    parent = StreamedModel(folder)
    on_disk = sum(tensor.numel() * tensor.element_size() for tensor in stored(folder).values())
    assert account(parent, layout_of(parent)).original_bytes == on_disk


def drop(*keys):
    return lambda content: [content.pop(key, None) for key in keys]


def head_of_its_own(found):
    found["lm_head.weight"] = (found["model.embed_tokens.weight"].float() * 1.5).to(BF16)


def head_twice(found):
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()


def mixed(found):
    for name in found:
        if "experts" in name and "layers.0" in name:
            found[name] = found[name].half()
        if "norm" in name:
            found[name] = found[name].float() + 1e-4


FOLDERS = {
    "as it is": {},
    "no dtype in the config": {"config": drop("dtype")},
    "float32 in the config": {"config": lambda content: content.update(dtype="float32")},
    "float16 in the config": {"config": lambda content: content.update(dtype="float16")},
    "tied": {"tie_word_embeddings": True},
    "tied, and the head is there twice": {"tie_word_embeddings": True, "tensors": head_twice},
    "tied by the config, and the head is another": {"tie_word_embeddings": True, "tensors": head_of_its_own},
    "mixed dtypes": {"tensors": mixed},
    "odd sizes": {"hidden_size": 60, "intermediate_size": 75, "num_local_experts": 3, "num_attention_heads": 2},
}


@pytest.mark.parametrize("case", FOLDERS)
def test_all_readers_agree(case, copied, text):
    one_reading(copied(**FOLDERS[case]), text)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", SURVEY)
def test_all_readers_agree_on_every_architecture(name, tmp_path):
    if name in REFUSED:
        pytest.skip(f"{name}: {REFUSED[name]}")
    write_original(name, tmp_path)
    same_sizes(tmp_path)
    assert apart(walked(tmp_path, torch.float32), logits(moesvd_quant.load(tmp_path, torch.float32))) < 1e-3


@pytest.mark.parametrize("case", FOLDERS)
def test_what_is_made_of_it_is_read_alike_too(case, copied, tmp_path, small):
    checkpoint = Run(load_recipe("svd-gptq4", small), copied(**FOLDERS[case]), tmp_path / "out").run()[-1]
    assert apart(walked(checkpoint, torch.float32), logits(moesvd_quant.load(checkpoint, torch.float32))) < 1e-5
    sizes = json.loads((checkpoint / "moesvd.json").read_text())["accounting"]
    assert sizes["disk_bytes"] == sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert sizes["resident_bytes"] == resident_bytes(moesvd_quant.load(checkpoint))


def test_a_head_of_its_own_stays(copied, small, tmp_path):
    folder = copied(tie_word_embeddings=True, tensors=head_of_its_own)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # unties, with a warning
    assert apart(walked(folder, torch.float32), logits(reference)) < 1e-4
    checkpoint = Run(load_recipe("gptq4", small), folder, tmp_path / "out").run()[-1]
    assert torch.equal(stored(checkpoint)["lm_head.weight"], head)
    assert json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"] is False
    export_checkpoint(checkpoint, tmp_path / "plain", "dense")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").lm_head.weight, head)


def test_the_dtype_is_that_of_the_tensors(copied, small, tmp_path):
    folder = copied(config=drop("dtype"))
    checkpoint = Run(load_recipe("svd", small), folder, tmp_path / "out").run()[-1]
    assert {tensor.dtype for tensor in stored(checkpoint).values()} == {BF16}
    assert json.loads((checkpoint / "config.json").read_text())["dtype"] == "bfloat16"


def test_mixed_dtypes_are_carried(copied, small, tmp_path):
    folder = copied(tensors=mixed)
    before = load_file(folder / "model.safetensors")
    after = stored(Run(load_recipe("gptq4", small), folder, tmp_path / "out").run()[-1])
    norms = [name for name in before if "norm" in name]
    assert norms and all(torch.equal(after[n], before[n]) and after[n].dtype == torch.float32 for n in norms)


def test_a_layer_too_many_is_refused_before_any_work(copied):
    def more(found):
        found |= {key.replace("layers.1.", "layers.2."): t.clone() for key, t in found.items() if "layers.1." in key}

    folder = copied(tensors=more)
    for use in (StreamedModel, moesvd_quant.load):
        with pytest.raises(ModelError, match=r"no place for the tensors model\.layers\.2\..*num_hidden_layers 2"):
            use(folder)


MESSAGES = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"tensors missing: model\.norm\.weight"),
    "a missing expert": (
        lambda t: t.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        r"tensors missing: model\.layers\.1\.block_sparse_moe\.experts\.2\.w3\.weight",
    ),
    "the last expert": (
        lambda t: [t.pop(f"model.layers.1.block_sparse_moe.experts.3.w{i}.weight") for i in (1, 2, 3)],
        r"tensors of another shape: model\.layers\.1\.mlp\.experts",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(63, dtype=BF16)}),
        r"another shape: model\.norm\.weight \(on disk \(63,\), wanted \(64,\)\)",
    ),
    "no embedding": (lambda t: t.pop("model.embed_tokens.weight"), r"tensors missing: .*embed_tokens"),
    "an unknown one": (lambda t: t.update({"model.extra": torch.ones(3)}), r"no place for the tensors model\.extra"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_what_is_wrong_is_named(case, copied):
    change, message = MESSAGES[case]
    folder = copied(tensors=change)
    for use in (StreamedModel, moesvd_quant.load):
        with pytest.raises(ModelError, match=message):
            use(folder)


def test_a_tensor_in_two_files(make_model, tmp_path):
    folder = shutil.copytree(make_model("mixtral"), tmp_path / "model")
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(found, folder / "a.safetensors")
    save_file({"lm_head.weight": found["lm_head.weight"]}, folder / "b.safetensors")
    places = dict.fromkeys(found, "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelError, match=r"lm_head\.weight is in a\.safetensors and in b\.safetensors"):
        StreamedModel(folder)


def test_a_stale_index_beside_a_whole_file(make_model, tmp_path):
    folder = shutil.copytree(make_model("mixtral"), tmp_path / "model")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert apart(walked(folder), logits(AutoModelForCausalLM.from_pretrained(folder))) < 1e-5
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index["weight_map"]["model.strange.weight"] = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"index\.json: says that model\.strange\.weight is in .*no file has it"):
        StreamedModel(folder)
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: missing; .*index\.json names it"):
        StreamedModel(folder)


@pytest.mark.parametrize(
    "file,message",
    [
        ("adapter_config.json", "this is an adapter .*merge it"),
        ("pytorch_model.bin", r"pytorch_model\.bin is a pickle"),
        ("weights.safetensors", "has no name that transformers reads"),
        ("notes.txt", "copy the weights here"),
    ],
)
def test_weights_that_are_not_there(make_model, tmp_path, file, message):
    folder = shutil.copytree(make_model("mixtral"), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / file).write_text("{}")
    for use in (StreamedModel, moesvd_quant.load):
        with pytest.raises(ModelError, match=message):
            use(folder)


@pytest.fixture(scope="module")
def with_mtp(tmp_path_factory):
    """A model with a layer for multi-token prediction, which its class knows and does not use."""
    model = tiny_architecture("ernie4_5_moe", BF16)
    model.config.num_nextn_predict_layers = 1
    folder = tmp_path_factory.mktemp("mtp") / "model"
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    found = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    extra = {f"model.mtp_block.0.{name}": torch.randn(5, 3, generator=generator) for name in ("proj.weight", "norm")}
    save_file(found | extra, folder / "model.safetensors", {"format": "pt"})
    return folder, extra


def test_what_the_class_does_not_use_is_carried(with_mtp, small, tmp_path):
    folder, extra = with_mtp
    checkpoint = Run(load_recipe("gptq4", small), folder, tmp_path / "out").run()[-1]
    export_checkpoint(checkpoint, tmp_path / "plain", "dense")
    for place in (checkpoint, tmp_path / "plain"):
        assert all(torch.equal(stored(place)[name], tensor) for name, tensor in extra.items())
        assert json.loads((place / "config.json").read_text())["num_nextn_predict_layers"] == 1
        assert torch.isfinite(logits(moesvd_quant.load(place))).all()
    manifest = json.loads((checkpoint / "moesvd.json").read_text())
    assert "carried as they are: 2 tensors (0.00 MB: model.mtp_block.0.*)" in str(manifest["notes"])
    assert manifest["accounting"]["disk_bytes"] == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))


def test_or_left_out_on_request_and_then_the_config_says_so(with_mtp, small, tmp_path):
    folder, _ = with_mtp
    recipe = load_recipe("gptq4", [*small, "unused_tensors=leave_out"])
    checkpoint = Run(recipe, folder, tmp_path / "out").run()[-1]
    assert not [name for name in stored(checkpoint) if "mtp" in name]
    assert json.loads((checkpoint / "config.json").read_text())["num_nextn_predict_layers"] == 0
    manifest = json.loads((checkpoint / "moesvd.json").read_text())
    assert "left out: 2 tensors" in str(manifest["notes"])
    assert manifest["accounting"]["disk_bytes"] == sum(f.stat().st_size for f in checkpoint.glob("*.safetensors"))
