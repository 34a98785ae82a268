"""The loop with a step that compiles in no time; the real step is in test_resume.py."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.pretrained.folders import MODEL
from tests.training.tiny_run import PROMPTS, make_prompts, make_teacher
from tests.training.toy_step import ToyStep, assert_same, logged, steps_of, use_devices
from tiue_jax.io.errors import InputError, Preempted, RunError
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.training import loop, setup, summaries
from tiue_jax.training.checkpoint import Checkpoints, restore_params
from tiue_jax.training.loop import train

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_the_student_may_start_elsewhere_than_at_its_teacher(config, done: Path, workdir: Path):
    other = make_teacher(workdir.with_name("other"), seed=1)
    config.student.start = str(other)
    config.train.student_lr = 0.0  # the toy then stays
    train(config, workdir)
    student = load_stable_diffusion(workdir / "student", place=np.asarray)
    assert_same(student.params["unet"], load_stable_diffusion(other).params["unet"])
    assert_same(student.params["vae"], load_stable_diffusion(done / "teacher").params["vae"])
    with pytest.raises(InputError, match=r"begun otherwise: teacher: student was '[0-9a-f]+'"):
        config.student.start = ""
        train(config, workdir)


def test_a_start_of_another_shape_is_refused(config, done: Path, workdir: Path):
    config.student.start = str(MODEL)
    with pytest.raises(InputError, match=r"\[student.start\]: the student's UNet is not of the"):
        train(config, workdir)


def test_the_clip_term_gets_its_networks(config, toy: ToyStep, workdir: Path):
    config.clip.tau = 0.35
    config.clip.model, config.clip.taesd = str(MODEL / "clip"), str(MODEL / "taesd")
    run = setup.set_up(config, lambda text: None)
    assert toy.options.clip_tau == 0.35
    assert toy.options.clip_iterations == 3  # nine prompts in batches of four
    assert toy.text_image.size == 224
    assert toy.text_image.mean is None  # as in the source
    assert run.frozen.clip["text_projection"]["kernel"].shape == (32, 24)
    assert run.frozen.taesd is not None
    assert {"clip", "taesd"} <= run.description["teacher"].keys()
    config.clip.source_faithful = False
    setup.set_up(config, lambda text: None)
    assert toy.text_image.mean == pytest.approx((0.481, 0.458, 0.408), abs=1e-3)


@pytest.mark.parametrize("key", ["clip.model", "clip.taesd"])
def test_networks_of_the_clip_term_that_are_not_there_are_refused(config, workdir: Path, key: str):
    config.clip.tau = 0.35
    config.clip.model, config.clip.taesd = str(MODEL / "clip"), str(MODEL / "taesd")
    config.update_from_flattened_dict({key: "./missing"})
    with pytest.raises(InputError, match="missing"):
        train(config, workdir)


def test_a_run_leaves_metrics_checkpoints_and_a_student(config, done: Path):
    workdir = done / "run"
    assert [line["step"] for line in logged(workdir)] == [1, 2, 3, 4]
    assert logged(workdir)[-1]["epoch"] == pytest.approx(4 * 4 / len(PROMPTS))
    assert steps_of(workdir) == [2, 4]
    run = json.loads((workdir / "run.json").read_text())
    assert run["config"]["train.batch_size"] == 4
    assert run["prompts"]["count"] == len(PROMPTS)
    student = load_stable_diffusion(workdir / "student")
    assert student.student is not None
    assert student.student.num_steps == config.student.num_steps
    assert_same(student.params["unet"], restore_params(workdir, "ema")[1])
    assert json.loads((workdir / "student" / "training.json").read_text())["step"] == 4


def test_the_same_command_again_does_nothing(config, finished: Path, capfd, monkeypatch):
    """Nor does a newer version of the code, or another log: the student stays what it was."""
    monkeypatch.setattr(setup, "code_version", lambda: {"source": "newer"})
    config.log.every = 3
    before = {p: p.stat().st_mtime_ns for p in (finished / "student").rglob("*")}
    metrics = (finished / "metrics.jsonl").read_bytes()
    train(config, finished)
    assert {p: p.stat().st_mtime_ns for p in (finished / "student").rglob("*")} == before
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    assert "step 4: nothing is left to do" in capfd.readouterr().err


def test_a_run_that_is_done_keeps_what_it_was_by_fewer_iterations(config, finished: Path):
    noted = (finished / "run.json").read_bytes()
    config.train.iterations = 2
    train(config, finished)
    assert (finished / "run.json").read_bytes() == noted


def test_data_and_seeds_reach_the_run(config, workdir: Path):
    """The prompts' field, repeats and order; the draws of every iteration."""
    rows = [{"said": {"as": text}} for text in (*PROMPTS, *PROMPTS[:2])]
    workdir.mkdir()
    file = workdir / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config.data.source, config.data.field = str(file), "said.as"
    config.train.iterations = 1

    def first(number: int, **changed: Any) -> tuple[setup.Setup, float]:
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changed.items()})
        train(config, workdir / f"run{number}")
        [line] = logged(workdir / f"run{number}")
        return setup.set_up(config, lambda text: None), line["loss/lora"]

    once, loss = first(0)
    assert (len(once.prompts), once.prompts.repeats) == (len(PROMPTS), 2)
    again, same = first(1)
    assert loss == same
    ids = [next(run.batches)["input_ids"] for run in (once, again)]
    np.testing.assert_array_equal(*ids)
    other, _ = first(2, data__shuffle_seed=7)
    assert np.any(next(other.batches)["input_ids"] != ids[0])
    kept, other_loss = first(3, data__deduplicate=False, seed=5)
    assert (len(kept.prompts), kept.prompts.repeats) == (len(PROMPTS) + 2, 0)
    assert other_loss != loss


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes_and_what_is_computed_again_reach_the_networks(config, toy: ToyStep, dtype: str):
    config.train.compute_dtype, config.train.remat = dtype, "attention"
    frozen = setup.set_up(config, lambda text: None).frozen
    assert (toy.unet.remat, toy.unet.dtype) == ("attention", jnp.dtype(dtype))
    assert {x.dtype for x in jax.tree.leaves(frozen.teacher)} == {jnp.dtype(dtype)}
    config.train.teacher_dtype = "float32"
    frozen = setup.set_up(config, lambda text: None).frozen
    assert {x.dtype for x in jax.tree.leaves(frozen.teacher)} == {jnp.dtype("float32")}


