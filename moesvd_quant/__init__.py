"""moesvd_quant makes Mixture-of-Experts language models small and says honestly what it cost.

Importing it teaches transformers the model type `moesvd` (see `_register`); heavy modules load on use.
"""

from importlib.metadata import version as _version

from . import _quiet as _quiet  # before libraries that it quiets
from . import _register as _register
from . import stages as stages  # recipes know them by their names
from .api import compare as compare
from .api import compress as compress
from .api import evaluate as evaluate
from .api import plan as plan

__version__ = _version("moesvd_quant")  # of the git tag it was built at


def load(path, dtype="auto", device="cpu", **placement):
    """Opens any Hugging Face causal model folder, or one of our checkpoints, in evaluation mode.

    `device_map="auto"` (with `max_memory`, `offload_folder`) spreads it over GPUs, main memory and disk.

    Raises ModelError (a ValueError) where tensors are missing, unexpected, damaged or of another shape.
    """
    from .model.load import load as _load

    return _load(path, dtype=dtype, device=device, **placement)
