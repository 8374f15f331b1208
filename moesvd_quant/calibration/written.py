"""Calibration text that the model writes itself.

What calibration does not show is thrown away first: code, after a calibration on prose. A model's own text shows what
it was trained on, with no data at hand. One token after the other would take a walk through the model for each; here
all tokens of all windows are drawn anew in each of a few rounds, each from what the model predicts after those of the
round before (Jacobi's iteration), from random ones on. The first tokens are then exact samples and the later ones are
not yet sentences, which did not matter where it was measured: docs/results/calibration.md.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file

from ..memory.files import write_tensors
from ..memory.limits import Memory, Sizes
from ..model.carried import tokenizer_digest
from ..model.stream import StreamedModel, precision_on
from .cache import cache_root, name_of
from .recording import BATCH_TOKENS, windows_at_once

ROUNDS = 8

Progress = Callable[[int, int], None]


def written_path(folder: Path, digest: str, shape: tuple[int, int], seed: int, device) -> Path:
    """Where the cache keeps windows of this shape that a model wrote, or will. digest: of the model's config and
    weights; its tokenizer, which says what tokens may be written, counts as well."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    computed = {"precision": precision_on(device), "threads": torch.get_num_threads(), "batch": BATCH_TOKENS}
    depends = {"model": digest, "tokenizer": tokenizer_digest(folder), "shape": shape, "seed": seed, "rounds": ROUNDS}
    return cache_root() / "written" / f"{name_of('windows', **depends, **computed, **versions)}.safetensors"


def written_windows(
    folder: Path, digest: str, tokenizer, shape: tuple[int, int], seed: int, device, memory: Memory, progress: Progress
) -> torch.Tensor:
    """(windows, length) = shape, int64, written by the model in `folder`; computed once and kept in the cache.

    digest: of the model's files. The tokens are never the tokenizer's special ones, except for the end of a text.
    """
    path, dtype = written_path(folder, digest, shape, seed, device), precision_on(device)
    if path.is_file():
        return load_file(path)["windows"]
    streamed = StreamedModel(folder, dtype, device)
    allowed = allowed_tokens(tokenizer, streamed.model.get_output_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    start = allowed.nonzero()[:, 0][torch.randint(int(allowed.sum()), shape, generator=generator)]
    batch_size = windows_at_once(shape[1])
    sizes = Sizes.of(streamed, shape, batch_size)
    held = memory.holds(2 * start.numel() * sizes.row, sizes.layer)
    made = write(streamed, start, allowed, generator, batch_size, None if held else path.parent, progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {"windows": made})
    return made


def allowed_tokens(tokenizer, vocabulary: int) -> torch.Tensor:
    """(vocabulary,) bool: the tokens of text, and the one that ends it."""
    allowed = torch.arange(vocabulary) < len(tokenizer)
    allowed[[token for token in tokenizer.all_special_ids if token < vocabulary]] = False
    if tokenizer.eos_token_id is not None:
        allowed[tokenizer.eos_token_id] = True
    return allowed


@torch.no_grad()
def write(
    streamed: StreamedModel,
    windows: torch.Tensor,
    allowed: torch.Tensor,
    generator: torch.Generator,
    batch_size: int,
    scratch: Path | None = None,
    progress: Progress = lambda done, total: None,
    rounds: int = ROUNDS,
) -> torch.Tensor:
    """The windows (n, length) int64 after `rounds` rounds, in each of which every token but the first of a window is
    drawn from what the model predicts after those before it. allowed: (vocabulary,) bool.

    A walk a round; scratch: folder for hidden states, memory where it is None.
    """
    total = rounds * len(streamed.layer_names)
    for done in range(rounds):
        for visit in streamed.walk(windows, batch_size, scratch):
            progress(done * len(streamed.layer_names) + visit.index + 1, total)
        with streamed.output():
            pairs = zip(streamed.hidden, streamed.batches)
            windows = torch.cat([_drawn(streamed, hidden, ids, allowed, generator) for hidden, ids in pairs])
    return windows


def _drawn(streamed, hidden, ids, allowed, generator) -> torch.Tensor:
    """The next tokens of a batch of windows (n, length), on the CPU."""
    drawn = [ids[:, :1].cpu()]
    points = torch.rand(*ids.shape, 1, generator=generator).to(ids.device)
    forbidden, last = ~allowed.to(ids.device), int(allowed.nonzero()[-1])
    for at in streamed.predicted(ids):
        logits = streamed.head(hidden[:, at], ids[:, at]).float()
        shares = logits.masked_fill_(forbidden, -torch.inf).softmax(-1).cumsum(-1)
        found = torch.searchsorted(shares, points[:, at] * shares[..., -1:], right=True)[..., 0]
        drawn.append(found.clamp(max=last).cpu())
    return torch.cat(drawn, 1)[:, :-1]  # the last ones come after the windows
