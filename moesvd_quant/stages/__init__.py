"""The stages a recipe can chain: one file each, its options in `options.py`."""

from .options import GptqOptions, StageOptions, SvdOptions

OPTIONS: dict[str, type[StageOptions]] = {"svd": SvdOptions, "gptq": GptqOptions}

# A stage may not come after any of these: packed weights cannot be decomposed, nor packed again.
NOT_AFTER: dict[str, set[str]] = {"svd": {"svd", "gptq"}, "gptq": {"gptq"}}
