"""What vLLM takes for the config of one of our checkpoints: that of the architecture, and where the layout is."""

from pathlib import Path
from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from ...checkpoint.accounting import original_config
from ...errors import ModelError
from ...model.opened import Opened, open_folder
from ...model.remaining import counts_left
from ...runtime.modeling_moesvd import native_class
from ...runtime.parts import layout_from
from .names import NAME, require_architecture


class OurConfigParser(ConfigParserBase):
    """Reads the folder as `moesvd_quant.load` does, so that what is damaged or foreign is refused before a start."""

    def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
        config = served_config(Path(model).resolve())
        return config.to_dict(), config


def served_config(folder: Path) -> Any:
    """The native config of a checkpoint, whose `quantization_config` says that we are asked for modules. ModelError
    where vLLM has no such architecture, or layers keep different numbers of experts."""
    opened = open_folder(folder)
    layout = layout_from(opened.config.moesvd)
    require_architecture(folder, layout.native_type)
    config = original_config(opened.config, experts_left(opened))
    config.architectures = [own_class(native_class(type(config)).__name__)]
    config.quantization_config = {"quant_method": NAME, "folder": str(folder)}
    return config


def own_class(name: str) -> str:
    """vLLM's name for a class of transformers, which may differ in capitals (Phimoe, PhiMoE). ModelError where it has
    none: vLLM would run transformers' class, which does not know our modules."""
    found = [known for known in ModelRegistry.get_supported_archs() if known.lower() == name.lower()]
    if not found:
        raise ModelError(f"{name}: vLLM has no class of its own for it; serve it with transformers")
    return found[0]


def experts_left(opened: Opened) -> int | None:
    """How many routed experts each layer has, where some were dropped or merged; None where all are there."""
    counts = counts_left(opened.empty_model())
    if len(counts) > 1:
        raise ModelError(
            f"{opened.folder}: layers have {', '.join(map(str, counts))} experts, and vLLM has one number for all; "
            "prune by the same number in each layer, or serve it with transformers"
        )
    return counts[0] if counts else None
