"""Windows that a model was not trained on are not taken, or are named: the embedded model has too many positions."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from moesvd_quant.calibration.windows import length_of
from moesvd_quant.errors import ModelError
from moesvd_quant.evaluation.inputs import EvalSpec, protocol_of, read_text
from moesvd_quant.evaluation.perplexity import in_memory, perplexity, too_long
from moesvd_quant.evaluation.record import doubts
from moesvd_quant.model.positions import usual_length
from moesvd_quant.reference import path

FOLDER = path()
LENGTH = 256  # what the embedded model was trained on, by its card
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
MODEL = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def test_windows_are_as_long_as_those_of_training():
    assert MODEL.config.max_position_embeddings > LENGTH == usual_length(MODEL.config, TOKENIZER)
    assert length_of(FOLDER, MODEL.config, "auto", "calibration.length") == LENGTH
    assert protocol_of(FOLDER, EvalSpec({}), "cpu")["length"] == LENGTH
    assert read_text("demo", EvalSpec({}), TOKENIZER, MODEL.config).windows.shape[1] == LENGTH
    assert protocol_of(FOLDER, EvalSpec({}, length=512), "cpu")["length"] == 512  # what is asked for is done


def test_no_more_than_the_positions_can_be_asked_for():
    with pytest.raises(ModelError, match=r"lora\.length 4096 exceeds the 1024 positions"):
        length_of(FOLDER, MODEL.config, 4096, "lora.length")


def test_without_a_record_it_is_2048_or_what_the_model_takes(make_model):
    folder = make_model("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.model_max_length > 10**9
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert usual_length(config, tokenizer) == config.max_position_embeddings == 256
    config.max_position_embeddings = 32768
    assert usual_length(config, tokenizer) == 2048


def test_a_length_that_the_model_was_not_trained_on_is_seen_in_the_losses():
    """The quarters are those of a few lines; they rise over 1024 tokens, and fall over the 256 of training."""
    known = read_text("demo", EvalSpec({}), TOKENIZER, MODEL.config).windows[:8]
    long = known[:4].reshape(1, 1024)
    found = perplexity(in_memory(MODEL), long)
    with torch.no_grad():
        losses = F.cross_entropy(MODEL(long).logits[0, :-1], long[0, 1:], reduction="none")
    assert found.quarters == pytest.approx([float(part.mean()) for part in losses.tensor_split(4)], rel=1e-4)
    assert too_long(found.quarters, found.tokens)
    short = perplexity(in_memory(MODEL), known)
    assert not too_long(short.quarters, short.tokens)
    assert too_long([4.0, 4.0, 4.0, 4.2], 300_000) and not too_long([4.0, 4.0, 4.0, 4.2], 5_000)  # chance, of a page
    record = {"name": "original", "perplexity": {"demo": found.to_dict()}}
    assert "original on demo" in doubts([record])[0] and "--length), 256 perhaps" in doubts([record])[0]
    assert not doubts([record | {"name": "gptq2"}]) and not doubts([{"name": "original", "perplexity": {"demo": {}}}])
