"""The training of the embedded teacher: its parts, and the command whole, of few iterations."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import flagsaver
from flax import linen as nn
from flax import serialization

from examples.tiny_sd import fit as fit_module
from examples.tiny_sd import train_teacher as train_teacher_module
from examples.tiny_sd import train_text as train_text_module
from examples.tiny_sd import train_vae as train_vae_module
from examples.tiny_sd.builder import Examples, build
from examples.tiny_sd.captions import caption, describe
from examples.tiny_sd.demo import draw_comparison
from examples.tiny_sd.fit import fit, muon
from examples.tiny_sd.reader import HEADS, to_pixels, true_labels
from examples.tiny_sd.render import render
from examples.tiny_sd.scenes import BACKGROUNDS, COLOURS, SHAPES, SIZES, sample_scenes
from examples.tiny_sd.tokenizer import build_tokenizer
from examples.tiny_sd.train import (
    FLAGS,
    define_flags,
    keep_settings,
    latent_data,
    load_latents,
    main,
    read_part,
    save_latents,
)
from examples.tiny_sd.train_teacher import MAX_WEIGHT, LatentData, teacher_loss
from examples.tiny_sd.train_text import text_loss, train_text_encoder
from examples.tiny_sd.train_vae import decoder_loss, encode, train_decoder, whiten
from tests.conftest import ROOT
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.io.errors import InputError, RunError
from tiue_jax.models.unet import UNet
from tiue_jax.models.vae import AutoencoderKL
from tiue_jax.models.variants import Variant, variant
from tiue_jax.pretrained.folder import load_stable_diffusion
from tiue_jax.pretrained.tokenizer import Tokenizer

VAE = AutoencoderKL(
    latent_channels=2, block_out_channels=(4, 8, 8, 8), layers_per_block=1, norm_groups=4
)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def vae_params():
    init = jax.jit(VAE.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    return init["params"]


def test_whitening_keeps_the_pictures_and_standardises_the_latents(images, vae_params):
    white = whiten(VAE, vae_params, images)
    decode = jax.jit(lambda p, z: VAE.apply({"params": p}, z, method=VAE.decode))
    before, _ = encode(VAE, vae_params, images)
    mean, logvar = encode(VAE, white, images)
    # fp32, two equal maps in another order of operations; worst seen 2e-6 of pixels near 1
    np.testing.assert_allclose(decode(white, mean), decode(vae_params, before), atol=2e-5)
    latents = mean * VAE.scaling_factor
    total = latents.var((0, 1, 2)) + (np.exp(logvar) * VAE.scaling_factor**2).mean((0, 1, 2))
    np.testing.assert_allclose(latents.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(total, 1, rtol=1e-4)


def test_encoding_in_batches_is_encoding_at_once(images, vae_params):
    whole, _ = encode(VAE, vae_params, images, batch_size=6)
    parts, _ = encode(VAE, vae_params, images, batch_size=4)
    np.testing.assert_allclose(parts, whole, atol=1e-5)  # another batch, another order of sums


def test_pixels_span_minus_one_to_one():
    assert to_pixels(np.array([[[[0, 255, 51]]]], np.uint8)).tolist() == [
        [[[-1.0, 1.0, pytest.approx(-0.6)]]]
    ]


def test_training_the_decoder_leaves_the_latents_as_they_are(
    images, vae_params, tmp_path, monkeypatch
):
    monkeypatch.setattr(train_vae_module, "DECODER_ITERATIONS", 2)
    after = train_decoder(VAE, vae_params, images, tmp_path, seed=0)
    assert jax.tree.structure(after) == jax.tree.structure(vae_params)
    for name in ("encoder", "quant_conv"):
        jax.tree.map(np.testing.assert_array_equal, after[name], vae_params[name])
    moved = jax.tree.map(
        lambda a, b: bool(np.any(a != b)), after["decoder"]["conv_out"], dict(
            vae_params["decoder"]["conv_out"]
        )
    )  # fmt: skip
    assert all(jax.tree.leaves(moved))


class Shifted(nn.Module):
    """A VAE whose reconstruction is the picture plus what its parameter says."""

    def encode(self, pixels):
        return pixels, jnp.full_like(pixels, -1e4)

    @nn.compact
    def decode(self, latents):
        return (
            latents + self.param("decoder", nn.initializers.zeros_init(), latents.shape[1:])[None]
        )


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (np.full((4, 4, 1), 0.5), 0.5 + 0.5 * 0.25),  # flat: no edges
        # columns -.5, .5, -.5, .5: neighbours in a row differ by 1, in a column by nothing
        (np.tile([[-0.5], [0.5]], (4, 2, 1)), 0.5 + 0.5 * 0.25 + 1.0),
    ],
)
def test_the_decoder_s_loss_by_hand(error, expected):
    params = {"decoder": jnp.asarray(error, jnp.float32)}
    pixels = jnp.zeros((2, 4, 4, 1))
    loss, _ = decoder_loss(Shifted(), params, {}, pixels, jax.random.key(0))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_muon_s_steps_are_as_large_as_adam_s_and_orthogonal_for_kernels():
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 8)) @ jnp.diag(jnp.arange(1.0, 9.0))
    params = {"kernel": jnp.zeros((3, 3, 4, 8)), "bias": jnp.zeros(8)}
    optimizer = muon(lambda count: 0.1)
    gradients = {"kernel": kernel, "bias": jnp.ones(8)}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # Adam's first step is the learning rate; Nesterov's momentum makes it larger
    assert np.all((updates["bias"] < -0.1) & (updates["bias"] > -0.2))
    assert float(jnp.sqrt(jnp.mean(updates["kernel"] ** 2))) == pytest.approx(0.02, rel=0.2)
    before, after = (
        np.linalg.svd(np.reshape(a, (36, 8)), compute_uv=False) for a in (kernel, updates["kernel"])
    )
    assert before[0] / before[-1] > 5
    assert after[0] / after[-1] < 2  # Newton-Schulz: singular values between .7 and 1.2


class NoNoise(nn.Module):
    """A UNet that predicts 0: its loss is the mean square of the noise."""

    @nn.compact
    def __call__(self, x, t, context):
        return 0.0 * x


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, ids):
        return jnp.zeros((*ids.shape, 4))


def test_the_teacher_s_loss_of_no_prediction_is_the_noise_s_variance_times_the_weight():
    schedule = make_schedule()
    batch = (jnp.zeros((256, 8, 8, 4)), jnp.zeros((256, 3), jnp.int32))
    loss, metrics = teacher_loss(
        NoNoise(), Nothing(), schedule, {}, {}, batch, jax.random.key(0)
    )  # fmt: skip
    # 65,536 squares of N(0, 1): deviation .0055
    assert float(metrics["plain"]) == pytest.approx(1.0, abs=0.03)
    t = np.arange(1000)
    weight = np.minimum(1 / schedule.alphas_cumprod, MAX_WEIGHT)
    expected = (weight * (2 * t + 1)).sum() / 1000**2
    assert 5 < expected < 12
    assert float(loss) == pytest.approx(expected, rel=0.05)


def test_the_teacher_learns_from_the_noisy_latents():
    unet = UNet(
        block_out_channels=(8, 8), layers_per_block=1, cross_attention=(True, False),
        num_heads=(2, 2), context_dim=4, norm_groups=4,
    )  # fmt: skip
    x, ids = jnp.zeros((4, 8, 8, 4)), jnp.zeros((4, 3), jnp.int32)
    params = jax.jit(unet.init)(jax.random.key(0), x, ids[:, 0], jnp.zeros((4, 3, 4)))
    loss = jax.jit(
        jax.grad(
            lambda p: teacher_loss(
                unet, Nothing(), make_schedule(), p, {}, (x, ids), jax.random.key(1)
            )[0]
        )
    )  # fmt: skip
    gradient = loss(params["params"])
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))
    assert float(jnp.abs(gradient["conv_in"]["kernel"]).max()) > 0


END_ID = 9


class OneHot(nn.Module):
    """A text encoder whose states are the tokens themselves."""

    @nn.compact
    def __call__(self, ids):
        return jax.nn.one_hot(ids, END_ID + 1)


def text_batch(masked=()):
    """One caption of three tokens before two end tokens, and the label 1 for every head."""
    ids = jnp.array([[3, 4, 5, END_ID, END_ID]])
    mask = jnp.array([[0.0 if name in masked else 1.0 for name in HEADS]])
    return ids, jnp.ones((1, len(HEADS)), jnp.int32), mask


def text_heads(kernel=None):
    classes = sum(len(v) for v in HEADS.values())
    start = jnp.zeros((END_ID + 1, classes)) if kernel is None else kernel
    return {"text_encoder": {}, "heads": {"kernel": start, "bias": jnp.zeros(classes)}}


@pytest.mark.parametrize("masked", [(), ("shape_1", "size_1")])
def test_reading_nothing_costs_the_logarithm_of_the_classes_that_count(masked):
    loss, _ = text_loss(OneHot(), text_heads(), text_batch(masked), jax.random.key(0))
    expected = sum(np.log(len(v)) for name, v in HEADS.items() if name not in masked)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def test_only_the_states_behind_a_caption_are_read():
    zeros = text_heads()["heads"]["kernel"]
    wrong_in_front = zeros.at[3:6, 0].set(50.0)
    right_behind = zeros.at[END_ID, len(HEADS["count"]) + 1].set(50.0)  # layout: 1
    loss = {
        name: float(text_loss(OneHot(), text_heads(k), text_batch(), jax.random.key(0))[0])
        for name, k in (("none", None), ("front", wrong_in_front), ("behind", right_behind))
    }
    assert loss["front"] == pytest.approx(loss["none"], rel=1e-6)
    assert loss["none"] - loss["behind"] == pytest.approx(np.log(len(HEADS["layout"])), rel=1e-4)


def test_a_text_encoder_learns_what_captions_say(tmp_path, monkeypatch):
    monkeypatch.setattr(train_text_module, "NUM_CAPTIONS", 3000)
    monkeypatch.setattr(train_text_module, "ITERATIONS", 60)
    monkeypatch.setattr(train_text_module, "BATCH_SIZE", 32)
    model = variant("tiny").text_encoder.clone(num_layers=1)
    build_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer(
        tmp_path / "tokenizer", vocab_size=model.vocab_size, max_length=model.max_length
    )
    seen = sample_scenes(np.random.default_rng(4), 1000)
    params = train_text_encoder(model, tokenizer, seen, tmp_path)
    state = serialization.msgpack_restore((tmp_path / "text_encoder.msgpack").read_bytes())
    scenes = sample_scenes(np.random.default_rng(5), 64)
    captions = [caption(scene, np.random.default_rng(i)) for i, scene in enumerate(scenes)]
    labels, masks = (np.stack([v[name] for name in HEADS], axis=1) for v in true_labels(scenes))
    batch = (jnp.asarray(tokenizer(captions)[:, :32]), jnp.asarray(labels), jnp.asarray(masks))
    loss, _ = text_loss(model, state["ema"], batch, jax.random.key(0))
    # Who knows how often everything is drawn, and the number of objects and their axis, but not
    # what the caption says of them, still needs so much:
    half, ln = 0.5, np.log
    ignorant = (
        half * (ln(9) + ln(2)) + ln(len(BACKGROUNDS))
        + (1 + half) * (ln(len(SHAPES)) + ln(len(COLOURS)) + ln(len(SIZES)))
    )  # fmt: skip
    assert float(loss) < 0.97 * ignorant
    jax.tree.map(np.testing.assert_array_equal, params, state["ema"]["text_encoder"])


def quadratic(params, batch, key):
    noise = 0.01 * jax.random.normal(key, batch.shape)
    loss = jnp.square(params["mean"] - batch + noise).mean()
    return loss, {"loss": loss}


def run(folder, iterations, save_every=10):
    trained = fit(
        "toy", quadratic, {"mean": jnp.zeros(3)},
        lambda rng: rng.normal(2.0, 0.1, 3).astype(np.float32),
        iterations=iterations, learning_rate=0.1, folder=folder, seed=0, save_every=save_every,
    )  # fmt: skip
    return trained["mean"]


def test_fit_reaches_the_minimum(tmp_path):
    np.testing.assert_allclose(run(tmp_path, 300), 2.0, atol=0.1)


def test_an_interrupted_fit_goes_on_bit_for_bit(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    whole = run(tmp_path / "whole", 30)

    class Killed(Exception):
        pass

    class DyingBar(fit_module.tqdm):
        def __iter__(self):
            for i in super().__iter__():
                if i == 17:
                    raise Killed
                yield i

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "tqdm", DyingBar)
        with pytest.raises(Killed):
            run(tmp_path / "cut", 30)
    np.testing.assert_array_equal(run(tmp_path / "cut", 30), whole)


def test_a_fit_that_is_not_finite_keeps_the_state_of_before(tmp_path):
    def loss(params, batch, key):
        value = jnp.where(batch > 2, jnp.nan, 1.0) * (params["x"] ** 2).sum()
        return value, {"loss": value}

    def go():
        numbers = iter(range(6))
        return fit(
            "x", loss, {"x": jnp.ones(3)}, lambda rng: jnp.float32(next(numbers)),
            iterations=6, learning_rate=0.1, folder=tmp_path, seed=0, save_every=2,
        )  # fmt: skip

    with pytest.raises(RunError, match="x: not finite any more at iteration 4"):
        go()
    kept = serialization.msgpack_restore((tmp_path / "x.msgpack").read_bytes())
    assert kept["step"] == 2
    assert np.isfinite(kept["params"]["x"]).all()


@pytest.mark.parametrize("content", [b"", b"cut", serialization.to_bytes({"a": 1})])
def test_a_state_that_cannot_be_read_is_named(tmp_path, content: bytes):
    (tmp_path / "toy.msgpack").write_bytes(content)
    with pytest.raises(InputError, match=r"toy.msgpack: not the state of this training, or not"):
        run(tmp_path, 30)


def test_a_state_of_other_parameters_is_named(tmp_path):
    run(tmp_path, 3)
    state = serialization.msgpack_restore((tmp_path / "toy.msgpack").read_bytes())
    name, value = next(iter(state["params"].items()))
    state["params"][name] = np.zeros((*np.shape(value), 2), np.float32)
    (tmp_path / "toy.msgpack").write_bytes(serialization.msgpack_serialize(state))
    with pytest.raises(InputError, match="the state of other parameters"):
        run(tmp_path, 30)


@pytest.mark.slow  # compiles the four networks
def test_the_command_makes_a_model_that_can_be_loaded(tmp_path, monkeypatch):
    for module in (train_vae_module, train_text_module, train_teacher_module):
        monkeypatch.setattr(module, "ITERATIONS", 2)
    monkeypatch.setattr(train_vae_module, "DECODER_ITERATIONS", 2)
    monkeypatch.setattr(train_text_module, "NUM_CAPTIONS", 100)
    build(tmp_path / "work" / "data", 0.002)
    flags = flagsaver.flagsaver(
        workdir=str(tmp_path / "work"), out=str(tmp_path / "model"), num_scenes=100
    )
    define_flags()
    FLAGS.mark_as_parsed()
    with flags:
        main([])
    made = load_stable_diffusion(tmp_path / "model")
    assert made.unet == variant("tiny").unet.clone(dtype=made.unet.dtype)
    assert {"unet", "vae", "vae_decoder", "text_encoder"} == {
        path.stem for path in (tmp_path / "work").glob("*.msgpack")
    }


def test_latent_data_has_captions_of_its_own_pictures(images, vae_params):
    class Attributes:
        """Token ids that tell the colour or the shape that a caption of one word or more names."""

        null_ids = np.zeros(7, np.int32)

        def __call__(self, texts):
            words = [set(text.split()) for text in texts]
            found = [[name in w for name in (*COLOURS, *SHAPES)] for w in words]
            return np.asarray(found, np.int32)

    scenes = sample_scenes(np.random.default_rng(6), 40)
    texts = [describe(s, np.random.default_rng(0), complete=True).text for s in scenes]
    examples = Examples(np.resize(images, (40, 64, 64, 3)), texts, scenes)
    networks = Variant(unet=None, vae=VAE, text_encoder=None, latent_size=8)
    data = latent_data(networks, vae_params, Attributes(), examples, 0)
    assert data.latents.shape == (40, 8, 8, 2)
    np.testing.assert_array_equal(data.input_ids[:, 0], Attributes()(texts))
    # What the other caption names is in the scene, and most of it is named.
    assert np.all(data.input_ids[:, 1] <= data.input_ids[:, 0])
    assert data.input_ids[:, 1].sum() > 0.8 * data.input_ids[:, 0].sum()


def test_encoded_data_can_be_kept(tmp_path):
    rng = np.random.default_rng(0)
    data = LatentData(
        rng.normal(size=(3, 2, 2, 4)).astype(np.float16),
        rng.integers(700, size=(3, 2, 77)).astype(np.uint16),
        np.arange(77),
    )
    save_latents(tmp_path / "latents.npz", data)
    again = load_latents(tmp_path / "latents.npz")
    for kept, was in zip(again, data, strict=True):
        np.testing.assert_array_equal(kept, was)
        assert kept.dtype == was.dtype


def test_a_trained_vae_can_be_taken_over():
    params = read_part(variant("tiny"), "vae", ROOT / "assets" / "tiny-sd")
    vae = variant("tiny").vae
    images = render(sample_scenes(np.random.default_rng(3), 8))
    mean, _ = encode(vae, params, images, batch_size=8)
    decoded = jax.jit(lambda z: vae.apply({"params": params}, z, method=vae.decode))(mean)
    # of pixels in [-1, 1]; an untrained one is near 0.7, this one was measured at 0.02
    assert np.abs(decoded - to_pixels(images)).mean() < 0.05


def test_the_comparison_shows_every_model_and_prompt():
    pictures = np.stack([np.full((64, 64, 3), v, np.uint8) for v in (10, 200)])
    drawn = draw_comparison({"a": pictures, "b": 255 - pictures}, ["one", "a longer prompt " * 9])
    assert drawn.dtype == np.uint8
    for value in (10, 200, 245, 55):
        assert (drawn == value).all(axis=-1).sum() >= 128 * 128


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--out=assets/tiny-sd",), "assets/tiny-sd: output folder is in use"),
        ((), "[--out]: is missing, expected a folder to write the model to"),
    ],
)
def test_the_command_asks_for_a_free_folder_before_it_trains(flags, said, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.tiny_sd.train", f"--workdir={tmp_path / 'new'}", *flags],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_workdir_of_other_settings_is_refused(tmp_path):
    file = tmp_path / "new" / "settings.json"
    keep_settings(file, {"seed": 0})
    keep_settings(file, {"seed": 0, "vae_from": None})  # of another stage
    keep_settings(file, {"seed": 0})
    with pytest.raises(InputError) as caught:
        keep_settings(file, {"seed": 0, "vae_from": "x"})
    said = "its states were made with another setting; take a new --workdir"
    assert str(caught.value) == f"{file} [--vae_from]: {said}, expected None, found 'x'"
