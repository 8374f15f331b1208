"""The stages a recipe can chain: one file each, its options in `options.py`."""

from .options import D2Options, GptqOptions, LoraOptions, StageOptions, SvdOptions

OPTIONS: dict[str, type[StageOptions]] = {
    "svd": SvdOptions,
    "d2": D2Options,
    "lora": LoraOptions,
    "gptq": GptqOptions,
}

# A stage may not come after any of these: what is factorized or packed cannot be decomposed, nor packed again.
NOT_AFTER: dict[str, set[str]] = {
    "svd": {"svd", "d2", "lora", "gptq"},
    "d2": {"svd", "d2", "lora", "gptq"},
    "lora": set(),
    "gptq": {"gptq"},
}
