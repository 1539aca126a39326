"""A process that dies or hangs ends the others, in time and by name."""

import json
import re
import time

import pytest

NAMED = r"rank 1 \(process {pid} on \S+, last heard of in {at} after step 3\)"


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("fails", 2, "error: rank 1: its disk is full"),
        ("breaks", 1, "error: rank 1: ZeroDivisionError: a bug"),
        ("dies", 1, f"error: {NAMED} has ended, killed or crashed".replace("{at}", "training")),
        pytest.param(
            *("stops", 1, f"error: for over 9 s nothing has moved; it waits for {NAMED}".replace("{at}", "training")),
            marks=pytest.mark.slow,
        ),
        ("hangs", 1, f"error: for over 9 s nothing has moved; it waits for {NAMED}".replace("{at}", "reading data")),
    ],
)
def test_rank_zero_tells_whom_it_has_lost_and_ends(how, code, words, start_several, tmp_path) -> None:
    first, second = start_several(2, how)
    _, error = first.communicate(timeout=60)
    assert first.returncode == code, error
    last = error.strip().splitlines()[-1]
    assert re.match(words.replace("{pid}", str(second.pid)), last), error
    assert "Traceback" not in error
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["phase"], status["pid"]) == ("training", first.pid)
    if how == "hangs":
        second.communicate(timeout=20)
        assert second.returncode == 1, "what hangs is not left behind"


def test_the_end_of_rank_zero_ends_the_others(start_several, tmp_path) -> None:
    first, second = start_several(2, "runs")
    deadline = time.monotonic() + 60
    while not (tmp_path / "status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    _, error = second.communicate(timeout=60)
    assert second.returncode == 1
    assert "Traceback" not in error
    assert re.match(r"error: rank 0 .*has ended", error.strip().splitlines()[-1]), error
