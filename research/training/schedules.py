"""Learning-rate schedules. `schedule(steps, *, peak, ...)` returns a function from the step to the rate, as
optax's.

In all of them `peak` is the highest rate, and `warmup` is a fraction of the run if it is below 1, else a number
of steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from research.core.errors import Invalid
from research.training.run import Run

Schedule = Callable[[int], float]


def rates(runs: list[Run]) -> list[np.ndarray]:
  """Returns the learning rate of every step of each run, float32 [steps].

  Raises:
    Invalid: a rate is negative or no number.
  """
  schedules = [run.schedule(run.steps) for run in runs]

  # One program for all runs: a program for each run, or for each operation, takes a second each to compile.
  @jax.jit
  def all_rates(*steps):
    return [jax.vmap(f)(x) for f, x in zip(schedules, steps, strict=True)]

  found = [np.asarray(x, np.float32) for x in all_rates(*(jnp.arange(run.steps) for run in runs))]
  for of_run in found:
    wrong = np.flatnonzero(~(np.isfinite(of_run) & (of_run >= 0)))
    if wrong.size:
      why = (
        f'the rate of step {wrong[0] + 1} is {of_run[wrong[0]]:g}; it must be a number from 0 up.'
      )
      raise Invalid(Run, 'schedule', why)
  return found


def _warmup_steps(owner, steps: int, warmup: float) -> int:
  """Returns the steps of a warm-up; below 1 it is a fraction of the run, otherwise a number of steps."""
  n = round(steps * warmup) if warmup < 1 else int(warmup)
  if warmup < 0 or n > steps:
    why = f'{warmup!r} of a run of {steps} steps is {n} steps; it must be from 0 to {steps}.'
    raise Invalid(owner, 'warmup', why)
  return n


def warmup_cosine(
  steps: int, *, peak: float, warmup: float = 0.02, final_fraction: float = 0.1
) -> Schedule:
  """Linear from 0 to `peak`, then a cosine to `final_fraction * peak` at the last step.

  Hoffmann et al. 2022 (Chinchilla, arXiv:2203.15556) decay to 0.1 of the peak.
  """
  n = _warmup_steps(warmup_cosine, steps, warmup)
  return optax.warmup_cosine_decay_schedule(0.0, peak, n, steps, peak * final_fraction)


def warmup_stable_decay(
  steps: int, *, peak: float, warmup: float = 0.02, decay: float = 0.2, final_fraction: float = 0.0
) -> Schedule:
  """Linear up, constant, then linear down over the last `decay` of the steps.

  WSD: Hu et al. 2024, arXiv:2404.06395, with the linear cool-down of Hägele et al. 2024, arXiv:2405.18392.
  """
  n = _warmup_steps(warmup_stable_decay, steps, warmup)
  down = round(steps * decay)
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, n),
      optax.constant_schedule(peak),
      optax.linear_schedule(peak, peak * final_fraction, down),
    ],
    [n, steps - down],
  )


def inverse_square_root(steps: int, *, peak: float, warmup: float = 10_000) -> Schedule:
  """Constant at `peak` for the warm-up, then peak * sqrt(warmup / step) (T5: Raffel 2020, section 3.1.2)."""
  n = max(1, _warmup_steps(inverse_square_root, steps, warmup))

  def schedule(step):
    return peak * (n / optax.safe_increment(step).clip(n)) ** 0.5

  return schedule


def constant(steps: int, *, peak: float, warmup: float = 0.0) -> Schedule:
  """Linear up to `peak`, then flat."""
  n = _warmup_steps(constant, steps, warmup)
  return optax.join_schedules(
    [optax.linear_schedule(0.0, peak, n), optax.constant_schedule(peak)], [n]
  )
