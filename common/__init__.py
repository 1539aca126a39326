"""What all stages share, and nothing else: error lines, the command line, folders on disk, the report page."""

import logging

# Where torchao is installed, transformers imports it beside every model. What it then logs is of CUDA libraries that it
# doesn't need here, and of an interface of torch that it is about to give up; commands tell their users nothing of it.
# Set before either is imported: every program here, and every worker process, imports this package first.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
