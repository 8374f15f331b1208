"""Fixtures: tiny models with tokenizers, text, an own cache; shared models where they are."""

import os
import random
from pathlib import Path

import pytest
import torch

import moesvd_quant  # registers our model type
from architectures import tiny_architecture
from tiny import tiny_model, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """make_model(architecture, dtype, **config) -> folder of a tiny model with tokenizer; made once."""
    made: dict = {}

    def make(architecture: str, dtype=torch.float32, **more) -> Path:
        key = architecture, dtype, *sorted(more.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            tiny_model(architecture, dtype, **more).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def make_architecture(tmp_path_factory):
    """make_architecture(model_type, dtype) -> folder of a tiny model of any architecture, with tokenizer; made once."""
    made: dict = {}

    def make(name: str, dtype=torch.float32) -> Path:
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(name)
            tiny_architecture(name, dtype).save_pretrained(folder)
            tiny_tokenizer().save_pretrained(folder)
            made[name, dtype] = folder
        return made[name, dtype]

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """Words drawn from a small vocabulary: text enough for calibration and evaluation."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(200)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(draw.choices(words, k=6000)))
    return path


@pytest.fixture(scope="session")
def page(text) -> Path:
    """The beginning of it, to evaluate on where many models are."""
    path = text.with_name("page.txt")
    path.write_text(text.read_text()[:8000])
    return path


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or leaves statistics in the user's cache."""
    os.environ["MOESVD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return moesvd_quant


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are no faster on two; and beside other tests, threads mostly wait for each other."""
    os.environ["MOESVD_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def two_threads():
    """For compiled code that shares its work among threads."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_fsync():
    """It guards against power failures, of which no test knows, and the disk takes longer for it than all else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def small(text):
    """Overrides that make any recipe small, and fast: `test_written.py` has the text of the models themselves."""
    calibration = [f"calibration.dataset={text}", "calibration.samples=24", "calibration.length=64"]
    return [*calibration, "calibration.self_written=0.0", "evaluate.perplexity=[]"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Models and data that lie beside the project; tests that need them skip without."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no shared models and data beside the project")
    return SHARED
