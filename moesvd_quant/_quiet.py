"""Leaves out warnings of libraries that no user can act on: each by its own words, of its own logger. All else that
these libraries say is heard, and no other logger is touched."""

import logging

# {logger: how the messages begin}. All complain of kernels that nothing here uses, or that this machine cannot have.
LEFT_OUT = {
    "torchao": ("Failed to load ", "Skipping import of cpp extensions"),
    "torch.utils._pytree": ("%s is an Enum subclass",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
}


class _LeftOut(logging.Filter):
    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith(self.beginnings)


for _name, _beginnings in LEFT_OUT.items():
    logging.getLogger(_name).addFilter(_LeftOut(_beginnings))
