"""Fine-tune a pretrained encoder on GLUE over a grid of hyperparameters and seeds, and report the medians.

python run_glue_grid.py --config configs/glue/paper.yaml --model R/hf --output_dir G [--glue_dir T] [--tasks rte,cola]
"""

from collections.abc import Sequence
from pathlib import Path

from common.cli import config_parser, parse, run, take_config
from finetune.grid import GridConfig, run_grid


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the grid."""
    parser = config_parser("run_glue_grid.py", "Fine-tune on GLUE over a grid and report the medians.", GridConfig)
    parser.add_argument("--model", type=str, required=True, help="Hugging Face folder (such as R/hf) or hub id")
    parser.add_argument("--output_dir", type=str, required=True, help="where trials and report go, and continue")
    parser.add_argument("--glue_dir", type=str, help="folder of the official TSV files; default: from the hub")
    parser.add_argument("--tasks", type=str, help="only these tasks of the grid, such as rte,cola")
    arguments = parse(parser, argv)
    run_grid(
        take_config(arguments, GridConfig),
        model=arguments.model,
        output_dir=Path(arguments.output_dir),
        glue_dir=Path(arguments.glue_dir) if arguments.glue_dir else None,
        tasks=[name.strip() for name in arguments.tasks.split(",")] if arguments.tasks else [],
    )


if __name__ == "__main__":
    run(main)
