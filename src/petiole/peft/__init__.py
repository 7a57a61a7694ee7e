"""Exchange with Hugging Face PEFT, and our methods as its tuners.

Public names are resolved at first use; only the configs of the tuners import the library `peft`.
"""

from ..lazy import resolver

# public name -> module of this package
_PUBLIC = {
    "AdaptFormerConfig": "bridge",
    "ConvpassConfig": "bridge",
    "FacTConfig": "bridge",
    "export_peft": "exchange",
    "import_peft": "exchange",
}

__all__ = sorted(_PUBLIC)
__getattr__ = resolver(__name__, _PUBLIC)


def __dir__() -> list[str]:
    return list(__all__)
