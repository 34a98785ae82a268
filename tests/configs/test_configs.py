"""Every config builds, holds the paper's values where it says so, and fits its model."""

import importlib
from dataclasses import fields
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from tiue_jax.diffusion.schedule import make_schedule
from tiue_jax.io.errors import InputError
from tiue_jax.models.variants import variant
from tiue_jax.training.config import changes, check_config, flatten, step_options
from tiue_jax.training.options import StepOptions
from tiue_jax.training.state import Frozen, init_state
from tiue_jax.training.step import make_step

CONFIGS = sorted(p.stem for p in Path(default.__file__).parent.glob("*.py"))
VARIANTS = {"sd15": "sd15", "sd15_released": "sd15", "sd21_base": "sd21_base", "tiny": "tiny"}


def load(name: str) -> ConfigDict:
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", [c for c in CONFIGS if c != "default"])
def test_every_config_is_complete_locked_and_headed_by_its_command(name: str):
    config = load(name)
    check_config(config)
    assert config.is_locked
    header = importlib.import_module(f"configs.{name}").__doc__
    assert header is not None
    assert f"python -m tiue_jax.main --config=configs/{name}.py" in header
    assert "\nCost: " in header
    assert "\nExpect: " in header


def test_default_wants_a_teacher_and_prompts():
    config = default.get_config()
    with pytest.raises(InputError, match=r"^\[teacher\]: not usable, expected the folder of"):
        check_config(config)


@pytest.mark.parametrize("name", ["sd15", "sd21_base"])
def test_papers_values(name: str):
    """DESIGN's table: arXiv 2505.21960 and its public code."""
    config = load(name)
    paper = {
        "data.field": "Task2.Caption", "data.deduplicate": True,
        "student.num_steps": 4, "student.timestep_spacing": "leading",
        "lora.rank": 64, "lora.alpha": 108.0, "lora.targets": ["to_q", "to_v"],
        "vsd.guidance_scale": 4.5, "vsd.lora_guidance_scale": 4.5,
        "vsd.t_min": 20, "vsd.t_max": 980,
        "kl.weight": 0.1, "kl.batch": 8,
        "train.iterations": 66_503, "train.batch_size": 64,
        "train.student_lr": 1e-6, "train.lora_lr": 1e-3, "train.lora_warmup": 0,
        "train.student_lr_end": 1.0,
        "train.student_every": 1,
        "train.clip_grad_norm": 1.0, "train.null_prompt_prob": 0.1, "train.ema_max_decay": 0.9999,
    }  # fmt: skip
    values = flatten(config)
    assert {key: values[key] for key in paper} == paper
    assert round(3 * 1_418_723 / 64) == 66_503


def test_what_the_released_weights_had_besides():
    released, paper = flatten(load("sd15_released")), flatten(load("sd15"))
    assert {key: value for key, value in released.items() if value != paper[key]} == {
        "student.start": "runs/sd15/student",
        "clip.tau": 0.35,
        "clip.epochs": 8.0,
        "train.iterations": 10_000,
    }
    assert paper["clip.tau"] == 0


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ("sd15", "sd15_released", "sd21_base")),
    ],
)
def test_every_config_shapes_a_step_of_its_model(name: str):
    config, model = load(name), variant(VARIANTS[name])
    dtype = jnp.dtype(config.train.compute_dtype)
    unet = model.unet.clone(dtype=dtype, remat=config.train.remat)
    text_encoder = model.text_encoder.clone(dtype=dtype)
    options = step_options(config, model.latent_size)
    size, width = model.latent_size, unet.context_dim
    key, ids = jax.random.key(0), jnp.zeros((1, 77), jnp.int32)
    frozen = Frozen(
        teacher=jax.eval_shape(
            unet.init, key, jnp.zeros((1, size, size, unet.in_channels)),
            jnp.zeros((1,), jnp.int32), jnp.zeros((1, 77, width)),
        )["params"],
        text_encoder=jax.eval_shape(text_encoder.init, key, ids)["params"],
        null_ids=jax.ShapeDtypeStruct((77,), jnp.int32),
    )  # fmt: skip
    state = jax.eval_shape(lambda k, p: init_state(k, p, options), key, frozen.teacher)
    step = make_step(unet, text_encoder, make_schedule(), options)
    ids = jax.ShapeDtypeStruct((config.train.batch_size, 77), jnp.int32)
    new, metrics = jax.eval_shape(step, state, frozen, ids, key)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new)]
    assert shapes[0] == shapes[1]
    assert all(m.shape == () and m.dtype == np.float32 for m in jax.tree.leaves(metrics))
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves((new.student, new.lora)))


