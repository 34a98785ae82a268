"""huggingface_hub's own client against a hub in this process (`hub_server`), each run a process.

The upload protocol is not played: past `create_repo`, `push_to_hub` is shown to call `HfApi` right.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.pretrained.folders import MODEL, bits, copy_model
from tests.pretrained.hub_server import Hub, model_files, serve
from tiue_jax.io.errors import InputError
from tiue_jax.pretrained import hub as hub_module
from tiue_jax.pretrained.auxiliary import load_clip
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.pretrained.hub import MOVED, needed_files, push_to_hub, resolve_model

ROOT = Path(__file__).parents[2]
NAMES = sorted(model_files(MODEL))
DECOYS = {
    "v1-5-pruned.safetensors": b"a whole checkpoint",
    "v1-5-pruned.ckpt": b"\x80\x04",
    "README.md": b"# no weights",
    "unet/diffusion_pytorch_model.bin": b"\x80\x04",
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half a UNet",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"another",
    "unet/diffusion_flax_model.msgpack": b"\x80",
    "unet/*": b"a glob",
    "unet/[a-z]*.safetensors": b"a glob",
    "text_encoder/model.fp16.safetensors": b"half a text encoder",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"half a VAE",
    "vae/model.onnx": b"graph",
    f"vae/{'long' * 60}.safetensors": b"a name of 240 letters",
    "safety_checker/config.json": b"{}",
    "safety_checker/model.safetensors": b"eyes",
    "feature_extractor/preprocessor_config.json": b"{}",
}
SCRIPT = """
import sys
from tiue_jax.io.errors import run_command
from tiue_jax.pretrained.hub import push_to_hub, resolve_model, resolve_network

def main(argv):
    if argv[1] == "push":
        print(push_to_hub(argv[2], argv[3]), end="")
    elif argv[1] == "network":
        print(resolve_network(argv[2]), end="")
    else:
        print(resolve_model(argv[1], variant=argv[2] if argv[2:] else None), end="")

for command in sys.argv[1:]:  # a process costs a second
    try:
        run_command(main, ["command", *command.split(" ")])
    except SystemExit as stop:
        print("", stop.code)
        print("next", file=sys.stderr)
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve(Hub(files=model_files(MODEL) | DECOYS)) as hub:
        yield hub


@pytest.fixture
def ask(hub: Hub, tmp_path: Path) -> Callable[..., list[Done]]:
    """Run commands in a process whose hub is `hub`.

    NAME, "NAME VARIANT", "network NAME", "push FOLDER NAME".
    """
    hub.asked.clear()

    def run(*commands: str, **environment: str) -> list[Done]:
        gone = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE")
        settings = {name: value for name, value in os.environ.items() if name not in gone}
        settings |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(ROOT),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, *commands],
            env=settings | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed = [line.rpartition(" ") for line in done.stdout.splitlines()]
        said = done.stderr.split("next\n")[:-1]
        return [
            Done(int(code), out, err) for (out, _, code), err in zip(printed, said, strict=True)
        ]

    return run


def test_only_what_is_needed_comes_and_only_once(ask: Callable[..., list[Done]], hub: Hub) -> None:
    (done,) = ask("owner/tiny-sd")
    assert done.code == 0, done.err
    assert hub.downloads() == set(NAMES)
    folder = Path(done.out)
    assert sorted(model_files(folder)) == NAMES
    ours, theirs = (
        load_stable_diffusion(path, param_dtype=None, place=np.asarray) for path in (MODEL, folder)
    )
    assert bits(theirs.params) == bits(ours.params)
    assert theirs.tokenizer.files == ours.tokenizer.files

    hub.asked.clear()
    (again,) = ask("owner/tiny-sd@main")
    assert (again.code, again.out) == (0, done.out)
    assert hub.downloads() == set()

    hub.asked.clear()
    offline, other = ask("owner/tiny-sd", "owner/tiny-sd@v2", HF_HUB_OFFLINE="1")
    assert (offline.code, offline.out) == (0, done.out)
    said = f"owner/tiny-sd@v2: {TAKEN}is not in the cache, and HF_HUB_OFFLINE forbids to ask"
    _assert_refused(other, said)
    (folder / "unet/config.json").unlink()
    _assert_refused(*ask("owner/tiny-sd", HF_HUB_OFFLINE="1"), "no unet/config.json")
    assert hub.asked == []


