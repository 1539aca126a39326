"""Pretrain until the budget ends: ``deepspeed run_pretraining.py --config C --data_dir D --output_dir R``.

``torchrun`` and plain ``python`` start it too.
"""

import traceback
from pathlib import Path

from common.cli import config_parser, exit_code, parse, take_config
from pretrain import summary
from pretrain.config import PretrainConfig
from pretrain.processes import leave
from pretrain.trackers import check_wandb
from pretrain.train import pretrain


def main() -> int:
    """Parse the command line and run; the exit code, see :mod:`pretrain.summary`."""
    parser = config_parser(
        "run_pretraining.py", "Pretrain a masked language model until its budget ends.", PretrainConfig
    )
    parser.add_argument("--data_dir", type=str, required=True, help="folder made by `python -m data_prep build`")
    parser.add_argument(
        "--output_dir", type=str, required=True, help="the run's folder; the model will be in hf/ there"
    )
    parser.add_argument("--wandb", action="store_true", help="send the metrics to Weights & Biases too")
    arguments = parse(parser, None)
    if arguments.wandb:
        check_wandb()
    config = take_config(arguments, PretrainConfig)
    stopped_by = pretrain(config, Path(arguments.data_dir), Path(arguments.output_dir), arguments.wandb)
    return summary.exit_code(stopped_by)


if __name__ == "__main__":
    try:
        code = exit_code(main)
    except Exception:  # a bug keeps its traceback
        traceback.print_exc()
        code = 1
    leave(code)
