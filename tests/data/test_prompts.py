import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from examples.tiny_sd.captions import describe
from examples.tiny_sd.scenes import sample_scenes
from tiue_jax.data.prompts import Prompts, load_prompts
from tiue_jax.io.errors import InputError


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refused(source: str, **options) -> InputError:
    with pytest.raises(InputError) as caught:
        load_prompts(source, **options)
    return caught.value


def test_text_file_is_a_prompt_a_line_without_blank_ones(tmp_path: Path):
    source = write(tmp_path / "p.txt", "\ufeffa cat\r\n\n  a dog \n\t\nün chat\u2028noir\na cat")
    prompts = load_prompts(source)
    assert prompts.texts == ("a cat", "a dog", "ün chat\u2028noir", "a cat")
    assert prompts.repeats == 0
    assert len(prompts) == 4


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_what_cannot_be_seen_is_no_prompt(tmp_path: Path, name: str):
    """U+FEFF (files put together) and U+200B (the web) are at the ends of texts as blanks are."""
    texts = ["\ufeffa", "\u200b", " \u200b\ufeff\t", "\ufeff \u200bb\u200b ", "c\u200bd\ufeffe"]
    lines = texts if name == "p.txt" else [f"\ufeff{json.dumps({'prompt': t})}" for t in texts]
    source = write(tmp_path / name, "\n\u200b\n".join(lines))
    assert load_prompts(source).texts == ("a", "b", "c\u200bd\ufeffe")
    assert "holds no prompts" in str(refused(write(tmp_path / name, "\n\u200b\n\ufeff\n")))


def test_a_bare_carriage_return_ends_a_line_where_nothing_else_does(tmp_path: Path):
    for content in ("a\rb\rc", "a\r\rb\rc\r", "a\rb\rc\n", "\ufeffa\rb\rc\r\n"):
        assert load_prompts(write(tmp_path / "p.txt", content)).texts == ("a", "b", "c")
    error = refused(write(tmp_path / "p.txt", b"a\r\rcaf\xe9\r"))
    assert (error.line, error.found) == (3, "byte 0xe9 at column 4")
    error = refused(write(tmp_path / "p.jsonl", '{"prompt": "a"}\r{"prompt": 3}\r'))
    assert error.line == 2
    # elsewhere it is white space, as JSON has it, and lines are those that other tools count
    assert load_prompts(write(tmp_path / "p.txt", "a\rb\nc\r\r\nd")).texts == ("a\rb", "c", "d")
    assert refused(write(tmp_path / "p.txt", b"a\rb\nc\r\r\n\xe9")).line == 3


def test_what_is_stripped_is_what_python_strips_and_two_more(tmp_path: Path):
    """Or the digest of prompts of an earlier run would be another, and no resume."""
    space = [c for c in map(chr, range(sys.maxunicode + 1)) if c.isspace() and c not in "\n\r"]
    other = ["\u00ad", "\u200c", "\u200d", "\u2060", "\x00", "\x08", "\x7f"]
    text = "".join(f"{c}a{c}\n" for c in space) + "".join(f"{c}b{c}\n" for c in other)
    expected = tuple(line.strip() for line in text.split("\n") if line.strip())
    assert load_prompts(write(tmp_path / "p.txt", text)).texts == expected


def test_deduplication_keeps_the_first_and_counts(tmp_path: Path):
    source = write(tmp_path / "p.txt", "b\na\nb \na\nc\n")
    prompts = load_prompts(source, deduplicate=True)
    assert prompts.texts == ("b", "a", "c")
    assert prompts.repeats == 2


def test_jsonl_takes_the_named_field_and_journeydbs_nested_one(tmp_path: Path):
    record = {"prompt": "p", "Task1": {}, "Task2": {"Caption": "a fox"}, "img_path": "x.jpg"}
    source = write(tmp_path / "p.jsonl", json.dumps(record) + "\n\n" + json.dumps(record) + "\n")
    assert load_prompts(source).texts == ("p", "p")
    assert load_prompts(source, field="Task2.Caption").texts == ("a fox", "a fox")


def test_jsonl_field_may_hold_several_texts(tmp_path: Path):
    source = write(tmp_path / "p.jsonl", '{"captions": ["one", "two"]}\n')
    assert load_prompts(source, field="captions").texts == ("one", "two")


