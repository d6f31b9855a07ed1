"""DoRA fine-tuning at the cost of a frozen linear layer."""

from dora_ext import _load
from dora_ext._load import load

__version__ = "0.1.0"
__all__ = ["load"]

_load.load_prebuilt()  # never compiles; without prebuilt kernels every op asks for dora_ext.load()
