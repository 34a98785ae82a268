"""The sampling command: files, seeds, refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from tests import xla
from tests.conftest import ROOT
from tests.pretrained.folders import MODEL
from tiue_jax.io.images import GRID_IMAGES
from tiue_jax.pretrained.methods import METHODS
from tiue_jax.pretrained.pipeline import load_pipeline


def start(*flags: str, cwd=None, devices: int = 1) -> subprocess.Popen[str]:
    env = os.environ | {
        "XLA_FLAGS": f"{xla.FLAGS} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    }
    command = [sys.executable, "-m", "tiue_jax.sample", *flags]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=pipe, text=True)


def sample(*flags: str, cwd=None, devices: int = 1) -> subprocess.CompletedProcess[str]:
    with start(*flags, cwd=cwd, devices=devices) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read(file) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image).astype(int)


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in last


def test_files_seeds_and_default_folder(tmp_path):
    flags = ["--prompt=../../a RED cube", "--prompt=the blue sky", "--num_images=2", "--seed=3"]
    flags += [f"--model={MODEL}", "--method=tiue", "--num_steps=2"]
    result = sample(*flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    out = tmp_path / "samples" / "000"
    names = [f"{i:05d}_{w}.png" for i, w in enumerate(["a-red-cube"] * 2 + ["the-blue-sky"] * 2)]
    assert sorted(f.name for f in out.iterdir()) == sorted([*names, "grid.png", "samples.json"])
    told = json.loads((out / "samples.json").read_text())
    assert [i["seed"] for i in told["images"]] == [3, 4, 5, 6]
    assert told["images"][0]["prompt"] == "../../a RED cube"
    assert read(out / "grid.png").shape == (2 * 128 + 2, 2 * 128 + 2, 3)
    # the third image alone, on two devices, into the next free folder
    again = sample(
        f"--model={MODEL}", "--method=tiue", "--num_steps=2", "--seed=5", "--prompt=the blue sky",
        cwd=tmp_path, devices=2,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    one = read(tmp_path / "samples" / "001" / "00000_the-blue-sky.png")
    # another order of summation may cut a byte to the one below; worst seen 1
    assert np.abs(one - read(out / names[2])).max() <= 1


def test_a_teacher_s_images_of_a_file_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cube\nthe blue sky\n")
    result = sample(
        f"--model={MODEL}", "--teacher", "--num_steps=3", "--negative_prompt=rain", "--seed=4",
        "--prompt_file=prompts.txt", "--out=made", cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("made: 2 images in ")
    assert result.stdout.endswith("; made/grid.png\n")
    told = json.loads((tmp_path / "made" / "samples.json").read_text())
    assert [(i["prompt"], i["seed"]) for i in told["images"]] == [
        ("a red cube", 4), ("the blue sky", 5),
    ]  # fmt: skip
    pipeline = load_pipeline(MODEL)
    for image, negative, same in ((0, "rain", True), (1, "rain", True), (1, None, False)):
        listed = told["images"][image]
        expected = pipeline.sample(
            [listed["prompt"]], [listed["seed"]], method="teacher", num_steps=3,
            guidance_scale=7.5, negative_prompt=negative,
        )  # fmt: skip
        apart = np.abs(read(tmp_path / "made" / listed["file"]) - expected[0]).max()
        assert (apart <= 1) == same  # another order of summation, as above


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGINT], [signal.SIGTERM] * 2],  # timeout(1) sends its own twice
    ids=["Ctrl-C", "SIGTERM"],
)
def test_a_signal_leaves_the_images_that_were_made(tmp_path, signals):
    flags = (f"--model={MODEL}", "--method=tiue", "--num_steps=2", "--batch_size=1")
    with start(*flags, "--prompt=sky", "--num_images=10000", cwd=tmp_path) as process:
        while len(list(tmp_path.glob("samples/.*/*.png"))) < 3 and process.poll() is None:
            time.sleep(0.1)
        for number in signals:
            process.send_signal(number)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    told = json.loads((tmp_path / "samples" / "000" / "samples.json").read_text())
    made = [f.name for f in (tmp_path / "samples" / "000").glob("*_sky.png")]
    assert len(made) >= 3
    assert not told["complete"]
    # Ctrl-C may come between the last file and its entry
    assert {i["file"] for i in told["images"]} >= {f"{i:05d}_sky.png" for i in range(len(made) - 1)}
    note = f"samples/000: {len(told['images'])} of 10000 images were made"
    assert err.splitlines()[-2:] == [note, "error: interrupted"]
    assert [f.name for f in (tmp_path / "samples").iterdir()] == ["000"]


def test_sigterm_before_the_first_image_leaves_nothing(tmp_path):
    with start(f"--model={MODEL}", "--method=tiue", "--prompt=sky", cwd=tmp_path) as process:
        while not list(tmp_path.glob("samples/.*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_the_field_of_a_prompt_file_and_the_spacing_of_timesteps(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"Task2": {"Caption": "a red cube"}}\n')
    flags = [f"--model={MODEL}", "--method=tiue", "--num_steps=1", "--timestep_spacing=trailing"]
    flags += ["--prompt_file=p.jsonl", "--out=made"]
    result = sample(*flags, "--prompt_field=Task2.Caption", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "made" / "samples.json").read_text())
    assert told["images"][0]["prompt"] == "a red cube"
    named = {"prompt_field": "Task2.Caption", "timestep_spacing": "trailing"}
    assert told["settings"].items() >= named.items()
    result = sample(*flags, cwd=tmp_path)
    refused(result, "p.jsonl:1 [prompt]: field is missing, expected what --prompt_field names")


def test_an_earlier_result_is_never_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.png").write_bytes(b"mine")
    out = f"--out={tmp_path / 'out'}"
    result = sample(f"--model={MODEL}", "--method=tiue", "--num_steps=2", "--prompt=sky", out)
    refused(result, "out")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.png").read_bytes() == b"mine"


def test_two_at_the_same_time_keep_both_results(tmp_path):
    flags = (f"--model={MODEL}", "--method=tiue", "--num_steps=2")
    prompts = ("sky", "sea")
    both = [start(*flags, f"--prompt={prompt}", cwd=tmp_path) for prompt in prompts]
    for process in both:
        with process:
            assert "samples/00" in process.communicate()[0]
        assert process.returncode == 0
    assert sorted(f.name for f in (tmp_path / "samples").iterdir()) == ["000", "001"]
    told = [json.loads(f.read_text()) for f in tmp_path.glob("samples/*/samples.json")]
    assert {i["prompt"] for t in told for i in t["images"]} == set(prompts)


def test_a_prompt_that_is_cut_is_told_of_once(tmp_path):
    long = "a red cube " * 40
    flags = (f"--model={MODEL}", "--method=tiue", "--num_steps=2", "--num_images=3")
    result = sample(*flags, f"--prompt={long}", "--prompt=the blue sky", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    told = [line for line in result.stderr.splitlines() if "prompt is longer" in line]
    assert len(told) == 1
    assert "than 77 tokens; cut off: '" in told[0]
    assert "a red cube a red cube' (of a prompt of 440 characters)" in told[0]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--prompt=sky"], ["--model"]),
        ([f"--model={MODEL}"], ["--prompt"]),
        ([f"--model={MODEL}", "--prompt=sky"], ["--method", "does not say", "choose teacher"]),
        (
            [f"--model={MODEL}", "--prompt=sky", "--method=tiue", "--num_steps=1"],
            ["--num_steps", "input noise"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--method=one-step", "--guidance_scale=2"],
            ["--guidance_scale", "one-step has no guidance"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--method=turbo", "--negative_prompt=rain"],
            ["--negative_prompt", "turbo without guidance"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--method=one-step", "--timestep_spacing=leading"],
            ["[--timestep_spacing]: ", "one-step has timesteps of its own"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--teacher", "--timestep_spacing=log"],
            ["[--timestep_spacing]: ", "leading|trailing|linspace"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--prompt_field=text"],
            ["[--prompt_file]: no prompt source is given"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--method=turbo", "--teacher"],
            ["--method", "contradicts --teacher"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--teacher", "--tokenizer=x"],
            ["--tokenizer", "single files"],
        ),
        ([f"--model={MODEL}", "--prompt=sky", "--seed=-1"], ["--seed"]),
        (["--model=missing", "--prompt=sky"], ["missing: no such folder"]),
        (
            [f"--model={MODEL}", "--prompt_file=missing.txt"],
            ["missing.txt [--prompt_file]: no such file"],
        ),
        ([f"--model={MODEL}", "--prompt=sky \udcff"], ["[--prompt]: not UTF-8", "character 5"]),
        (
            [f"--model={MODEL}", "--prompt=sky", "--negative_prompt=\udcff"],
            ["[--negative_prompt]: not UTF-8"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--num_images=100000000000"],
            ["[--num_images]: too many images, expected at most 100000"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--teacher", "--guidance_scale=nan"],
            ["[--guidance_scale]: expected a finite number, found 'nan'"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", "--teacher", "--guidance_scale=inf"],
            ["[--guidance_scale]: expected a finite number, found 'inf'"],
        ),
        (
            [f"--model={MODEL}", "--prompt=sky", f"--out={MODEL}/model_index.json/x"],
            ["model_index.json: is a file, expected a folder"],
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, flags, parts):
    refused(sample(f"--out={tmp_path / 'out'}", *flags, cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


def test_help_teaches():
    result = sample("--help")
    assert result.returncode == 0
    grid = f"grid.png of the first {GRID_IMAGES}"
    for part in (
        "--teacher",
        "--num_images",
        grid,
        "1/255",
        "SIGTERM",
        "python -m tiue_jax.sample",
    ):
        assert part in result.stdout
    text = " ".join(result.stdout.split())
    assert ", ".join(f"{name} {m.num_steps}" for name, m in METHODS.items()) in text
    assert "By default turbo 1, lcm 8, teacher 7.5; LCM-LoRA 1." in text
