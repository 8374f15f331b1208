"""Which layers of vLLM's model run a module of ours."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import extract_layer_index

from .checkpoint import ServedCheckpoint
from .experts import ExpertsMethod
from .linears import LinearMethod, SharedExpertMethod
from .names import NAME

PROJECTIONS = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}  # projections of a shared expert


class OurQuantization(QuantizationConfig):
    """A folder, sent to vLLM's processes; the process that makes the model opens it."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.mapper = folder, None
        self.checkpoint: ServedCheckpoint | None = None

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "OurQuantization":
        return cls(Path(config["folder"]))

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        self.mapper = hf_to_vllm_mapper

    def open(self, dtype: torch.dtype, device: torch.device) -> ServedCheckpoint:
        """The checkpoint from which layers take their modules from now on."""
        self.checkpoint = ServedCheckpoint(self.folder, dtype, device)
        return self.checkpoint

    @cached_property
    def _paths(self) -> dict[str, str]:
        """{what vLLM calls a linear or a shared expert: its path}. Known once vLLM has said how it renames."""
        assert self.checkpoint is not None
        layout = self.checkpoint.layout
        paths = [*layout.linears, *filter(self.checkpoint.is_shared, layout.experts)]
        named = {f"{self.checkpoint.published(path)}.": path for path in paths}  # renamings look for the dots
        if self.mapper is not None:
            named = {self.mapper.map_name(name) or name: path for name, path in named.items()}
        return {name.removesuffix("."): path for name, path in named.items()}

    def get_quant_method(self, layer: torch.nn.Module, prefix: str):
        assert self.checkpoint is not None
        if isinstance(layer, RoutedExperts):
            path = self.checkpoint.experts_of(extract_layer_index(prefix))
            return None if path is None else ExpertsMethod(layer.moe_config, self.checkpoint.take(path))
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        home, _, leaf = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(leaf, [leaf])
        if home in self._paths and all(part in PROJECTIONS for part in parts):
            return SharedExpertMethod(self.checkpoint.take(self._paths[home]), [PROJECTIONS[part] for part in parts])
        names = [f"{home}.{part}" if home else part for part in parts]
        packed = [self._paths[name] for name in names if name in self._paths]
        if not packed:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        beside = packed[0].rpartition(".")[0]
        paths = [self._paths.get(name, f"{beside}.{part}") for name, part in zip(names, parts)]
        return LinearMethod([self.checkpoint.take(path) for path in paths])
