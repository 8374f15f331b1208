"""vLLM's plugin: `vllm serve DIR` opens our checkpoints. Tested with the version of constraints-vllm.txt.

vLLM has no stable interface for this but `register`, which its entry point group `vllm.general_plugins` names.
"""


def register() -> None:
    """Makes our checkpoints known to vLLM. It calls this in each of its processes, perhaps more than once."""
    from .arguments import take_our_folders

    take_our_folders()