def test_a_network_of_its_own_comes_alone(ask: Callable[..., list[Done]], hub: Hub) -> None:
    decoys = {"pytorch_model.bin": b"\x80\x04", "vocab.json": b"{}", "tf_model.h5": b"h5"}
    with serve(Hub(files=model_files(MODEL / "clip") | decoys)) as other:
        (done,) = ask("network owner/tiny-sd", HF_ENDPOINT=other.url)
        assert done.code == 0, done.err
        wanted = {"config.json", "preprocessor_config.json", "model.safetensors"}
        assert other.downloads() == wanted
    assert load_clip(done.out).size == 224
    (again,) = ask("network owner/tiny-sd", HF_HUB_OFFLINE="1")
    assert (again.code, again.out) == (0, done.out)
    with serve(Hub(files={"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})) as other:
        (refused,) = ask("network owner/tiny-sd@main", HF_ENDPOINT=other.url)
    _assert_refused(refused, "has no .safetensors weights; pickle files can run any code")


def test_another_kind_of_model_is_refused_before_its_weights_come(
    ask: Callable[..., list[Done]],
) -> None:
    files = model_files(MODEL)
    index = files["model_index.json"]
    xl = index.replace(b"StableDiffusionPipeline", b"StableDiffusionXLPipeline")
    assert xl != index
    with serve(Hub(files=files | {"model_index.json": xl})) as other:
        (done,) = ask("owner/tiny-sd", HF_ENDPOINT=other.url)
        assert other.downloads() == {"model_index.json"}
    assert done.code == 2
    assert "another kind of model, expected StableDiffusionPipeline" in done.err
    assert "SDXL" in done.err


def test_a_variant_comes_where_there_is_one(ask: Callable[..., list[Done]], hub: Hub) -> None:
    assert ask("owner/tiny-sd fp16")[0].code == 0
    weights = {name for name in hub.downloads() if name.endswith(".safetensors")}
    assert weights == {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    }


TAKEN = "no such folder or file, so taken as a hub id: "
REFUSED: dict[str, tuple[tuple[int, str], str]] = {
    "gated": ((403, "GatedRepo"), "is gated: accept its terms at http"),
    "private": ((401, "RepoNotFound"), "no such repository of the hub; if it is"),
    "token": ((401, "Invalid credentials in Authorization header"), "the hub does not know the"),
    "forbidden": ((403, "Forbidden"), "the hub refuses access (403): log in with `hf auth login`"),
    "broken": ((500, "Internal"), "the hub answers with an error (500): try again later"),
    "portal": ((200, ""), "what http"),
}
ABSENT = {
    "owner/nothing": f"owner/nothing: {TAKEN}no such repository of the hub; if",
    "owner/tiny-sd@v9": f"owner/tiny-sd: {TAKEN}no such revision, found v9",
    **{old: f"{old}: {TAKEN}has left the hub, expected {new}" for old, new in MOVED.items()},
}


def test_a_refusal_is_one_line_that_says_what_to_do(
    ask: Callable[..., list[Done]], hub: Hub
) -> None:
    hub.refused = {f"owner/{fault}": answer for fault, (answer, _) in REFUSED.items()}
    messages = [f"owner/{fault}: {TAKEN}{message}" for fault, (_, message) in REFUSED.items()]
    for done, message in zip(
        ask(*hub.refused, *ABSENT), [*messages, *ABSENT.values()], strict=True
    ):
        _assert_refused(done, message)


def test_an_unreachable_hub_is_one_line(ask: Callable[..., list[Done]]) -> None:
    away, push = ask(
        "owner/tiny-sd",
        f"push {MODEL} owner/new",
        HF_ENDPOINT="http://127.0.0.1:1",
        HF_TOKEN="hf_x",
    )
    _assert_refused(away, f"owner/tiny-sd: {TAKEN}the hub (http://127.0.0.1:1) cannot be reached (")
    assert "set HF_HUB_OFFLINE=1 for what is in the cache" in away.err
    _assert_refused(push, "owner/new: the hub (http://127.0.0.1:1) cannot be reached (")


def _assert_refused(done: Done, message: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1, done.err
    assert message in done.err


def test_a_local_model_is_returned_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(str(MODEL)) == MODEL
    (tmp_path / "owner/name@v1").mkdir(parents=True)
    (tmp_path / "lone.safetensors").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("owner/name@v1", variant="fp16") == Path("owner/name@v1")
    assert resolve_model("lone.safetensors") == Path("lone.safetensors")
    with pytest.raises(InputError, match="a local model has no revisions, found main"):
        resolve_model("owner/name@v1", revision="main")


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "./model", "../model", "~/model", "/no/model", "a\\b", "model", "a/../b"]
    + ["a--b/c", "a/b c", "a/b\n", "a/*", "-a/b", "a/b@", "a/b@x/../y", "a/b@-x", "a/b.git"],
)
def test_a_mistyped_path_asks_no_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match=r"no such folder|neither a folder nor|not a revision"):
        resolve_model(name)
    with pytest.raises(InputError, match="two revisions"):
        resolve_model("a/b@v1", revision="v2")
    with pytest.raises(InputError, match="not a variant"):
        resolve_model("a/b", variant="*")


PLAIN = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("added", "variant", "chosen"),
    [
        (["x-00001-of-00002.S", "x-00002-of-00002.S", "x.S.index.json"], None, [0, 1, 2]),
        (["x.fp16-00001-of-00001.S", "x.S.index.fp16.json", "x.non_ema.S"], None, [0, 1]),
        (["x-00001-of-00001.fp16.S", "x.S.index.fp16.json", "x.S"], None, [2]),
        (["x-00001-of-00001.fp16.S", "x.S.index.fp16.json", "x.S"], "fp16", [0, 1]),
        (["x.S.fp16.index.json", "x.fp16-00001-of-00001.S"], None, [0, 1]),
        (["x.non_ema.S", "x.S"], "non_ema", [0]),
        (["x.non_ema.S"], None, [0]),
        (["x.S", "x-00001-of-00001.S", "x.S.index.json"], None, [0]),
        (["x.[fp16].S", "x.S"], None, [1]),
    ],
)
def test_weights_are_chosen(added: list[str], variant: str | None, chosen: list[int]) -> None:
    stem = PLAIN.removesuffix(".safetensors")
    added = [stem + name[1:].replace(".S", ".safetensors") for name in added]
    rest = [name for name in NAMES if name != PLAIN]
    if variant:
        rest = [name.replace(".safe", f".{variant}.safe") for name in rest]
    found = needed_files([*rest, *added], variant, "model")
    assert set(found) == {*rest, *(added[i] for i in chosen)}