def test_a_longer_run_goes_on_and_keeps_the_earlier_student(config, finished: Path, workdir: Path):
    first = restore_params(finished)[1]
    config.train.iterations = 6
    train(config, finished)
    assert_same(load_stable_diffusion(finished / "student_00000004").params["unet"], first)
    assert [line["step"] for line in logged(finished)] == [1, 2, 3, 4, 5, 6]
    train(config, workdir)  # at once
    assert logged(workdir) == logged(finished)
    assert_same(restore_params(workdir)[1], restore_params(finished)[1])


def test_in_the_warm_up_the_lora_learns_alone(config, finished: Path, workdir: Path):
    config.train.lora_warmup = 2
    train(config, workdir)
    assert ["loss/vsd" in line for line in logged(workdir)] == [False, False, True, True]
    # Iteration i draws what it draws without a warm-up.
    assert logged(workdir)[2]["loss/vsd"] == logged(finished)[2]["loss/vsd"]
    assert logged(workdir)[0]["loss/lora"] == logged(finished)[0]["loss/lora"]


def test_a_student_that_will_not_learn_is_told_of(config, workdir: Path, capfd):
    config.train.lora_warmup = 4
    train(config, workdir)
    assert "warning: in 4 iterations the student learns in none" in capfd.readouterr().err