def test_coco_captions(tmp_path: Path):
    document = {"images": [], "annotations": [{"id": 1, "caption": "A bus. "}, {"caption": "b"}]}
    source = write(tmp_path / "captions_val2014.json", json.dumps(document))
    assert load_prompts(source).texts == ("A bus.", "b")


def test_digest_is_of_the_texts_in_their_order():
    def digest(*texts: str) -> str:
        return Prompts(texts, "x").digest

    assert digest("a", "b") == Prompts(("a", "b"), "elsewhere.txt").digest
    assert len({digest("a", "b"), digest("b", "a"), digest("ab"), digest("a", "b", "")}) == 4


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_empty_file_is_refused(tmp_path: Path, name: str):
    for content in ("", "\n \n"):
        source = write(tmp_path / name, content)
        assert f"{source}: holds no prompts" in str(refused(source))


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_not_utf8_is_refused_with_its_line(tmp_path: Path, name: str):
    good = b'{"prompt": "a"}\n' if name.endswith("l") else b"a\n"
    source = write(tmp_path / name, good * 2 + b"caf\xe9\n")
    error = refused(source)
    assert error.line == 3
    assert str(error) == f"{source}:3: not UTF-8 text, expected UTF-8, found byte 0xe9 at column 4"


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_half_a_surrogate_pair_is_refused(tmp_path: Path, name: str):
    """JSON can hold it; UTF-8, the tokenizer and thus a run cannot."""
    lines = ['{"prompt": "a"}', r'{"prompt": "a \ud83d\ude00 \ud800"}']
    coco = r'{"annotations": [{"caption": "a \ud83d\ude00 \ud800"}]}'
    source = write(tmp_path / name, "\n".join(lines) if name == "p.jsonl" else coco)
    place = f"{source}:2 [prompt]" if name == "p.jsonl" else f"{source} [caption]"
    said = "not UTF-8 text, expected UTF-8, found '\\ud800' at character 5"
    assert str(refused(source)) == f"{place}: {said}"


def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path):
    number = "9" * 5000
    source = write(tmp_path / "p.jsonl", f'{{"prompt": "a"}}\n{{"prompt": {number}}}\n')
    assert str(refused(source)).startswith(f"{source}:2: broken JSON: Exceeds the limit")
    source = write(tmp_path / "p.json", f'{{"annotations": [{{"id": {number}}}]}}')
    assert str(refused(source)).startswith(f"{source}: broken JSON: Exceeds the limit")


def test_broken_json_line_is_refused_with_its_line(tmp_path: Path):
    source = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n')
    assert str(refused(source)).startswith(f"{source}:2: broken JSON: ")


MISSING = "field is missing, expected what data.field names (empty: the usual field), found"


@pytest.mark.parametrize(
    ("line", "field", "said"),
    [
        ('{"text": "a"}', "", f"[prompt]: {MISSING} the fields text"),
        ("{}", "caption", f"[caption]: {MISSING} no fields"),
        ('["a"]', "", f"[prompt]: {MISSING} list where 'prompt' should be"),
        ('{"Task2": "x"}', "Task2.Caption", f"[Task2.Caption]: {MISSING} str where"),
        ('{"prompt": null}', "", "[prompt]: field is not text, expected text, found NoneType"),
        ('{"prompt": ["a", 3]}', "", "[prompt]: field is not text, expected text, found int 3"),
    ],
)
def test_line_without_the_field_is_refused(tmp_path: Path, line: str, field: str, said: str):
    source = write(
        tmp_path / "p.jsonl", '{"prompt":"a","caption":"b","Task2":{"Caption":"c"}}\n' + line
    )
    assert f"{source}:2 {said}" in str(refused(source, field=field))


def test_what_named_the_field_is_named(tmp_path: Path):
    said = "expected what --prompt_field names (empty: the usual field), found the fields text"
    for name, content in (
        ("p.jsonl", '{"text": "a"}'),
        ("p.json", '{"annotations": [{"text": 1}]}'),
    ):
        source = write(tmp_path / name, content)
        assert said in str(refused(source, field_key="--prompt_field"))


def test_json_that_is_not_coco_is_refused(tmp_path: Path):
    for content, said in (("[1]", "not COCO captions"), ("{", "broken JSON")):
        source = write(tmp_path / "c.json", content)
        assert said in str(refused(source))