def test_a_student_in_our_own_form_is_chosen_whole() -> None:
    flax = [f"{part}/flax_params.safetensors" for part in ("unet", "vae", "text_encoder")]
    found = needed_files([*NAMES, *flax, "tiue.json"], None, "model")
    small = [name for name in NAMES if not name.endswith(".safetensors")]
    assert set(found) == {*small, *flax, "tiue.json"}


def test_repositories_that_cannot_be_loaded_are_refused_before_the_download() -> None:
    rest = [name for name in NAMES if name != PLAIN]
    with pytest.raises(InputError, match="of the unet; pickle files can run any"):
        needed_files([*rest, "unet/diffusion_pytorch_model.bin"], None, "model")
    with pytest.raises(InputError, match=r"no \.safetensors weights of the unet$"):
        needed_files(rest, None, "model")
    only_unet = [*NAMES, PLAIN.replace(".safe", ".fp16.safe")]
    with pytest.raises(InputError, match=r"vae of this variant, expected plain, found fp16"):
        needed_files(only_unet, "fp16", "model")
    with pytest.raises(InputError, match=r"diffusers layout: no model_index\.json, scheduler/"):
        needed_files(["model.safetensors"], None, "model")


def test_a_repository_is_made_private_and_never_taken_by_accident(
    ask: Callable[..., list[Done]], hub: Hub
) -> None:
    hub.posted.clear()
    (taken,) = ask(f"push {MODEL} owner/tiny-sd", HF_TOKEN="hf_x")
    _assert_refused(taken, "owner/tiny-sd: the repository exists already (409)")
    (asked,) = hub.posted
    assert (asked["organization"], asked["name"]) == ("owner", "tiny-sd")
    assert asked.get("visibility") == "private" or asked.get("private") is True


def test_only_the_model_and_its_card_are_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, token: str | None) -> None:
            calls.append(("token", {"token": token}))

        def create_repo(self, repo_id: str, **options: Any) -> str:
            calls.append(("create_repo", {"repo_id": repo_id, **options}))
            return f"https://hub/{repo_id}"

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload_folder", options))

    monkeypatch.setattr(hub_module, "HfApi", Api)
    folder = copy_model(tmp_path / "model")
    for name in ("README.md", ".env", "unet/notes.txt", "unet/diffusion_pytorch_model.bin"):
        (folder / name).write_text("text")
    url = push_to_hub(folder, "owner/new", token="hf_x", exist_ok=True)
    assert url == "https://hub/owner/new"
    assert calls[0] == ("token", {"token": "hf_x"})
    options = {"repo_id": "owner/new", "private": True, "exist_ok": True}
    assert calls[1] == ("create_repo", options)
    assert set(calls[2][1]["allow_patterns"]) == {*NAMES, "README.md"}
    assert calls[2][1]["folder_path"] == folder
    with pytest.raises(InputError, match="not a repository of the hub"):
        push_to_hub(folder, "new")
    with pytest.raises(InputError, match="no such folder"):
        push_to_hub(tmp_path / "none", "owner/new")
    assert len(calls) == 3
