"""The Colab notebook: executed whole on the CPU, and what can be told of it without that."""

import ast
import base64
import contextlib
import io
import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from packaging.requirements import Requirement
from PIL import Image

from tests import xla
from tests.training.tiny_run import make_teacher

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "tiue_tpu_demo.ipynb"
USED = ("notebooks", "tiue_jax", "configs", "assets", "pyproject.toml", "requirements.txt")
SETTINGS = {
    "STEPS": 4,
    "BATCH": 2,
    "WARMUP": 0,  # with STUDENT_EVERY: one program is compiled, not two
    "STUDENT_EVERY": 1,
    "TEACHER_STEPS": 2,
    "SD15_STEPS": 2,
    "SD15_BATCH": 2,
}
PATIENCE = 1800  # seconds a cell; the suite may run on a machine that has other work
# What code may not know of the machine it runs on; /dev is where accelerators are looked for.
ABSOLUTE = re.compile(r"""["'](/(?!dev\b|OWNER/)\w+|~|[A-Za-z]:\\)""")


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: NotebookNode) -> dict[str, NotebookNode]:
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def text_of(cell: NotebookNode) -> str:
    return "".join(out.get("text", "") for out in cell.outputs if out.output_type == "stream")


def pictures_of(cell: NotebookNode) -> list[np.ndarray]:
    shown = [out.data for out in cell.outputs if "image/png" in out.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(d["image/png"])))) for d in shown]


# ---- Executed --------------------------------------------------------------------------------


# The embedded teacher's iteration alone takes minutes to compile.
TEACHERS = ["random", pytest.param("assets/tiny-sd", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What configs/tiny.py is run with; one of random weights and 4x4 pixels stands for others."""
    if request.param == "random":
        return str(make_teacher(tmp_path_factory.mktemp("teacher") / "random"))
    return request.param


@pytest.fixture(scope="module")
def copy(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone, as it were: the notebook writes into it, not into the working directory."""
    folder = tmp_path_factory.mktemp("clone")
    for name in USED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


@pytest.fixture(scope="module")
def executed(
    teacher: str, copy: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, NotebookNode]:
    """The code cells with what they put out, run from top to bottom by a kernel of its own."""
    home = tmp_path_factory.mktemp("jupyter")
    kept = {name: value for name, value in os.environ.items() if not _is_ours(name)}
    environment = kept | {
        **{f"TIUE_NOTEBOOK_{name}": str(value) for name, value in SETTINGS.items()},
        "TIUE_NOTEBOOK_TEACHER": teacher,
        "TIUE_NOTEBOOK_SD15": str(make_teacher(home / "sd")),  # in the place of the real one
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla.FLAGS,  # to compile; and one device, where the suite has eight
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",  # an installation would be a mistake, and is to fail at once
        "IPYTHONDIR": str(home),
    }
    notebook = read()
    client = NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", record_timing=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", str(home))
        with contextlib.suppress(CellExecutionError):  # of which the first test tells
            client.execute(env=environment, cwd=str(copy / "notebooks"))
    return code_cells(notebook)


def _is_ours(name: str) -> bool:
    """Whether a variable of this process is not for the notebook: paths, its way to draw."""
    return name in ("PYTHONPATH", "MPLBACKEND") or name.startswith("TIUE_NOTEBOOK_")


pytestmark = pytest.mark.filterwarnings("ignore")  # of Jupyter's many packages


def test_it_runs_without_an_error_and_installs_nothing(executed: dict[str, NotebookNode]) -> None:
    for name, cell in executed.items():
        errors = [out.evalue for out in cell.outputs if out.output_type == "error"]
        assert not errors and cell.execution_count, f"{name}: {text_of(cell)}\n{errors}"
    assert text_of(executed["missing"]) == "missing or of another release: nothing\n"
    assert not executed["install"].outputs
    assert "cpu" in text_of(executed["devices"])


@pytest.mark.parametrize(
    ("cell", "number"),
    [("student", 1), ("distil", 1), ("losses", 1), ("compare", 1), ("sd15-distil", 2),
     ("sd15-compare", 1)],
)  # fmt: skip
def test_pictures_are_shown(executed: dict[str, NotebookNode], cell: str, number: int) -> None:
    pictures = pictures_of(executed[cell])
    assert len(pictures) == number
    for picture in pictures:
        assert min(picture.shape[:2]) > 200 and picture[..., :3].std() > 10


def test_pictures_of_the_training_are_live(executed: dict[str, NotebookNode], copy: Path) -> None:
    """One place in the cell was renewed until the last picture of the run stood there."""
    (picture,) = pictures_of(executed["distil"])
    (workdir,) = copy.glob("runs/notebook-4-2-0-1")
    last = Image.open(workdir / "images" / "00000004.png")
    size = picture.shape[1], picture.shape[0]
    assert size[0] > last.width
    np.testing.assert_array_equal(picture, last.resize(size, Image.Resampling.NEAREST))
    log = text_of(executed["distil"])
    assert "to step 4" in log and "step 4/4" in log and "done: " in log


def test_losses_are_all_plotted(executed: dict[str, NotebookNode], copy: Path) -> None:
    (workdir,) = copy.glob("runs/notebook-4-2-0-1")
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(f'"loss/{x}"' in lines[0] for x in ("vsd", "kl", "lora"))
    assert re.search(r"\d+ ms an iteration", text_of(executed["losses"]))


def test_conversion_makes_folders_of_both_forms(
    executed: dict[str, NotebookNode], copy: Path
) -> None:
    runs = copy / "runs"
    assert (runs / "notebook-4-2-0-1-student" / "model_index.json").is_file()
    assert (runs / "notebook-4-2-0-1-student" / "tiue.json").is_file()
    assert (runs / "notebook-flax" / "unet" / "flax_params.safetensors").is_file()
    assert (runs / "notebook-sd15-flax" / "unet" / "flax_params.safetensors").is_file()
    assert re.search(r"\S+/kernel \[\d+(, \d+)+\]", text_of(executed["convert"]))


def test_teacher_and_student_are_compared_with_times(executed: dict[str, NotebookNode]) -> None:
    lines = text_of(executed["compare"]).splitlines()
    names = ["shipped student", "after 4 iterations", "student before", "teacher, 2 steps"]
    for line, name in zip(lines, names, strict=True):
        assert re.fullmatch(rf"{name} +\d+\.\d{{3}} s/image, memory not reported", line), line
    lines = text_of(executed["sd15-compare"]).splitlines()
    assert [line.split("  ")[0] for line in lines] == ["SD 1.5, one pass", "SD 1.5, 2 steps"]
    assert "training takes" in text_of(executed["sd15-distil"])


# ---- Read ------------------------------------------------------------------------------------


def test_it_is_valid_has_no_outputs_and_short_cells() -> None:
    notebook = read()
    nbformat.validate(notebook)
    for name, cell in code_cells(notebook).items():
        assert not cell.outputs and cell.execution_count is None, name
        assert len(cell.source.splitlines()) <= 40, name
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert len(texts) >= 10 and all("\n\n" in text for text in texts), "a heading and words"


@pytest.mark.parametrize("name", code_cells(read()))
def test_every_cell_compiles_and_names_no_place_of_a_machine(name: str) -> None:
    source = code_cells(read())[name].source
    ast.parse(source)
    assert not ABSOLUTE.search(source)


def test_badge_and_setting_name_one_repository() -> None:
    """The account is a marked place, the same one as in the settings of TPU pods."""
    notebook = read()
    links = re.findall(r"\]\((https://colab[^\s)]+\.ipynb)\)", notebook.cells[0].source)
    repository = re.search(r'^REPO = "(\S+)"', code_cells(notebook)["settings"].source, re.M)
    assert repository
    path = repository[1].removeprefix("https://github.com/")
    where = NOTEBOOK.relative_to(ROOT).as_posix()
    assert links == [f"https://colab.research.google.com/github/{path}/blob/main/{where}"]
    assert "colab-badge.svg" in notebook.cells[0].source
    assert repository[1] in (ROOT / "launch" / "pod.env.example").read_text()


class Stop(Exception):
    """Raised in the place of pip."""


def pip_command(kind: str, monkeypatch: pytest.MonkeyPatch, **versions: str) -> list[Requirement]:
    """What the install cell would ask pip for on a machine of that kind that lacks everything."""
    asked: list[str] = []

    def run(command: list[str], **options: Any) -> None:
        asked.extend(command)
        raise Stop

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "run", run)
    cells, scope = code_cells(read()), {"KIND": kind, "Path": Path, "subprocess": subprocess}
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(Stop):
        exec("import sys\n" + cells["missing"].source + "\nmissing = ['jax']", scope)
        scope["version"] = lambda name: versions.get(name) or version(name)
        exec(cells["install"].source, scope)
    assert asked[1:5] == ["-m", "pip", "install", "-q"]
    return [Requirement(text) for text in asked[5:]]


