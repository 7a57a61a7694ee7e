"""Public names that are resolved at first use: importing a package costs nothing of what it offers."""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def resolver(package: str, public: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package, which imports a public name when it is first asked for.

    Args:
        package: The package's `__name__`.
        public: Public name -> module of the package that has it.

    Example:
        >>> resolver("petiole", {"FacT": "plugins.fact"})("FacT").__name__
        'FacT'
    """

    def resolve(name: str) -> Any:
        if name not in public:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{public[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return resolve
