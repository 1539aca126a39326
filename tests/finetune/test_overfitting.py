"""When a run is said to overfit, and from which epoch on."""

import pytest

from finetune.overfitting import overfitting, turning_point


def epochs_of(train_losses: str, eval_losses: str) -> list[dict]:
    pairs = zip(train_losses.split(), eval_losses.split(), strict=True)
    return [
        {"epoch": epoch, "train_loss": float(train), "eval_loss": float(loss), "metrics": {"dev": {"f1": epoch / 10}}}
        for epoch, (train, loss) in enumerate(pairs, start=1)
    ]


@pytest.mark.parametrize(
    ("train_losses", "eval_losses", "turns_at"),
    [
        ("9 7 5 3", "8 6 7 9", 2),
        ("9 7 5 3", "6 7 8 9", 1),
        ("9 7 5 3", "6 8 5 9", 3),  # the rise at epoch 2 was made good
        ("9 7 5 3", "8 6 6 9", 3),  # of equals the last: until then nothing has risen
        ("9 7 5 3", "9 7 5 3", None),  # both fall
        ("9 7 5 3", "8 6 7 6", None),  # the last epoch is as good as any
        ("3 5 7 9", "3 5 7 9", None),  # both rise: this run diverges
        ("9", "9", None),
    ],
)
def test_a_run_overfits_where_validation_loss_rises_while_training_loss_falls(
    train_losses: str, eval_losses: str, turns_at: int | None
):
    point = turning_point(epochs_of(train_losses, eval_losses))
    assert (point and point["epoch"]) == turns_at


def test_the_seeds_that_overfit_are_counted_and_their_losses_told():
    runs = [epochs_of("9 7 5", losses) for losses in ("4 5 6", "4 2 8", "3 2 1")]
    found = overfitting([{"epochs": epochs} for epochs in runs], "dev", "f1")
    assert str(found) == "2 of 3 seeds from epoch 2 to 3 on"
    assert (found.eval_loss, found.train_loss, found.score) == ((3.0, 7.0), (8.0, 5.0), (pytest.approx(0.15), 0.3))


def test_runs_that_do_not_overfit_have_nothing_to_tell():
    assert overfitting([{"epochs": epochs_of("9 7", "9 7")}], "dev", "f1") is None
