"""Text that a model writes itself, against the model in memory."""

import pytest
import torch

from moesvd_quant.calibration.windows import windows_of
from moesvd_quant.calibration.written import allowed_tokens, write, written_windows
from moesvd_quant.memory.limits import Memory, MemoryLimitError
from moesvd_quant.model.stream import StreamedModel
from moesvd_quant.recipe.load import load_recipe
from moesvd_quant.recipe.recipe import Calibration
from moesvd_quant.run.plan import plan_stages
from moesvd_quant.run.run import Run
from moesvd_quant.runtime.modeling_moesvd import MANIFEST
from tiny import tiny_model, tiny_tokenizer

ALL = torch.ones(320, dtype=torch.bool)


def quiet(done, total):
    pass


def start(windows, length, seed=3):
    return torch.randint(1, 250, (windows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v2"])
@torch.no_grad()
def test_a_round_draws_every_token_from_the_models_prediction(architecture, make_model):
    windows = start(5, 24)
    made = write(StreamedModel(make_model(architecture)), windows, ALL, torch.Generator().manual_seed(7), 2, rounds=1)
    generator, expected = torch.Generator().manual_seed(7), []
    for batch in windows.split(2):  # the same points of the same distributions, one token at a time
        shares = tiny_model(architecture)(batch).logits.softmax(-1).double()
        points = torch.rand(len(batch), 24, 1, generator=generator)
        for row, own, drawn in zip(batch, shares, points):
            following = [int((own[at].cumsum(0) <= float(drawn[at])).sum()) for at in range(23)]
            expected.append([int(row[0]), *following])
    assert torch.equal(made[:, 0], windows[:, 0])
    assert (made == torch.tensor(expected)).float().mean() > 0.98  # a point may lie on the edge of two tokens


@torch.no_grad()
def test_after_as_many_rounds_as_tokens_they_are_samples_of_the_model(make_model):
    windows = start(1, 3).repeat(4000, 1)
    made = write(StreamedModel(make_model("mixtral")), windows, ALL, torch.Generator().manual_seed(0), 500, rounds=2)
    model = tiny_model("mixtral")
    first = model(windows[:1, :1]).logits[0, 0].softmax(-1)
    pairs = model(torch.stack([windows[0, 0].expand(320), torch.arange(320)], 1)).logits[:, 1].softmax(-1)
    second = first @ pairs  # chance of each token in the third place
    for place, chance in ((1, first), (2, second)):
        counts = torch.bincount(made[:, place], minlength=320)
        expected = 4000 * chance
        likely = expected > 5
        score = ((counts - expected)[likely] ** 2 / expected[likely]).sum() / likely.sum()
        assert 0.7 < float(score) < 1.3  # chi-square per degree of freedom


def test_hidden_states_on_disk_change_nothing(make_model, tmp_path):
    made = [
        write(StreamedModel(make_model("mixtral")), start(6, 32), ALL, torch.Generator().manual_seed(1), 4, scratch)
        for scratch in (None, tmp_path)
    ]
    assert torch.equal(*made)


def test_special_tokens_are_not_written_but_for_the_end_of_a_text(make_model):
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    allowed = allowed_tokens(tokenizer, 320)
    assert not allowed[tokenizer.convert_tokens_to_ids("<image>")] and allowed[tokenizer.eos_token_id]
    assert not allowed[len(tokenizer) :].any() and allowed.sum() == len(tokenizer) - 1
    made = write(StreamedModel(make_model("mixtral")), start(6, 32), allowed, torch.Generator().manual_seed(1), 4)
    assert allowed[made].all()


def test_it_is_written_once(make_model, monkeypatch):
    given = make_model("mixtral"), "digest", tiny_tokenizer(), (4, 32), 0, "cpu", Memory(), quiet
    first = written_windows(*given)
    monkeypatch.setattr(StreamedModel, "walk", None)
    assert torch.equal(first, written_windows(*given))


@pytest.mark.parametrize("share, written", [(0.0, 0), (0.5, 4), (1.0, 8)])
def test_the_share_of_windows_is_kept(share, written, make_model, text):
    folder = make_model("mixtral")
    make = lambda wanted: windows_of(wanted, folder, "digest", 32, 5, "cpu", Memory(), quiet)  # noqa: E731
    dataset = str(text) if share < 1 else "not there"  # no data at all are needed then
    made = make(Calibration(dataset=dataset, samples=8, self_written=share))
    assert made.shape == (8, 32)
    own = (
        written_windows(folder, "digest", tiny_tokenizer(), (written, 32), 5, "cpu", Memory(), quiet) if written else []
    )
    assert sum(any(torch.equal(row, other) for other in own) for row in made) == written


def test_a_recipe_needs_no_data(make_model, tmp_path, small):
    wanted = [*small, "calibration.dataset=not there", "calibration.self_written=1.0"]
    (folder,) = Run(load_recipe("svd", wanted), make_model("mixtral"), tmp_path / "out").run()
    assert (folder / MANIFEST).is_file()


def test_a_plan_that_needs_no_statistics_writes_nothing(make_model, tmp_path, small, monkeypatch):
    monkeypatch.setattr(StreamedModel, "walk", None)
    job = Run(
        load_recipe("gptq4", [*small, "calibration.self_written=0.5", "seed=11"]), make_model("mixtral"), tmp_path
    )
    assert job.needs().statistics_disk > 0 and plan_stages(job)[-1]["accounting"]["disk_bytes"] > 0


def test_what_cannot_fit_is_refused_before_anything_is_written(make_model, tmp_path, small, monkeypatch):
    monkeypatch.setattr(StreamedModel, "walk", None)
    recipe = load_recipe("svd", [*small, "calibration.self_written=0.5", "seed=12"])
    with pytest.raises(MemoryLimitError, match=r"are needed and 0\.00 GB may be taken"):
        Run(recipe, make_model("mixtral"), tmp_path, memory=1000).run()