# --- check_config --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("train.batch_size", 0, "[train.batch_size]: not usable, expected 1 to inf, found 0"),
        ("train.student_lr", float("nan"), "[train.student_lr]: not usable, expected 0 to inf"),
        ("train.lora_lr", float("inf"), "[train.lora_lr]: not usable, expected a finite number"),
        ("train.ema_max_decay", 1.0, "[train.ema_max_decay]: not usable, expected 0 to"),
        ("train.null_prompt_prob", 1.5, "[train.null_prompt_prob]: not usable, expected 0 to 1"),
        ("train.compute_dtype", "fp16", "expected one of float32, bfloat16, found 'fp16'"),
        ("student.timestep_spacing", "even", "expected one of leading, trailing, linspace"),
        ("seed", -1, "[seed]: not usable, expected 0 to 4294967295, found -1"),
        ("mesh.data", 0, "[mesh.data]: not usable, expected -1 or at least 1, found 0"),
        ("log.validation_prompts", ("a", ""), "[log.validation_prompts]: not usable"),
        ("log.every", 0, "[log.every]: not usable, expected 1 to inf, found 0"),
        ("lora.targets", (), "[lora.targets]: not usable, expected names of layers"),
        ("lora.alpha", 0.0, "[lora.alpha]: not usable, expected 1e-09 to inf, found 0.0"),
        ("checkpoint.keep", 0, "[checkpoint.keep]: not usable, expected 1 to inf, found 0"),
        ("data.source", "", "[data.source]: not usable, expected where the prompts are"),
    ],
)
def test_values_out_of_range_are_refused(key: str, value: object, said: str):
    config = load("tiny")
    config.update_from_flattened_dict({key: value})
    with pytest.raises(InputError) as caught:
        check_config(config)
    assert said in str(caught.value)


def test_keys_missing_and_unknown_are_refused():
    config = load("tiny").unlock()
    config.train.batchsize = 3
    with pytest.raises(InputError, match=r"\[train.batchsize\]: unknown config key"):
        check_config(config)
    del config.train.batchsize
    del config.train.batch_size
    with pytest.raises(InputError, match=r"\[train.batch_size\]: missing from the config"):
        check_config(config)


def test_every_key_of_a_step_reaches_it():
    config = load("tiny").copy_and_resolve_references()
    values = {
        "student.num_steps": 3, "student.timestep_spacing": "trailing",
        "lora.rank": 5, "lora.alpha": 7.5, "lora.targets": ("to_k",),
        "vsd.guidance_scale": 2.5, "vsd.lora_guidance_scale": 1.5,
        "vsd.t_min": 30, "vsd.t_max": 900,
        "kl.weight": 0.25, "kl.batch": 6,
        "clip.tau": 0.5, "clip.weight": 0.75, "clip.epochs": 3.0,
        "train.batch_size": 10, "train.student_lr": 3e-4, "train.student_lr_end": 1.0,
        "train.lora_lr": 4e-4, "train.clip_grad_norm": 2.5, "train.lora_warmup": 9,
        "train.student_every": 4, "train.null_prompt_prob": 0.3, "train.ema_max_decay": 0.75,
        "train.accumulate": 2,
    }  # fmt: skip
    config.update_from_flattened_dict(values)
    made = step_options(config, latent_size=16, num_prompts=25)
    assert made == StepOptions(
        num_steps=3, timestep_spacing="trailing", latent_size=16,
        guidance_scale=2.5, lora_guidance_scale=1.5, vsd_t_min=30, vsd_t_max=900,
        lambda_kl=0.25, kl_batch=6,
        clip_tau=0.5, clip_weight=0.75, clip_iterations=8.0,  # 3 * 25 / 10, rounded up
        student_lr=3e-4, lora_lr=4e-4, clip_grad_norm=2.5, lora_rank=5, lora_alpha=7.5,
        lora_targets=("to_k",), lora_warmup=9, student_every=4, null_prompt_prob=0.3,
        ema_max_decay=0.75, accumulate=2,
    )  # fmt: skip
    ordinary = step_options(load("default"), 64)
    of_paper = {"timesteps", "t_enc", "adam_b1", "adam_b2", "adam_eps"}  # no keys; DESIGN's
    for field in fields(StepOptions):
        changed = getattr(made, field.name) != getattr(ordinary, field.name)
        assert changed != (field.name in of_paper), field.name