@pytest.mark.parametrize(
    ("kind", "extras"), [("cpu", set()), ("tpu", {"tpu"}), ("cuda12", {"cuda12"})]
)
def test_what_it_installs_is_what_the_tests_run_with(
    kind: str, extras: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX and its kin at the pins, in one command; nothing of Colab's is moved without need."""
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").open()]
    pins = {Requirement(line).name: line.split("==")[1] for line in lines if "==" in line}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {Requirement(line).name: Requirement(line) for line in project["dependencies"]}
    command = pip_command(kind, monkeypatch)
    asked = {wanted.name: wanted for wanted in command if str(wanted.specifier)[:2] != "=="}
    exact = {w.name: w for w in command if str(w.specifier)[:2] == "=="}
    assert exact["jax"].extras == extras
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "grain", "transformers"):
        assert str(exact.pop(name).specifier) == f"=={pins[name]}"
    assert set(exact) <= {"numpy", "scipy", "protobuf"}, "kept as they are, whatever they are"
    assert {n: str(w) for n, w in asked.items() if n != "matplotlib"} == {
        n: str(w) for n, w in listed.items() if n in asked
    }
    assert set(listed) <= {wanted.name for wanted in command}
    assert not {w.name for w in command} & {"tensorflow", "tensorflow-cpu", "torch"}
    assert "matplotlib" in asked and "==" not in code_cells(read())["settings"].source


def test_what_an_old_protobuf_cannot_read_is_not_installed(monkeypatch) -> None:
    """Of tfds 4.9.10; pip does not know it."""
    names = [w.name for w in pip_command("cpu", monkeypatch, protobuf="6.31.1")]
    assert "tensorflow-metadata" not in names
    asked = {w.name: str(w.specifier) for w in pip_command("cpu", monkeypatch, protobuf="5.29.5")}
    assert asked["protobuf"] == "==5.29.5"
    assert asked["tensorflow-metadata"] == "<1.18"


@pytest.mark.parametrize("cell", ["sd15-convert", "sd15-distil", "sd15-compare"])
def test_without_stable_diffusion_its_cells_are_skipped(
    cell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(code_cells(read())[cell].source, {"SD15": "", "Path": Path})
    assert capsys.readouterr().out.startswith("skipped: the setting SD15 names no folder")
