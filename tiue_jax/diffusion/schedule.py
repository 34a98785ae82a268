"""The noise schedule: cumulative alphas, which timesteps a sampler visits, and the forward process.

Notation: abar_t is the cumulative product of 1 - beta up to t, alpha_t = sqrt(abar_t), sigma_t =
sqrt(1 - abar_t), so that a noisy latent is x_t = alpha_t x0 + sigma_t eps, eps ~ N(0, I). Timesteps
are integers in [0, T), T = 1000 for Stable Diffusion.
"""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int, Int32

PREDICTION_TYPES = ("epsilon", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("scaled_linear", "linear")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """What a Stable Diffusion folder says about noise (`scheduler/scheduler_config.json`).

    Attributes:
        alphas_cumprod: abar_t for t = 0..T-1, decreasing, in (0, 1].
        prediction_type: what the UNet's output is: the noise eps, or v = alpha_t eps - sigma_t x0.
        steps_offset: added to the timesteps of "leading" spacing (1 for Stable Diffusion).
        set_alpha_to_one: whether the last DDIM step goes to abar = 1 (clean) instead of abar_0.
        timestep_spacing: how `timesteps` spreads its steps where no other spacing is asked for.

    Raises:
        ValueError: on a name that is not in the tables above, or alphas outside (0, 1].
    """

    alphas_cumprod: Float64[np.ndarray, " T"]
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timestep_spacing: str = "leading"

    def __post_init__(self) -> None:
        _choose("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _choose("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        low, high = float(self.alphas_cumprod.min()), float(self.alphas_cumprod.max())
        if not 0.0 < low <= high <= 1.0:
            raise ValueError(f"alphas_cumprod lie in [{low}, {high}], expected within (0, 1]")

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def final_alpha_cumprod(self) -> float:
        """abar the last DDIM step arrives at (any previous timestep below 0)."""
        return 1.0 if self.set_alpha_to_one else float(self.alphas_cumprod[0])

    def timesteps(self, num_steps: int, spacing: str | None = None) -> Int32[np.ndarray, " K"]:
        """The timesteps t_1 > ... > t_K of a sampler of `num_steps` steps.

        leading: multiples of T // K, plus steps_offset; trailing: from T - 1 down in steps of T /
        K; linspace: evenly from T - 1 to 0. For T = 1000, K = 4: 751, 501, 251, 1; 999, 749, 499,
        249; 999, 666, 333, 0.

        Args:
            num_steps: K, in 1..T.
            spacing: one of TIMESTEP_SPACINGS; None takes the schedule's own.

        Raises:
            ValueError: for a K out of range, an unknown spacing, or an offset that pushes a
            timestep to T.

        Source: diffusers 0.42 DDIMScheduler.set_timesteps; arXiv 2305.08891 table 2. Differs: the
        number of trailing timesteps is always K (floating arange yields K + 1 for some K).
        """
        spacing = _choose("timestep_spacing", spacing or self.timestep_spacing, TIMESTEP_SPACINGS)
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise ValueError(f"num_steps {num_steps}: choose 1..{total}")
        if spacing == "leading":
            steps = np.arange(num_steps, dtype=float)[::-1] * (total // num_steps)
            steps += self.steps_offset
        elif spacing == "trailing":
            steps = np.round(np.arange(total, 0, -total / num_steps))[:num_steps] - 1
        else:
            steps = np.linspace(0, total - 1, num_steps).round()[::-1]
        if steps[0] >= total:
            raise ValueError(
                f"num_steps {num_steps}, {spacing} spacing, steps_offset {self.steps_offset} "
                f"starts at timestep {int(steps[0])}, past the schedule's last, {total - 1}: "
                "take fewer steps or trailing spacing"
            )
        return np.ascontiguousarray(steps, dtype=np.int32)

    def previous_timesteps(self, timesteps: Int[np.ndarray, " K"]) -> Int32[np.ndarray, " K"]:
        """The timestep each DDIM step arrives at; below 0 means `final_alpha_cumprod`.

        For the timesteps of a named spacing this is t - T // K, which is what diffusers computes
        (for linspace that is not the next timestep of the list; we keep to it, so that a folder
        samples the same in both). For any other list it is the next timestep, and -1 after the
        last. Source: diffusers 0.42 DDIMScheduler.step.
        """
        count = len(timesteps)
        named = any(np.array_equal(timesteps, known) for known in self._named_timesteps(count))
        if named:
            return np.asarray(timesteps - self.num_train_timesteps // count, dtype=np.int32)
        return np.append(timesteps[1:], -1).astype(np.int32)

    def _named_timesteps(self, num_steps: int) -> list[np.ndarray]:
        found = []
        for spacing in TIMESTEP_SPACINGS:
            try:
                found.append(self.timesteps(num_steps, spacing))
            except ValueError:
                continue
        return found

    def alpha_sigma(self, t: Int[np.ndarray, "*n"]) -> tuple[np.ndarray, np.ndarray]:
        """float64 (sqrt(abar_t), sqrt(1 - abar_t)) on the host; t below 0 gives the final alpha."""
        abar = np.where(t >= 0, self.alphas_cumprod[np.maximum(t, 0)], self.final_alpha_cumprod)
        return np.sqrt(abar), np.sqrt(1.0 - abar)

    def coefficients(
        self, t: Int[Array, " b"], ndim: int
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """fp32 (alpha_t, sigma_t) on the device, [b, 1, ..., 1] to multiply `ndim` axes."""
        alpha, sigma = self.alpha_sigma(np.arange(self.num_train_timesteps))
        shape = (-1,) + (1,) * (ndim - 1)
        return (
            jnp.asarray(alpha, jnp.float32)[t].reshape(shape),
            jnp.asarray(sigma, jnp.float32)[t].reshape(shape),
        )

    def add_noise(
        self, x0: Float[Array, "b ..."], noise: Float[Array, "b ..."], t: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """x_t = alpha_t x0 + sigma_t noise, in fp32."""
        alpha, sigma = self.coefficients(t, x0.ndim)
        return alpha * x0 + sigma * noise

    def to_eps(
        self, output: Float[Array, "b ..."], x_t: Float[Array, "b ..."], t: Int[Array, " b"]
    ) -> Float[Array, "b ..."]:
        """The noise a UNet output stands for: itself, or alpha_t v + sigma_t x_t."""
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self.coefficients(t, output.ndim)
        return alpha * output + sigma * x_t


def make_schedule(
    beta_schedule: str = "scaled_linear",
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    num_train_timesteps: int = 1000,
    *,
    prediction_type: str = "epsilon",
    steps_offset: int = 1,
    set_alpha_to_one: bool = False,
    timestep_spacing: str = "leading",
) -> NoiseSchedule:
    """The schedule of Stable Diffusion, or of a scheduler_config.json with these fields.

    scaled_linear: sqrt(beta) runs evenly from sqrt(beta_start) to sqrt(beta_end); linear: beta
    itself does.

    Raises:
        ValueError: on an unknown name or betas outside 0 < beta_start <= beta_end < 1.

    Source: diffusers 0.42 DDIMScheduler.__init__, in whose float32 the betas and alphas are
    rounded. Differs: the product is in float64, theirs in float32 (largest difference 7e-8,
    relative 4e-7: tests/diffusion/test_schedule.py).
    """
    _choose("beta_schedule", beta_schedule, BETA_SCHEDULES)
    if not 0.0 < beta_start <= beta_end < 1.0:
        raise ValueError(f"betas {beta_start}..{beta_end}, expected 0 < beta_start <= beta_end < 1")
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps {num_train_timesteps}, expected at least 1")
    if beta_schedule == "scaled_linear":
        betas = (
            np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=np.float32) ** 2
        )
    else:
        betas = np.linspace(beta_start, beta_end, num_train_timesteps, dtype=np.float32)
    return NoiseSchedule(
        alphas_cumprod=np.cumprod(np.float32(1.0) - betas, dtype=np.float64),
        prediction_type=prediction_type,
        steps_offset=steps_offset,
        set_alpha_to_one=set_alpha_to_one,
        timestep_spacing=timestep_spacing,
    )


def _choose(what: str, name: str, choices: tuple[str, ...]) -> str:
    if name not in choices:
        raise ValueError(f"{what} {name!r}: choose from {sorted(choices)}")
    return name
