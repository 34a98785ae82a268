"""Verdicts by hand; scores of right, shuffled and blank pictures; the protocol's fixed prompts."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from examples.tiny_sd.captions import ObjectRequest, Request
from examples.tiny_sd.measure import (
    evaluation_set,
    format_table,
    judge,
    measure,
    read_images,
    score,
)
from examples.tiny_sd.reader import HEADS, Readings
from examples.tiny_sd.render import render
from tiue_jax.io.errors import InputError


def _readings(**seen):
    words = {name: options[0] for name, options in HEADS.items()} | seen
    labels = {name: np.array([HEADS[name].index(word)]) for name, word in words.items()}
    return Readings(np.zeros((1, 2), np.float32), labels)


def _verdict(request, **seen):
    verdict = judge(_readings(**seen), [request])
    return {name: bool(v[0]) for name, v in verdict.items() if not np.isnan(v[0])}


RED_CIRCLE = ObjectRequest("circle", "red", None)
BLUE_SQUARE = ObjectRequest("square", "blue", None)
SINGLE = Request("", (RED_CIRCLE,), "top", None)
ABOVE = Request("", (RED_CIRCLE, BLUE_SQUARE), "vertical", "white")
AND = Request("", (RED_CIRCLE, BLUE_SQUARE), None, None)
SEEN_SINGLE = {"count": "1", "layout": "top", "shape_0": "circle", "colour_0": "red"}
SEEN_PAIR = {
    "count": "2",
    "layout": "vertical",
    "shape_0": "circle",
    "colour_0": "red",
    "shape_1": "square",
    "colour_1": "blue",
    "background": "white",
}
SWAPPED = SEEN_PAIR | {
    "shape_1": "circle",
    "colour_1": "red",
    "shape_0": "square",
    "colour_0": "blue",
}


def test_a_right_picture_is_right_in_all_that_is_mentioned():
    names = {"all", "count", "colour", "shape", "position"}
    assert _verdict(SINGLE, **SEEN_SINGLE) == dict.fromkeys(names, True)
    names = {"all", "count", "colour", "shape", "relation", "background"}
    assert _verdict(ABOVE, **SEEN_PAIR) == dict.fromkeys(names, True)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"colour_0": "blue"}, {"colour"}),
        ({"shape_0": "other"}, {"shape"}),
        ({"layout": "top left"}, {"position"}),
        ({"background": "black", "size_0": "large"}, set()),  # not mentioned
        ({"count": "2"}, {"count", "colour", "shape", "position"}),
    ],
)
def test_each_fault_is_counted_where_it_belongs(change, wrong):
    verdict = _verdict(SINGLE, **(SEEN_SINGLE | change))
    assert {name for name, right in verdict.items() if not right} == wrong | (
        {"all"} if wrong else set()
    )


def test_order_matters_only_if_a_relation_is_mentioned():
    verdict = _verdict(ABOVE, **SWAPPED)
    assert (verdict["relation"], verdict["all"]) == (False, False)
    assert verdict["colour"]
    assert verdict["shape"]
    assert all(_verdict(AND, **SWAPPED).values())


def test_exchanged_colours_are_wrong():
    """A blue circle above a red square, where a red circle and a blue square were asked for."""
    verdict = _verdict(AND, **(SEEN_PAIR | {"colour_0": "blue", "colour_1": "red"}))
    assert not verdict["all"]
    assert verdict["colour"] != verdict["shape"]


def test_wrong_axis_is_a_wrong_relation():
    assert not _verdict(ABOVE, **(SEEN_PAIR | {"layout": "horizontal"}))["relation"]


def test_evaluation_prompts_are_fixed_and_split_by_pairs():
    scenes, requests = evaluation_set()
    assert (len(scenes), len(requests)) == (1250, 1250)
    assert not any(r.is_held_out for r in requests[:1000])
    assert all(r.is_held_out for r in requests[1000:])
    few = evaluation_set(20, 10)[1]
    assert few == requests[:20] + requests[1000:1010]
    with pytest.raises(ValueError, match="from 0 to 250"):
        evaluation_set(1, 251)


def test_right_pictures_score_high_and_close():
    scenes, requests = evaluation_set(300, 100)
    result = score(render(scenes), requests)
    assert result["seen/all"] >= 0.97
    assert result["unseen/all"] >= 0.97
    assert min(result["recall"], result["coverage"], result["precision"], result["density"]) > 0.7
    other = score(render(scenes[:300])[::-1], requests[:300])
    assert other["seen/all"] < 0.1  # the wrong captions
    assert other["frechet"] == pytest.approx(result["frechet"], rel=1e-6)  # the same pictures
    noise = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), np.uint8)
    far = score(noise, requests[:300])
    assert far["seen/all"] < 0.05
    assert far["frechet"] > 10 * result["frechet"]
    assert far["recall"] < 0.1
    assert far["coverage"] < 0.1


def test_measure_gives_each_prompt_its_seed_in_batches_of_one_size():
    scenes, requests = evaluation_set(12, 3)
    pictures, calls = render(scenes), []

    def sample_fn(prompts, seeds):
        calls.append(len(seeds))
        assert list(prompts) == [requests[s].text for s in seeds]
        return pictures[list(seeds)]

    metrics, images = measure(sample_fn, requests, batch_size=4)
    assert calls == [4] * 5  # one to compile, then 15 pictures
    np.testing.assert_array_equal(images, pictures)
    assert metrics["seen/all"] == pytest.approx(score(pictures, requests)["seen/all"])
    assert metrics["seconds_per_image"] > 0
    with pytest.raises(ValueError, match="no prompts"):
        measure(sample_fn, [])


def test_pictures_and_captions_must_be_as_many():
    with pytest.raises(ValueError, match="2 pictures for 3 captions"):
        score(np.zeros((2, 64, 64, 3), np.uint8), evaluation_set(3, 0)[1])


def test_table_has_a_line_per_model():
    table = format_table({"teacher": {"seen/all": 0.912, "frechet": 1.234}, "student": {}})
    lines = table.splitlines()
    assert lines[0] == "| | all right | Frechet |"
    assert lines[2] == "| teacher | 91.2% | 1.23 |"
    assert lines[3] == "| student |  |  |"


def test_read_images_in_name_order(tmp_path):
    images = render(evaluation_set(3, 0)[0])
    for i in (2, 0, 1):
        Image.fromarray(images[i]).save(tmp_path / f"{i:03d}.png")
    (tmp_path / "grid.png").write_bytes(b"of the sampling command")
    np.testing.assert_array_equal(read_images(tmp_path, 3), images)
    with pytest.raises(InputError, match="expected 4, found 3"):
        read_images(tmp_path, 4)
    Image.fromarray(images[0, :32]).save(tmp_path / "001.png")
    with pytest.raises(InputError, match="expected 64x64, found 64x32"):
        read_images(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="cannot be read"):
        read_images(tmp_path, 3)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(side, *chunks):
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (_png(20_000), "cannot be read as a picture"),  # PIL's DecompressionBombError
        (_png(5_000), "picture of another size, expected 64x64, found 5000x5000"),
        (_png(64), "cannot be read as a picture"),  # no pixels
        (  # PIL's ValueError of a text that unpacks to more than 1 MB
            _png(64, _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21)))),
            "cannot be read as a picture",
        ),
    ],
)
def test_files_that_would_unpack_to_much_are_refused(tmp_path, data, said):
    (tmp_path / "0.png").write_bytes(data)
    with pytest.raises(InputError, match=f"0.png: {said}"):
        read_images(tmp_path, 1)


def _command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "examples.tiny_sd.measure", *flags],
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_measures_rendered_scenes(tmp_path):
    out = tmp_path / "real.json"
    done = _command("--real", "--num_seen=30", "--num_unseen=10", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert "| rendered |" in done.stdout
    assert out.is_file()


@pytest.mark.parametrize(
    ("key", "flags"), [("--out", ("--model=assets/tiny-sd",)), ("--write_prompts", ())]
)
def test_command_overwrites_no_result(tmp_path, key, flags):
    (tmp_path / "earlier").write_text("mine")
    done = _command(f"{key}={tmp_path / 'earlier'}", *flags)
    assert done.returncode == 2
    said = f"{tmp_path / 'earlier'} [{key}]: is there already, expected a new file"
    assert done.stderr == f"error: {said}\n"
    assert (tmp_path / "earlier").read_text() == "mine"


def test_command_refuses_two_choices_and_none():
    for flags in ((), ("--real", "--images=x")):
        done = _command(*flags)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--real", "--num_seen=0", "--num_unseen=0"), "[--num_seen, --num_unseen]: no prompts"),
        (("--model=assets/tiny-sd", "--num_steps=1"), "assets/tiny-sd: num_steps 1 with leading"),
        (
            ("--model=assets/tiny-sd", "--teacher", "--guidance_scale=nan"),
            "assets/tiny-sd: guidance_scale nan: expected a finite number",
        ),
        (
            ("--model=tests/reference/model", "--teacher"),
            "tests/reference/model: makes pictures of another size, expected 64, found 128",
        ),
    ],
)
def test_command_says_in_one_line_what_makes_no_pictures(flags, said):
    done = _command(*flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1


def test_one_step_of_the_teacher_is_measured():
    flags = ("--model=assets/tiny-sd", "--teacher", "--num_steps=1")
    done = _command(*flags, "--num_seen=2", "--num_unseen=0")
    assert done.returncode == 0, done.stderr
    assert "| assets/tiny-sd |" in done.stdout
