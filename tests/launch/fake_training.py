"""A stand-in for Python on a worker: plays `python -m tiue_jax.main`, after what plan.json says.

plan.json is a list, one entry a start: {"codes": [one a worker]} with, for a code, an exit code,
"wait" (until SIGTERM, then 75), "save" (the same once there is a file `may_end`, and until then a
second SIGTERM kills, as in tiue_jax.training.preemption), "begin" (has no handler yet: SIGTERM
kills), "hang" (whatever comes), or "die" (by SIGKILL).
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if "--help" in sys.argv:
    sys.exit(0)
FAKE = Path(os.environ["TIUE_FAKE"])
RECORDS = FAKE / "training.jsonl"
home = Path(os.environ["HOME"])

received: list[int] = []


def note(number: int, frame: object) -> None:
    received.append(number)
    if todo == "save":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def starts(worker: str | int) -> int:
    """How often the training was started on a worker, on all machines."""
    lines = RECORDS.read_text().splitlines() if RECORDS.exists() else []
    return sum(json.loads(line)["machine"].endswith(f"/{worker}") for line in lines)


def all_begun() -> bool:
    """Whether this attempt has begun on every worker, and the call that started it is over."""
    workers = json.loads((FAKE / "world.json").read_text())["workers"]
    latest = (FAKE / "calls.jsonl").read_text().splitlines()[-1]
    return all(starts(i) > attempt for i in range(workers)) and "on_worker.sh start " not in latest


signal.alarm(300)  # a test that fails leaves nothing behind for ever
attempt = starts(home.name)
plan = json.loads((FAKE / "plan.json").read_text())
codes = plan[attempt]["codes"] if attempt < len(plan) else [0]
todo = codes[min(int(home.name), len(codes) - 1)]
signal.signal(signal.SIGTERM, signal.SIG_DFL if todo == "begin" else note)
token = os.environ.get("HF_TOKEN_PATH")
record = {
    "machine": str(home.relative_to(FAKE)),
    "argv": sys.argv[1:],
    "code": sorted(path.name for path in Path.cwd().iterdir()),
    "token": Path(token).read_text() if token else None,
    "cache": os.environ.get("JAX_COMPILATION_CACHE_DIR"),
}
with open(RECORDS, "a") as file:
    file.write(json.dumps(record) + "\n")
print(f"attempt {attempt}: step 1/2", flush=True)
while not all_begun():
    time.sleep(0.05)
if todo == "die":
    parent = os.getppid()  # the wrapper, if it is still there
    line = Path(f"/proc/{parent}/cmdline").read_text().split("\0")
    if parent > 1 and f"{home}/.tiue_jax/on_worker.sh" in line:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
while todo in ("hang", "begin") or (todo in ("wait", "save") and not received):
    time.sleep(0.05)
if todo == "save":
    print(f"attempt {attempt}: saves", flush=True)
    while not (FAKE / "may_end").exists():
        time.sleep(0.05)
print(f"attempt {attempt}: ends", flush=True)
sys.exit(75 if todo in ("wait", "save") else todo)