def test_the_student_can_learn_in_every_second_iteration(config, workdir: Path, capfd):
    config.train.student_every = 2
    train(config, workdir)
    assert "warning" not in capfd.readouterr().err
    assert ["loss/vsd" in line for line in logged(workdir)] == [False, True, False, True]
    assert all("loss/lora" in line for line in logged(workdir))


def test_no_iterations_export_the_teacher(config, workdir: Path):
    config.train.iterations = 0
    train(config, workdir)
    assert_same(
        load_stable_diffusion(workdir / "student").params["unet"],
        load_stable_diffusion(config.teacher).params["unet"],
    )


# --- numbers that are not finite ----------------------------------------------------------------


@pytest.mark.parametrize("log_every", [1, 50])
def test_nan_names_step_and_metric_and_is_not_saved(
    config, finished: Path, toy, log_every: int, monkeypatch
):
    toy.nan_at = 7
    config.log.every = log_every
    config.train.iterations = 60
    closed: list[bool] = []
    close = Checkpoints.close
    monkeypatch.setattr(Checkpoints, "close", lambda self: (close(self), closed.append(True))[0])
    with pytest.raises(RunError, match=r"^step 7: loss/kl is nan; newest checkpoint: step 6$"):
        train(config, finished)
    assert closed == [True]  # waits for the save of step 6
    assert steps_of(finished) == [4, 6]
    assert not (finished / "student_00000004").exists()
    assert all(np.isfinite(list(line.values())).all() for line in logged(finished))
    if log_every == 1:
        toy.nan_at = -1  # the cause is gone: the same command goes on
        config.train.iterations = 8
        train(config, finished)
        assert steps_of(finished) == [6, 8]


# --- being told to stop ---------------------------------------------------------------------------


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """Send this process a signal while iteration `step` is noted."""
    append = summaries.Window.append

    def noted(self: summaries.Window, at: int, metrics: Any) -> None:
        append(self, at, metrics)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(summaries.Window, "append", noted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_goes_on(
    config, workdir: Path, done: Path, monkeypatch, number: int
):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        with pytest.raises(Preempted, match="saved step 3"):
            train(config, workdir)
    assert steps_of(workdir) == [2, 3]
    assert signal.getsignal(number) == before
    if number == signal.SIGTERM:
        train(config, workdir)
        assert logged(workdir) == logged(done / "run")
        assert_same(restore_params(workdir)[1], restore_params(done / "run")[1])


def test_what_was_not_logged_yet_is_logged_when_told_to_stop(
    config, workdir: Path, done: Path, monkeypatch
):
    config.log.every = 50
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(Preempted, match="saved step 3"):
            train(config, workdir)
    train(config, workdir)
    assert [line["step"] for line in logged(workdir)] == [3, 4]
    each = [line["loss/vsd"] for line in logged(done / "run")]
    assert logged(workdir)[0]["loss/vsd"] == pytest.approx(np.mean(each[:3]))
    assert logged(workdir)[1]["loss/vsd"] == each[3]


def test_a_kill_leaves_half_a_line_and_it_is_dropped(config, finished: Path):
    whole = (finished / "metrics.jsonl").read_text()
    (finished / "metrics.jsonl").write_text(whole + '{"step": 5, "loss/vsd": 1}\n{"step": 6, "lo')
    config.train.iterations = 5
    train(config, finished)
    assert [line["step"] for line in logged(finished)] == [1, 2, 3, 4, 5]
    assert "loss/kl" in logged(finished)[-1]


# --- whose folder it is -------------------------------------------------------------------------


def test_folder_of_a_live_run_is_refused(config, workdir: Path):
    with loop.claim(workdir), pytest.raises(InputError, match=f"found process {os.getpid()}"):
        train(config, workdir)
    with loop.claim(workdir):
        pass  # free again


def test_folder_with_other_files_is_refused(config, workdir: Path):
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="output folder is in use"):
        train(config, workdir)
    assert [p.name for p in workdir.iterdir()] == ["thesis.tex"]
    with pytest.raises(InputError, match="is a file"):
        train(config, workdir / "thesis.tex")


