"""Published GLUE scores to print beside our own: of the test server and of the development sets, never together."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class PublishedTable:
    """Scores x 100 as their authors print them."""

    heading: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    source: str
    """Who published them, on which split, by which protocol."""


def _row(name: str, scores: str) -> tuple[str, ...]:
    return (name, *scores.split())


TEST_SET: Final = PublishedTable(
    heading="Published: GLUE test server",
    header=("published, test", *"MNLI-m/mm QNLI QQP RTE SST-2 MRPC CoLA STS-B average".split()),
    rows=(
        _row("BERT-base", "84.6/84.0 90.6 72.0 69.1 92.8 86.1 55.1 84.3 79.8"),
        _row("BERT-large", "86.0/85.2 92.6 72.0 72.9 94.5 89.1 60.9 87.0 82.2"),
        _row("24hBERT", "84.4/83.8 90.6 70.7 57.7 93.0 87.5 57.1 82.0 78.5"),
    ),
    source=(
        "Not comparable with scores on the development set. Table 3 of “How to Train BERT with an Academic Budget”"
        " (Izsak, Berchansky, Levy, EMNLP 2021): the test server's scores. The average is of the nine columns, MNLI"
        " counted twice, without WNLI. QQP and MRPC: F1, CoLA: Matthews, STS-B: Spearman, others: accuracy (the paper"
        " does not say; these are the usual ones)."
    ),
)

DEVELOPMENT_SET: Final = PublishedTable(
    heading="Published: development set",
    header=(
        "published, development",
        *("MNLI-m/mm", "QNLI", "QQP (F1/accuracy)", "RTE", "SST-2", "MRPC (F1/accuracy)", "CoLA"),
        *("STS-B (Spearman/Pearson)", "WNLI"),
    ),
    rows=(
        _row("run_glue, fp32", "83.91/84.10 90.66 87.49/90.71 65.70 92.32 88.85/84.07 56.53 88.48/88.64 56.34"),
        _row("run_glue, fp16", "84.04/84.06 90.96 87.43/90.67 65.34 91.74 88.12/83.58 56.78 88.55/88.71 56.34"),
        _row("run_flax_glue, mean", "83.80/- 90.82 87.51/90.76 64.76 92.23 88.97/84.36 59.04 88.63/88.94 37.01"),
        _row("run_flax_glue, deviation", "0.16/- 0.17 0.06/0.05 1.04 0.57 0.72/1.09 1.06 0.07/0.07 6.83"),
        _row("run_flax_glue, best", "84.10/- 91.01 87.58/90.81 66.06 92.66 89.90/85.78 60.57 88.70/89.04 46.48"),
    ),
    source=(
        "BERT-base cased (bert-base-cased), as Hugging Face publishes it beside its examples. run_glue: batch 32,"
        " learning rate 2e-5, 3 epochs, 5 for MRPC and WNLI. run_flax_glue: batch 32, five seeds, MNLI-m alone. One"
        " configuration each, not the best of a grid. CoLA: Matthews; where no metric is named: accuracy."
    ),
)
