"""The name under which vLLM knows us, and which architectures it can serve."""

from ...errors import ModelError

NAME = "moesvd"  # of the model type, the quantization, the config format and the load format

# Native model types whose greedy tokens were seen to be equal to ours in vLLM.
SERVED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "gpt_oss")


def require_architecture(folder, native_type: str) -> None:
    """ModelError where an architecture is not known to work in vLLM."""
    if native_type not in SERVED:
        raise ModelError(
            f"{folder}: {native_type} is none of {', '.join(SERVED)}, which vLLM serves (docs/serving.md says why); "
            "`moesvd serve` in an environment without vLLM serves it with transformers"
        )
