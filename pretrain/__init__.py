"""Shards to a model: an encoder and a sparse MLM head on a DeepSpeed engine; the learning rate follows the clock."""

import sys

# Where torchao is installed, transformers imports it beside every model: seconds for each process of a run, and nothing
# here needs it. None is Python's own mark of a module that is not to be found.
sys.modules.setdefault("torchao", None)
