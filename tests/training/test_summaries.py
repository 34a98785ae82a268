import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tiue_jax.io.errors import RunError
from tiue_jax.training import summaries
from tiue_jax.training.summaries import (
    Progress,
    StepClock,
    Summaries,
    Window,
    encode_png,
    image_grid,
)


def window(*values: float, name: str = "loss/vsd") -> Window:
    made = Window()
    for step, value in enumerate(values, start=1):
        made.append(step, {name: jnp.float32(value), "grad_norm/lora": jnp.float32(1)})
    return made


def test_window_averages_and_begins_anew():
    made = window(1, 2, 6)
    assert made.means() == {"loss/vsd": 3.0, "grad_norm/lora": 1.0}
    assert made.means() == {}
    made.append(4, {"loss/lora": jnp.float32(7)})
    made.append(5, {"loss/vsd": jnp.float32(5), "loss/lora": jnp.float32(9)})
    assert made.means() == {"loss/vsd": 5.0, "loss/lora": 8.0}


@pytest.mark.parametrize(("bad", "shown"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_window_names_the_first_step_that_is_not_finite(bad: float, shown: str):
    made = window(1, bad, bad)
    with pytest.raises(RunError, match=f"step 2: loss/vsd is {shown}"):
        made.check()
    made = window(1, 2)
    made.check()
    made.append(3, {"loss/vsd": jnp.float32(bad), "grad_norm/lora": jnp.float32(1)})
    with pytest.raises(RunError, match="step 3: "):
        made.means()


def test_scalars_and_images_reach_files_and_tensorboard(tmp_path: Path):
    written = Summaries(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3)).astype(np.uint8)
    written.write_scalars(10, {"loss/vsd": 0.5, "epoch": 2.0})
    written.write_images(10, {"student": images})
    written.flush()
    written.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 10, "loss/vsd": 0.5, "epoch": 2.0,
    }  # fmt: skip
    grid = np.asarray(Image.open(tmp_path / "images" / "00000010.png"))
    np.testing.assert_array_equal(grid, image_grid(images))
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss/vsd")] == [(10, 0.5)]
    [image] = board.Images("images/student")
    shown = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(shown, grid)


def test_going_on_from_a_step_drops_what_came_later(tmp_path: Path):
    first = Summaries(tmp_path)
    for step in (1, 2, 3, 4):
        first.write_scalars(step, {"loss": float(step)})
    first.close()
    [events] = (tmp_path / "tensorboard").iterdir()  # read by name: second, host, process, number
    events.rename(events.with_name("events.out.tfevents.0000000001.earlier"))
    for name in ("00000002.png", "00000003.png", "00000004_teacher.png", "mine.png"):
        (tmp_path / "images" / name).write_bytes(b"a picture")
    second = Summaries(tmp_path, step=2)
    left = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert left == ["00000002.png", "mine.png"]
    second.write_scalars(3, {"loss": 30.0})
    second.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    board = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.parametrize(
    ("count", "shape"), [(1, (4, 5)), (2, (4, 12)), (3, (10, 12)), (5, (10, 19))]
)
def test_grid_is_near_to_a_square(count: int, shape: tuple[int, int]):
    images = np.zeros((count, 4, 5, 3), np.uint8)
    grid = image_grid(images)
    assert grid.shape == (*shape, 3)
    assert (grid == 0).all(-1).sum() == count * 4 * 5
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(grid)))), grid)


def test_clock_counts_the_iterations_between_logs(monkeypatch: pytest.MonkeyPatch):
    now = iter([100.0, 130.0, 132.0, 136.0])
    monkeypatch.setattr(summaries, "time", SimpleNamespace(monotonic=lambda: next(now)))
    clock = StepClock(0)
    assert clock.restart(1, wait_for={"loss": jnp.float32(0)}) == 30.0
    assert clock.lap(5) == 0.5
    assert clock.lap(5) is None


def test_progress_is_a_line_a_log_where_there_is_no_terminal(capfd: pytest.CaptureFixture[str]):
    progress = Progress(100, 20)
    progress.update(40, {"loss/vsd": 0.125, "loss/kl": 2.0, "grad_norm/lora": 1.0}, 0.5)
    progress.close()
    assert capfd.readouterr().err == "step 40/100  vsd 0.125  kl 2  0.5 s/step  00:30 left\n"


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(summaries.sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(100, 20)
    progress.update(40, {"loss/vsd": 0.125, "loss/kl": 2.0, "grad_norm/lora": 1.0}, 0.5)
    progress.close()
    shown = capfd.readouterr().err.split("\r")[-1]
    assert "40%|" in shown and " 40/100 [" in shown and "step/s, vsd=0.125, kl=2]" in shown


def test_progress_leaves_out_a_time_that_is_not_known(capfd: pytest.CaptureFixture[str]):
    progress = Progress(100, 20)
    progress.update(21, {"loss/vsd": 0.125}, None)
    progress.close()
    assert capfd.readouterr().err == "step 21/100  vsd 0.125\n"
