"""Pretrain until the budget ends: ``deepspeed run_pretraining.py --config C --data_dir D --output_dir R``.

``torchrun`` and plain ``python`` start it too.
"""

from pathlib import Path

from common.cli import config_parser, parse, run, take_config
from pretrain.config import PretrainConfig
from pretrain.train import pretrain


def main() -> None:
    """Parse the command line and run."""
    parser = config_parser(
        "run_pretraining.py", "Pretrain a masked language model until its budget ends.", PretrainConfig
    )
    parser.add_argument("--data_dir", type=str, required=True, help="folder made by `python -m data_prep build`")
    parser.add_argument(
        "--output_dir", type=str, required=True, help="the run's folder; the model will be in hf/ there"
    )
    arguments = parse(parser, None)
    pretrain(take_config(arguments, PretrainConfig), Path(arguments.data_dir), Path(arguments.output_dir))


if __name__ == "__main__":
    run(main)