def test_source_that_is_not_there_or_of_no_kind_names_the_choices(tmp_path: Path):
    assert "no such file, expected one of .json, .jsonl, .txt, or tfds:" in str(
        refused(str(tmp_path / "none.txt"))
    )
    assert "is a folder" in str(refused(str(tmp_path)))
    assert "unknown kind of prompt file" in str(refused(write(tmp_path / "p.csv", "a")))
    assert "no prompt source is given" in str(refused(""))


@pytest.mark.parametrize("source", ["none.txt", "p.csv", "", "tfds:", "tfds:nowhere"])
@pytest.mark.filterwarnings("ignore")  # of tfds' dependencies
def test_what_named_the_source_is_named(tmp_path: Path, monkeypatch, source: str):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "p.csv", "a")
    assert refused(source).key == "data.source"
    assert refused(source, key="--prompt_file").key == "--prompt_file"


# --- tfds ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set with coco_captions' nested field, a plain one, and something large."""
    folder = tmp_path_factory.mktemp("tfds")
    # In a process of its own: tfds' builders warn, and stay registered.
    script = Path(__file__).parent / "build_captions.py"
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.filterwarnings("ignore")  # of tfds' dependencies
def test_tfds_reads_each_form_of_field_without_tensorflow(data_dir: Path):
    before = "tensorflow" in sys.modules
    folder = data_dir / "captions" / "1.0.0"
    plain = load_prompts(f"tfds:{folder}")
    assert sorted(plain.texts) == [f"scene {i}" for i in range(5)]
    nested = load_prompts(f"tfds:{folder}:train:captions.text")
    assert len(nested) == 10
    assert {"view 0 of 3", "view 1 of 3"} < set(nested.texts)
    assert load_prompts(f"tfds:{folder}:test", field="caption").texts == ("a test",)
    assert len(load_prompts(f"tfds:{folder}:train[:2]")) == 2
    assert ("tensorflow" in sys.modules) == before


@pytest.mark.filterwarnings("ignore")  # of tfds' dependencies
def test_tfds_by_name_and_what_it_refuses(data_dir: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(load_prompts("tfds:captions")) == 5
    assert "no such prepared data set" in str(refused("tfds:nowhere"))
    assert "Unknown split 'val'" in str(refused("tfds:captions:val"))
    assert "data set has no such text field" in str(refused("tfds:captions:train:title"))
    assert "not a tfds source" in str(refused("tfds:"))
    for field in ("image", "label", "captions", "captions.id", "caption.text"):
        said = f"[{field}]: data set has no such text field, expected a field of text"
        assert said in str(refused(f"tfds:captions:train:{field}"))
    said = "[latin of example 0]: not UTF-8 text, expected UTF-8, found byte 0xe9 at column 4"
    assert said in str(refused("tfds:captions:train:latin"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda shard: shard.unlink(), "No such file or directory"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:1000]), "at least 64KB"),
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-100]), "Corrupted"),
    ],
    ids=["deleted", "cut short", "without its end"],
)
@pytest.mark.filterwarnings("ignore")  # of tfds' dependencies
def test_a_shard_that_is_not_whole_is_refused(
    data_dir: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
):
    folder = Path(shutil.copytree(data_dir / "captions" / "1.0.0", tmp_path / "1.0.0"))
    (shard,) = folder.glob("captions-train.*")
    spoil(shard)
    error = str(refused(f"tfds:{folder}"))
    assert error.startswith(f"tfds:{folder} [example 0]: cannot be read: ")
    assert said in error


@pytest.mark.filterwarnings("ignore")  # of tfds' dependencies
def test_tfds_reads_the_project_s_own_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = [sys.executable, "-m", "examples.tiny_sd.builder", f"--data_dir={tmp_path}"]
    subprocess.run([*command, "--scale=0.0005"], check=True, capture_output=True)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    rng = np.random.default_rng([920_001, 0])  # the builder's first chunk
    captions = [describe(s, rng).text for s in sample_scenes(rng, 1000, pairs="seen")[:30]]
    assert sorted(load_prompts("tfds:tiny_scenes").texts) == sorted(captions)
    assert len(load_prompts("tfds:tiny_scenes:unseen")) == 1
    assert "no such text field" in str(refused("tfds:tiny_scenes:train:image"))
