"""The plugin file: one safetensors file that is a working classifier."""

from .container import atomic_write
from .description import TensorInfo
from .metadata import PluginInfo, inspect
from .plugin_file import load, save, transplant

__all__ = ["PluginInfo", "TensorInfo", "atomic_write", "inspect", "load", "save", "transplant"]
