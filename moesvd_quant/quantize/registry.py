"""The formats that weights can be quantized to, by the names that recipes give. Imports no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .codec import Codec


class Storage(NamedTuple):
    """How a matrix is to be stored: bits per weight, and the name of the format."""

    rate: float
    format: str

    def __str__(self) -> str:
        return f"{self.rate:g} bit" if self.format == "grid" else f"{self.rate:g} bit {self.format}"


FLOAT = Storage(16, "float")  # not quantized


class Known(NamedTuple):
    """A format that recipes can name. codec: the class that makes it, or `module:class` to be imported on use."""

    rates: tuple[float, ...]  # bits per weight
    codec: Any

    def make(self, options) -> "Codec":
        """The codec with the options of the stage that quantizes."""
        if not isinstance(self.codec, str):
            return self.codec(options)
        module, _, name = self.codec.partition(":")
        return getattr(import_module(module), name)(options)


CODECS: dict[str, Known] = {}


def register_codec(name: str, rates: tuple[float, ...], codec: Any) -> None:
    """Makes a format known to recipes and to the allocator. ValueError where the name is taken."""
    if name in CODECS:
        raise ValueError(f"two codecs are named {name!r}")
    CODECS[name] = Known(rates, codec)


register_codec("grid", (2, 3, 4, 8), "moesvd_quant.quantize.grid_codec:GridCodec")
register_codec("trellis", (1, 1.5, 2, 2.5, 3, 3.5, 4), "moesvd_quant.quantize.trellis_codec:TrellisCodec")
