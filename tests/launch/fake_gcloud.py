"""A stand-in for gcloud: records its arguments, plays a TPU, runs ssh commands in homes of its own.

The folder TIUE_FAKE holds `world.json`, which says what there is and what happens next (pod.py
writes it), `calls.jsonl` (the arguments of every call, in order) and the workers' homes.
"""

import fcntl
import glob
import json
import os
import signal
import sys
import time

# Imports are few, because every call is a process of its own.
FAKE = os.environ.get("TIUE_FAKE", "")
LOST = 255


def main(argv: list[str]) -> int:
    """Record the call, and play it."""
    with open(f"{FAKE}/lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(f"{FAKE}/calls.jsonl", "a") as calls:
            calls.write(json.dumps(argv) + "\n")
        with open(f"{FAKE}/world.json") as file:
            world = json.load(file)
        result = play(argv, world)
        with open(f"{FAKE}/world.new", "w") as file:
            json.dump(world, file)
        os.replace(f"{FAKE}/world.new", f"{FAKE}/world.json")  # Ctrl-C may come at any time
    if not isinstance(result, dict):
        return result
    return ssh(**result)


def play(argv: list[str], world: dict) -> int | dict:
    """Change the world; return an exit code, or what to run by ssh."""
    assert argv[:2] == ["compute", "tpus"], argv
    group, verb = argv[2:4]
    if os.path.exists(f"{FAKE}/preempt"):
        os.unlink(f"{FAKE}/preempt")
        preempt(world)
    if group == "queued-resources":
        return queued(verb, argv, world)
    assert group == "tpu-vm", argv
    if verb == "describe":
        if not world["node"]:
            return absent()
        print(f"{world['node']}\t{world['health']}")
        return 0
    if world["node"] != "READY":
        print("ERROR: This TPU has terminal state, so it cannot be used anymore.", file=sys.stderr)
        return 1
    (worker,) = (arg.partition("=")[2] for arg in argv if arg.startswith("--worker="))
    names = range(world["workers"]) if worker == "all" else [int(worker)]
    homes = [f"{FAKE}/vm{world['generation']}/{i}" for i in names]
    if verb == "scp":
        for home in homes:
            copy(argv[4], f"{home}/{argv[5].partition(':')[2]}")
        return 0
    assert verb == "ssh", argv
    (command,) = (arg.partition("=")[2] for arg in argv if arg.startswith("--command="))
    _, found, action = command.partition("on_worker.sh ")
    effects = world["ssh"].get(action.split()[0] if found else "shell", [])
    effect = effects.pop(0) if effects else None
    if effect == "drop":
        return LOST
    if effect in ("preempt", "gone"):
        preempt(world)
        return LOST if effect == "preempt" else 1
    if isinstance(effect, int):
        return effect
    if effect == "twice":
        return {"homes": homes * 2, "command": command, "times": 1}
    return {"homes": homes, "command": command, "times": 2 if effect == "again" else 1}


def queued(verb: str, argv: list[str], world: dict) -> int:
    """Play `queued-resources`."""
    if verb == "describe":
        if world["states"]:
            world["queued"], world["node"] = world["states"].pop(0)
        if world["queued"] == "BROKEN":
            print("ERROR: (gcloud) no network", file=sys.stderr)
            return 7
        if not world["queued"]:
            return absent()
        print(world["queued"])
        return 0
    if verb == "create":
        code, text = world["create"].pop(0) if world["create"] else (0, "")
        print(text, file=sys.stderr)
        if code == 0:
            assert not world["queued"], "it exists"
            world["generation"] += 1
            for i in range(world["workers"]):
                os.makedirs(f"{FAKE}/vm{world['generation']}/{i}")
            world["queued"], world["node"] = "ACTIVE", "READY"
        return code
    assert verb == "delete" and "--force" in argv and "--quiet" in argv, argv
    if world["delete"]:
        code, text = world["delete"].pop(0)
        print(text, file=sys.stderr)
        return code
    world["queued"] = world["node"] = None
    return 0


def absent() -> int:
    """Say it as gcloud does."""
    print("ERROR: (gcloud) NOT_FOUND: Resource 'x' was not found", file=sys.stderr)
    return 1


def preempt(world: dict) -> None:
    """Take the machines away, with all that runs on them.

    A run that was begun gets as far as to say so, however slow this machine is: plan.json counts
    what started, and a process that does not lead its group yet would be missed.
    """
    world["queued"], world["node"] = "SUSPENDED", "PREEMPTED"
    for name in glob.glob(f"{FAKE}/vm{world['generation']}/*/.tiue_jax/pid"):
        machine = "/".join(name.split("/")[-4:-2])
        end = time.monotonic() + 30
        while f'"{machine}"' not in recorded() and time.monotonic() < end:
            time.sleep(0.05)
        end_run(name)


def recorded() -> str:
    """What the training wrote down on all machines."""
    try:
        with open(f"{FAKE}/training.jsonl") as file:
            return file.read()
    except FileNotFoundError:
        return ""


def end_run(pid_file: str) -> None:
    """Kill the run that a worker's `pid` names, if that is one of this test and nothing else.

    The number may be stale or made up, and killpg(1) would kill every process of the machine.
    """
    worker = os.path.dirname(pid_file)
    try:
        with open(pid_file) as file:
            process = int(file.read().split()[0])
        with open(f"/proc/{process}/cmdline") as file:
            line = file.read().split("\0")
        leads = os.getpgid(process) == process
    except (OSError, ValueError, IndexError):
        return
    if process > 1 and leads and f"{worker}/on_worker.sh" in line and process != os.getpgrp():
        os.killpg(process, signal.SIGKILL)


def copy(source: str, target: str) -> None:
    """Copy a file with its mode, as scp does."""
    with open(source, "rb") as file:
        data = file.read()
    mode = os.stat(source).st_mode & 0o777
    with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)


def ssh(homes: list[str], command: str, times: int) -> int:
    """Run the command on every worker at once, as sshd would; return the first code that is not 0.

    Again after its end if `times` is 2, as gcloud does where a connection breaks.
    """
    codes: list[int] = []
    for _ in range(times):
        started: list[int] = []
        codes = []
        try:
            started.extend(spawn(home, command) for home in homes)
            while started:
                codes.append(os.waitstatus_to_exitcode(os.waitpid(started[0], 0)[1]))
                del started[0]
        except KeyboardInterrupt:  # a shell between two children outlives it, with our pipe
            for process in started:
                os.kill(process, signal.SIGKILL)
            raise
    return next((code for code in codes if code), 0)


def spawn(home: str, command: str) -> int:
    """Start a command in a worker's home and environment, without an input."""
    env = {
        "HOME": home,
        "PATH": f"{FAKE}/worker_bin:/usr/bin:/bin",
        "TIUE_FAKE": FAKE,
        "TIUE_FOLLOW_SECONDS": "0.1",
        "TIUE_KILL_SECONDS": "1",
        "TIUE_RETRY_SECONDS": "0",
    }
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # or one that comes before exec is lost
        os.chdir(home)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.execvpe("bash", ["bash", "-c", command], env)
    return process


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
