"""The TPU itself: created, waited for, created again, shown, deleted."""

from __future__ import annotations

import json

import pytest

from tests.launch.pod import Pod

CAPACITY = "ERROR: RESOURCE_EXHAUSTED: no more capacity in the zone"


def test_it_is_created_once_and_waited_for(pod: Pod) -> None:
    pod.run("create_tpu")
    (create,) = [call for call in pod.calls() if call[1] == "create"]
    assert create[2:5] == ["tiue-test", "--zone=us-west4-a", "--project=my-project"]
    assert "--node-id=tiue-test" in create and "--spot" in create
    done = pod.run("create_tpu")
    assert pod.actions() == ["create"], "what is there is kept"
    assert done.stderr == "launch: tiue-test: queued resource ACTIVE, node READY\n"


def test_it_waits_in_the_queue_and_for_the_node(pod: Pod) -> None:
    waiting = ["WAITING_FOR_RESOURCES", "PROVISIONING"]
    states = [[state, None] for state in waiting] + [["ACTIVE", "CREATING"], ["ACTIVE", "READY"]]
    pod.world(states=states)
    done = pod.run("create_tpu")
    assert pod.actions() == []
    assert [line.rpartition("resource ")[2] for line in done.stderr.splitlines()] == [
        "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE, node CREATING", "ACTIVE, node READY",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "state", [["SUSPENDED", None], ["FAILED", None], ["ACTIVE", "PREEMPTED"], ["ACTIVE", None]]
)
def test_what_was_preempted_is_deleted_and_created_again(pod: Pod, state: list[str]) -> None:
    pod.world(queued=state[0], node=state[1])
    pod.run("create_tpu")
    assert pod.actions() == ["delete", "create"]
    assert pod.world()["node"] == "READY"


def test_a_deletion_that_fails_is_repeated(pod: Pod) -> None:
    """The machines of a preempted node may still be going away."""
    pod.world(queued="SUSPENDED", delete=[[1, "ERROR: no network"], [1, "ERROR: ABORTED: later"]])
    done = pod.run("create_tpu")
    assert pod.actions() == ["delete"] * 3 + ["create"]
    assert "ABORTED" in done.stderr and done.stderr.count("not deleted; trying again in 0 s") == 2


@pytest.mark.parametrize(("text", "times"), [("no network", 10), ("PERMISSION_DENIED: no", 1)])
def test_a_deletion_is_not_repeated_for_ever(pod: Pod, text: str, times: int) -> None:
    pod.world(queued="SUSPENDED", delete=[[3, f"ERROR: {text}"]] * 12)
    done = pod.run("create_tpu", code=3)
    assert pod.actions() == ["delete"] * times and text in done.stderr
    assert done.stderr.splitlines()[-1] == "error: tiue-test: gcloud could not delete it"


def test_a_lack_of_capacity_is_repeated(pod: Pod) -> None:
    pod.world(create=[[1, CAPACITY], [1, CAPACITY]])
    done = pod.run("create_tpu")
    assert pod.actions() == ["create"] * 3
    assert done.stderr.count(CAPACITY) == 2 and "trying again in 0 s (2 of 8" in done.stderr


def test_it_is_repeated_so_often_and_no_more(pod: Pod) -> None:
    pod.write("CREATE_ATTEMPTS=3")
    pod.world(create=[[9, CAPACITY]] * 5)
    done = pod.run("create_tpu", code=9)
    assert pod.actions() == ["create"] * 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: [CREATE_ATTEMPTS]: tiue-test could not be created, given up")


def test_creations_that_fail_afterwards_are_counted_too(pod: Pod) -> None:
    """The queue takes the request, and then the state is FAILED."""
    pod.write("CREATE_ATTEMPTS=2")
    pod.world(states=[[None, None], ["FAILED", None], [None, None], ["FAILED", None]])
    done = pod.run("create_tpu", code=1)
    assert pod.actions() == ["create", "delete"] * 2
    assert "[CREATE_ATTEMPTS]" in done.stderr


def test_the_pause_grows(pod: Pod) -> None:
    pod.write(RETRY_SECONDS=1)
    pod.world(create=[[1, CAPACITY]] * 2)
    done = pod.run("create_tpu")
    assert "again in 1 s (1 of 8" in done.stderr and "again in 2 s (2 of 8" in done.stderr


def test_a_refusal_is_not_repeated_and_its_code_passed_on(pod: Pod) -> None:
    pod.world(create=[[3, "ERROR: PERMISSION_DENIED: no"]])
    done = pod.run("create_tpu", code=3)
    assert pod.actions() == ["create"]
    assert "PERMISSION_DENIED" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: tiue-test: gcloud could not create it"


def test_the_wait_ends(pod: Pod) -> None:
    pod.write("WAIT_HOURS=0")
    pod.world(queued="WAITING_FOR_RESOURCES")
    done = pod.run("create_tpu", code=1)
    assert "error: [WAIT_HOURS]: tiue-test is not there after 0 hours" in done.stderr


@pytest.mark.parametrize("script", ["create_tpu", "status", "delete_tpu"])
def test_where_gcloud_cannot_say_its_code_is_passed_on(pod: Pod, script: str) -> None:
    pod.world(queued="BROKEN")
    done = pod.run(script, code=7)
    assert "no network" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: tiue-test: gcloud cannot describe it"
    assert pod.actions() == []


def test_deletion_takes_the_node_with_it(pod: Pod) -> None:
    pod.run("create_tpu")
    assert pod.run("delete_tpu").stderr == "launch: tiue-test: deleted\n"
    assert pod.world()["node"] is None and "--force" in pod.calls()[-1]
    assert pod.run("delete_tpu").stderr == "launch: tiue-test: there is none\n"
    assert pod.actions() == ["create", "delete"]


def test_status_shows_states_step_and_log(pod: Pod) -> None:
    assert pod.run("status").stdout == "queued resource tiue-test: ABSENT\n"
    pod.run("train_pod")
    workdir = pod.fake / "buckets" / "bucket" / "runs" / "one"
    for step in ("900", "1000", "2000.orbax-checkpoint-tmp"):
        (workdir / "checkpoints" / step).mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss/vsd": 1.5}) for step in (1100, 1150)]
    (workdir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shown = pod.run("status").stdout.splitlines()
    assert shown[:4] == [
        "queued resource tiue-test: ACTIVE",
        "node tiue-test: READY, health HEALTHY",
        "training on worker 0: ended 0",
        "latest step logged: 1150, newest checkpoint: 1000",
    ]
    assert "attempt 0: step 1/2" in shown and len(shown) <= 4 + 15
    pod.world(queued="SUSPENDED", node="PREEMPTED")
    assert pod.run("status").stdout == "queued resource tiue-test: SUSPENDED\n"
