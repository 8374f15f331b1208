"""The texts a probe looks at a model with."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ..calibration.store import Statistics, fingerprint
from ..calibration.text import joiner_of, load_documents, token_windows
from ..calibration.windows import length_of, windows_of
from ..memory.limits import Memory
from ..model.stream import StreamedModel
from ..model.tokenizer import load_tokenizer
from .survey import Progress, Survey, survey

WINDOWS = 128  # of each text to judge on, spread over it evenly


def probe_folder(
    folder: Path, recipe, texts: dict[str, str], device: str, report: Progress, alone: Sequence[float] = ()
) -> Survey:
    """The survey of a model folder, calibrated as the recipe says and judged on that text and `texts` {name: source}.
    alone: see `survey`.

    Statistics are kept in the cache; a run with the same calibration uses them again.
    """
    wanted, meta = recipe.calibration, StreamedModel(folder)
    length = length_of(folder, meta.config, wanted.length, "calibration.length")
    tokenizer, digest = load_tokenizer(folder), fingerprint(folder)
    progress = partial(report, "calibration text of the model itself")
    own = windows_of(wanted, folder, digest, length, recipe.seed, device, Memory(), progress)
    statistics = {"calibration": Statistics(folder, digest, own, device)}
    for name, source in texts.items():
        windows = token_windows(load_documents(source), tokenizer, length, joiner_of(source))
        spread = torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).long()
        statistics[name] = Statistics(folder, digest, windows[spread], device)
    return survey(folder, statistics["calibration"], statistics, report, alone)
