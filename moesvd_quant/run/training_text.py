"""The windows of text that the stages of a run train on."""

import torch

from ..calibration.windows import length_of, written_among
from ..healing.data import Training, refuse_leaks, training_windows
from ..model.stream import StreamedModel
from ..model.tokenizer import load_tokenizer
from ..recipe.recipe import Recipe


def windows_to_train_on(recipe: Recipe, meta: StreamedModel, length: int) -> dict[int, Training]:
    """By the index of each stage that trains. meta: the original model; length: tokens of a window of calibration.

    Raises TextError where there is no text, and where text that the recipe measures by is among it.
    """
    texts = {index: stage.training_text() for index, stage in enumerate(recipe.stages)}
    return {index: _windows(recipe, index, text, meta, length) for index, text in texts.items() if text}


def _windows(recipe: Recipe, index: int, text, meta: StreamedModel, length: int) -> Training:
    tokenizer = load_tokenizer(meta.folder)
    source = text.dataset or recipe.calibration.dataset
    if text.length is not None:
        length = length_of(meta.folder, meta.config, text.length, f"{recipe.stages[index].name}.length")
    made = training_windows(source, tokenizer, text.windows, text.validation, length, recipe.seed)
    refuse_leaks(made, recipe.evaluate.texts(), tokenizer)
    return made


def with_written(made: Training | None, recipe: Recipe, index: int, windows: torch.Tensor) -> Training | None:
    """Training windows of a stage that runs: its share of text that the model writes is that of calibration.

    made: of `windows_to_train_on`, None where the stage does not train; windows: of calibration, (n, length) int64.
    """
    text = recipe.stages[index].training_text()
    if made is None or text is None or not text.self_written:
        return made
    written = written_among(recipe.calibration, windows, recipe.seed)
    return made.with_written(written, recipe.calibration.self_written, recipe.seed)
