"""DoRA fine-tuning at the cost of a frozen linear layer."""

from dora_ext import _load

_load.load_prebuilt()  # never compiles; without prebuilt kernels the ops ask for dora_ext.load()
