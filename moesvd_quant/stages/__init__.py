"""The stages a recipe can chain: one file each, its options in `options.py`."""

from .options import D2Options, GptqOptions, StageOptions, SvdOptions

OPTIONS: dict[str, type[StageOptions]] = {"svd": SvdOptions, "d2": D2Options, "gptq": GptqOptions}

# A stage may not come after any of these: what is factorized or packed cannot be decomposed, nor packed again.
NOT_AFTER: dict[str, set[str]] = {"svd": {"svd", "d2", "gptq"}, "d2": {"svd", "d2", "gptq"}, "gptq": {"gptq"}}
