"""A stuck run says so, again ever more rarely, and says nothing when it is not stuck."""

import time

import pytest

from tiue_jax.training.watchdog import watchdog


def told(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def stuck_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_stuck_step_is_told_of_with_stacks_and_ever_more_rarely(capfd):
    with watchdog(0.4, host=3) as finished:
        finished(7)
        stuck_here(2.4)  # told of after 0.4, 0.8 and 1.6 s
    said = capfd.readouterr().err
    assert [line.split(" s, ")[1] for line in told(said)] == [
        "since step 7; it goes on; what every thread is doing:"
    ] * 3
    assert told(said)[0].startswith("warning: host 3: no step finished for 0 s")
    assert said.count("in stuck_here") == 3


def test_a_step_begins_the_wait_again(capfd):
    with watchdog(1.0) as finished:
        for step in range(8):
            finished(step)
            time.sleep(0.2)
    assert told(capfd.readouterr().err) == []


@pytest.mark.parametrize("seconds", [0, 60])
def test_nothing_is_told_of_a_run_that_is_not_stuck(capfd, seconds: int):
    with watchdog(seconds) as finished:
        finished(1)
        time.sleep(0.3)
    assert capfd.readouterr().err == ""
