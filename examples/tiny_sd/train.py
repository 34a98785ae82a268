"""Train the embedded teacher from nothing: tokenizer, VAE, text encoder, UNet, in this order.

    python -m examples.tiny_sd.train --workdir=runs/tiny-sd --out=runs/tiny-sd-model

The data set is built in the workdir first (`examples.tiny_sd.builder`, some minutes). A run that
was interrupted goes on where it was: run the same command again. The result is an ordinary Stable
Diffusion folder in the diffusers layout, in fp16.
"""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from examples.tiny_sd.builder import Examples, training_examples
from examples.tiny_sd.captions import caption
from examples.tiny_sd.tokenizer import build_tokenizer
from examples.tiny_sd.train_teacher import LatentData, train_teacher
from examples.tiny_sd.train_text import train_text_encoder
from examples.tiny_sd.train_vae import encode, train_decoder, train_vae
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.io.errors import InputError, run_command
from tiue_jax.io.files import require_free, write_atomic
from tiue_jax.models.variants import Variant, variant
from tiue_jax.pretrained.folder import StableDiffusion, save_stable_diffusion
from tiue_jax.pretrained.jsonfile import read_object
from tiue_jax.pretrained.names import DIFFUSERS
from tiue_jax.pretrained.parameters import ParamFile, to_device
from tiue_jax.pretrained.tokenizer import Tokenizer

FLAGS = flags.FLAGS
_SOURCES = {  # stage, None for all -> the flags that name where its networks are from
    None: ("vae_from", "text_encoder_from", "unet_from"),
    "decoder": ("vae_from",),
    "text_encoder": (),
    "unet": ("vae_from", "text_encoder_from", "unet_from"),
}
CAPTIONS_PER_SCENE = 2  # the data set's, and others of the same scene


def latent_data(
    networks: Variant, vae_params: Any, tokenizer: Tokenizer, examples: Examples, seed: int
) -> LatentData:
    """Encode the pictures and the captions of examples."""
    rng = np.random.default_rng(seed + 2)
    mean, _ = encode(networks.vae, vae_params, examples.images)
    others = [
        [caption(scene, rng) for scene in examples.scenes] for _ in range(CAPTIONS_PER_SCENE - 1)
    ]
    ids = [tokenizer(texts).astype(np.uint16) for texts in (examples.captions, *others)]
    return LatentData(
        (mean * networks.vae.scaling_factor).astype(np.float16),
        np.stack(ids, axis=1),
        np.asarray(tokenizer.null_ids).reshape(-1),
    )


def save_latents(path: Path, data: LatentData) -> None:
    """Keep the encoded data set, for a run that was interrupted and goes on."""
    buffer = io.BytesIO()
    np.savez(buffer, **data._asdict())
    write_atomic(path, buffer.getvalue())


def load_latents(path: Path) -> LatentData:
    """Read what `save_latents` wrote."""
    with np.load(path) as arrays:
        return LatentData(**arrays)


def read_part(networks: Variant, part: str, folder: Path) -> Any:
    """Parameters of a part ("vae", "unet", "text_encoder") that was trained before."""
    module = getattr(networks, part)
    return ParamFile.open(module, part, folder / part, DIFFUSERS).read(np.float32, to_device)


def keep_settings(path: Path, settings: dict[str, Any]) -> None:
    """Note what a workdir's states are made with, or hold the settings against what is noted.

    Raises:
        InputError: the states were made with others.
    """
    noted = read_object(path) if path.exists() else {}
    for key, value in settings.items():
        if noted.get(key, value) != value:
            raise InputError(
                "its states were made with another setting; take a new --workdir",
                file=path, key=f"--{key}", expected=repr(noted[key]), found=repr(value),
            )  # fmt: skip
    if settings.keys() - noted.keys():
        write_atomic(path, json.dumps({**noted, **settings}, indent=1) + "\n")


def define_flags() -> None:
    """Define this command's flags."""
    flags.DEFINE_string("workdir", "runs/tiny-sd", "folder of the states of unfinished stages")
    flags.DEFINE_string(
        "out", None, "folder to write the model to: new or empty; needed unless --only"
    )
    flags.DEFINE_string("vae_from", None, "model folder whose VAE to take, instead of training one")
    flags.DEFINE_string(
        "text_encoder_from", None, "model folder whose text encoder to take: that of --unet_from"
    )
    flags.DEFINE_string("unet_from", None, "model folder whose UNet to train further")
    flags.DEFINE_enum(
        "only",
        None,
        ["decoder", "text_encoder", "unet"],
        "train this stage alone (and those it needs) and write no model: once the VAE is there, "
        "decoder and UNet can be trained at the same time",
    )
    flags.DEFINE_integer("num_scenes", 60_000, "scenes of the data set to train on", 1, 60_000)
    flags.DEFINE_integer("seed", 0, "seed of everything but the data set", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    """Run all stages and write the folder."""
    del argv
    workdir, seed = Path(FLAGS.workdir), FLAGS.seed
    if FLAGS.only is None:
        if not FLAGS.out:
            raise InputError("is missing", key="--out", expected="a folder to write the model to")
        require_free(FLAGS.out)
    names = ("seed", "num_scenes", *_SOURCES[FLAGS.only])
    keep_settings(workdir / "settings.json", {name: FLAGS[name].value for name in names})
    networks, schedule = variant("tiny"), make_schedule()
    build_tokenizer(workdir / "tokenizer")
    text_encoder = networks.text_encoder
    tokenizer = Tokenizer(
        workdir / "tokenizer",
        vocab_size=text_encoder.vocab_size,
        max_length=text_encoder.max_length,
    )
    examples = cache(lambda: training_examples(workdir / "data", FLAGS.num_scenes))
    params: dict[str, Any] = {}
    trains_vae = FLAGS.only != "text_encoder" and not FLAGS.vae_from
    if trains_vae:
        vae_params = train_vae(networks.vae, examples().images, workdir, seed)
    elif FLAGS.vae_from:
        vae_params = read_part(networks, "vae", Path(FLAGS.vae_from))
    if FLAGS.only in (None, "decoder"):
        params["vae"] = train_decoder(networks.vae, vae_params, examples().images, workdir, seed)
    if FLAGS.text_encoder_from:
        params["text_encoder"] = read_part(networks, "text_encoder", Path(FLAGS.text_encoder_from))
    elif FLAGS.only != "decoder":
        params["text_encoder"] = train_text_encoder(
            text_encoder, tokenizer, examples().scenes, workdir, seed
        )
    if FLAGS.only in (None, "unet"):
        latents = workdir / "latents.npz"
        if not latents.exists():
            data = latent_data(networks, vae_params, tokenizer, examples(), seed)
            save_latents(latents, data)
        params["unet"] = train_teacher(
            networks.unet,
            text_encoder,
            params["text_encoder"],
            schedule,
            load_latents(latents),
            workdir,
            seed,
            read_part(networks, "unet", Path(FLAGS.unet_from)) if FLAGS.unet_from else None,
        )
    if FLAGS.only:
        return
    model = StableDiffusion(
        unet=networks.unet,
        vae=networks.vae,
        text_encoder=text_encoder,
        params=params,
        tokenizer=tokenizer,
        schedule=schedule,
        latent_size=networks.latent_size,
    )
    save_stable_diffusion(model, FLAGS.out, dtype="float16")
    print(f"wrote {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    run_command(main)