def test_options_that_contradict_each_other_are_refused():
    config = load("tiny")
    config.vsd.t_min, config.vsd.t_max = 500, 400
    with pytest.raises(InputError, match="vsd_t_min 500, vsd_t_max 400"):
        step_options(config, 8)


def test_changes_are_those_of_what_is_computed():
    def described(**changed: object) -> dict:
        config = load("tiny")
        config.update_from_flattened_dict({"train.student_lr_end": 1.0} | changed)
        return {"config": flatten(config), "teacher": {"unet": "a"}, "prompts": {"count": 3}}

    before = described()
    may = {"teacher": "x", "data.source": "y.txt", "train.iterations": 7, "train.remat": "blocks",
           "log.every": 3, "checkpoint.keep": 9, "mesh.fsdp": 2}  # fmt: skip
    assert changes(before, described(**may)) == {}
    held = {"seed": 1, "train.batch_size": 8, "lora.targets": ("to_q",), "kl.batch": 1,
            "train.compute_dtype": "bfloat16", "data.shuffle_seed": 1}  # fmt: skip
    follows = {"train.teacher_dtype"}  # the compute dtype, unless it is given
    assert set(changes(before, described(**held))) == set(held) | follows
    others = {**before, "teacher": {"unet": "b"}, "prompts": {"count": 4}}
    assert changes(before, others) == {
        "prompts: count": (3, 4), "teacher: unet": ("a", "b"),
    }  # fmt: skip


def test_the_lora_teacher_is_guided_as_the_teacher_unless_told():
    config = default.get_config()
    config.vsd.guidance_scale = 2.0
    assert step_options(config, 8).guidance_scales == (2.0, 2.0)
    config.vsd.lora_guidance_scale = 1.0
    assert step_options(config, 8).guidance_scales == (2.0, 1.0)
    config.vsd.guidance_scale = 3.0
    assert step_options(config, 8).guidance_scales == (3.0, 1.0)


def test_the_student_s_learning_rate_can_fall_to_a_fraction_of_its_start():
    config = load("tiny").unlock()
    config.train.update(
        student_lr=2e-4, student_lr_end=0.5, iterations=110, lora_warmup=10, student_every=2
    )
    rate = step_options(config, 8).student_lr
    assert callable(rate)
    # 50 updates: of the iterations 12, 14, ..., 110
    assert [float(rate(n)) for n in (0, 25, 50)] == pytest.approx([2e-4, 1.5e-4, 1e-4], rel=1e-5)
    config.train.student_lr_end = 1.0
    assert step_options(config, 8).student_lr == 2e-4


def test_iterations_are_held_where_the_learning_rate_falls_towards_the_last_one():
    def description(**train):
        config = load("tiny").unlock()
        config.train.update(train)
        return {"config": flatten(config), "teacher": {}, "prompts": {}}

    held = changes(description(iterations=10), description(iterations=20))
    assert held == {"train.iterations": (10, 20)}
    constant = [description(student_lr_end=1.0, iterations=n) for n in (10, 20)]
    assert changes(*constant) == {}
