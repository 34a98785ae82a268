"""The state before training, and the moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training import small_step
from tiue_jax.training.options import StepOptions
from tiue_jax.training.state import ema_decay, init_state, update_ema


def test_student_and_average_are_copies_of_the_teacher_in_other_memory() -> None:
    teacher = small_step.frozen().teacher
    state = small_step.start()
    for tree in (state.student, state.ema):
        jax.tree.map(np.testing.assert_array_equal, tree, teacher)
    buffers = [
        {x.unsafe_buffer_pointer() for x in jax.tree.leaves(tree)}
        for tree in (teacher, state.student, state.ema)
    ]
    assert len(set.union(*buffers)) == sum(map(len, buffers))
    assert int(state.step) == 0


def test_a_half_precision_teacher_makes_an_fp32_student() -> None:
    teacher = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_step.frozen().teacher)
    state = init_state(jax.random.key(0), teacher, small_step.OPTIONS)
    trained = (state.student, state.ema, state.lora)
    assert {x.dtype for x in jax.tree.leaves(trained)} == {jnp.dtype(jnp.float32)}


def test_lora_is_given_or_random_and_changes_nothing_at_first() -> None:
    state = small_step.start()
    assert len(jax.tree.leaves(state.lora)) == 2 * 4 * 4  # a, b; 4 attentions x (to_q, to_v) x 2
    again = init_state(
        jax.random.key(9), small_step.frozen().teacher, small_step.OPTIONS, state.lora
    )
    jax.tree.map(np.testing.assert_array_equal, again.lora, state.lora)
    other = init_state(jax.random.key(9), small_step.frozen().teacher, small_step.OPTIONS)
    differ = jax.tree.map(lambda x, y: bool((x != y).any()), other.lora, state.lora)
    assert 0 < sum(jax.tree.leaves(differ)) == len(jax.tree.leaves(differ)) / 2  # every a, no b


@pytest.mark.parametrize(
    ("updates", "decay"),
    [(0, 0.0), (1, 0.0), (2, 2 / 11), (3, 3 / 12), (1000, 1000 / 1009), (10**6, 0.9999)],
)
def test_decay_of_the_average(updates: int, decay: float) -> None:
    """n = updates - 1: the first update makes the average the student itself."""
    assert float(ema_decay(jnp.asarray(updates), 0.9999)) == pytest.approx(decay, rel=1e-6)


def test_average() -> None:
    ema, student = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])}
    for decay, expected in ((0.0, [3.0, 6.0]), (0.75, [1.5, 3.0])):
        updated = update_ema(ema, student, jnp.asarray(decay))["w"]
        np.testing.assert_array_equal(updated, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vsd_t_min": 500, "vsd_t_max": 400}, "expected 0 <= vsd_t_min <= vsd_t_max"),
        ({"null_prompt_prob": 1.5}, r"expected 0\.\.1"),
        ({"ema_max_decay": 1.0}, "expected 0 <= decay < 1"),
        ({"num_steps": 0}, "num_steps 0: expected more than 0"),
        ({"lora_rank": 0}, "lora_rank 0: expected more than 0"),
        ({"lora_warmup": -1}, "lora_warmup -1"),
        ({"student_every": 0}, "student_every 0"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepOptions(**changes)


def test_the_student_s_updates_are_counted_without_the_iterations_of_the_lora_alone() -> None:
    options = StepOptions(lora_warmup=2, student_every=3)
    alone = [options.is_lora_only(step) for step in range(1, 10)]
    assert alone == [True, True, True, True, False, True, True, False, True]
    learnt = [step for step, lora_only in enumerate(alone, 1) if not lora_only]
    assert [options.student_updates(step) for step in learnt] == [1, 2]
    plain = StepOptions()
    assert not any(plain.is_lora_only(step) for step in range(1, 5))
    assert [plain.student_updates(step) for step in range(1, 5)] == [1, 2, 3, 4]