# --- input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.batch_size", 6, r"\[train.batch_size\]: batch size 6: expected .* 4 devices"),
        ("mesh.fsdp", 3, r"\[mesh\]: mesh data -1 x fsdp 3: expected 4 devices in all"),
        ("student.num_steps", 1, r"\[teacher or student\]: .*"),
        ("lora.targets", ("to_x",), r"\[lora\]: LoRA targets \['to_x'\]"),
        ("teacher", "nowhere", "nowhere"),
        ("data.source", "nowhere.txt", r"nowhere.txt \[data.source\]: no such file"),
    ],
)
def test_what_does_not_fit_is_refused(config, workdir: Path, monkeypatch, key, value, said: str):
    if key == "student.num_steps":
        from tiue_jax.training.step import make_step

        monkeypatch.setattr(setup, "make_step", make_step)
    use_devices(monkeypatch, 4)
    config.mesh.data = -1
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError, match=said):
        train(config, workdir)
    assert not (workdir / "checkpoints").exists()


def test_long_prompts_are_told_of_and_used(config, workdir: Path, tmp_path: Path, capfd):
    long = "a photo of a waterfall " * 40 + "at the very end"
    config.data.source = str(make_prompts(tmp_path / "long.txt", (*PROMPTS, long)))
    train(config, workdir)
    said = capfd.readouterr().err
    assert said.count("prompt is longer than 77 tokens, cut off: ") == 1
    assert "at the very end' of 'a photo" in said
    assert "1 prompt longer than the tokenizer takes" in said


# --- the device --------------------------------------------------------------------------------


def test_nothing_waits_for_the_device_between_logs(config, workdir: Path, monkeypatch):
    config.log.every = 4
    config.train.iterations = 12
    config.checkpoint.every = 6
    steps: list[int] = []
    waited: list[int] = []
    append, wait = summaries.Window.append, jax.block_until_ready
    array = type(jnp.zeros(()))
    value = array._value  # what float, bool, str and device_get of an array come to
    monkeypatch.setattr(
        summaries.Window, "append", lambda s, n, m: (steps.append(n), append(s, n, m))[1]
    )
    monkeypatch.setattr(
        array, "_value", property(lambda x: (waited.append(steps[-1:]), value.__get__(x))[1])
    )
    monkeypatch.setattr(jax, "block_until_ready", lambda x: (waited.append(steps[-1:]), wait(x))[1])
    train(config, workdir)
    assert {n for [n] in filter(None, waited)} == {1, 4, 6, 8, 12}


def test_no_time_of_an_iteration_holds_a_compilation(config, workdir: Path, monkeypatch):
    """Where an iteration is the first of its program, the clock begins behind it."""
    config.train.lora_warmup = 2
    restarted: list[int] = []
    restart = summaries.StepClock.restart
    monkeypatch.setattr(
        summaries.StepClock,
        "restart",
        lambda self, step, **named: (restarted.append(step), restart(self, step, **named))[1],
    )
    train(config, workdir)
    assert restarted == [1, 3]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert ["time/step_ms" in line for line in lines] == [False, True, False, True]


def test_a_stuck_run_is_watched_for_from_its_beginning(config, workdir: Path, monkeypatch):
    told: list[Any] = []

    @contextmanager
    def watchdog(seconds: float, *, host: int) -> Iterator[Callable[[int], None]]:
        told.append((seconds, host))
        yield told.append

    def set_up(*arguments: Any) -> Any:
        told.append("read")
        return setup.set_up(*arguments)

    monkeypatch.setattr(loop, "watchdog", watchdog)
    monkeypatch.setattr(loop, "set_up", set_up)
    config.log.stuck_after = 77
    train(config, workdir)
    assert told == [(77, 0), "read", 1, 2, 3, 4]


def test_nothing_goes_to_the_device_unsaid(config, workdir: Path, monkeypatch):
    monkeypatch.setattr(jax, "make_array_from_process_local_data", lambda place, ids: ids)
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(config, workdir)
