"""Learning rates by step. `schedule(steps, *, peak, ...)` gives optax's `step -> learning rate`."""

from collections.abc import Callable

import optax

from research.core.errors import Invalid

Schedule = Callable[[int], float]


def _warmup_steps(owner, steps: int, warmup: float) -> int:
  """A warm-up below 1 is a fraction of the run, otherwise a number of steps."""
  n = round(steps * warmup) if warmup < 1 else int(warmup)
  if warmup < 0 or n > steps:
    raise Invalid(owner, 'warmup', f'{warmup!r} of a run of {steps} steps is {n} steps.')
  return n


def warmup_cosine(
  steps: int, *, peak: float, warmup: float = 0.02, final_fraction: float = 0.1
) -> Schedule:
  """Linear from 0 to `peak`, then a cosine to `final_fraction * peak` at the last step (Hoffmann 2022)."""
  n = _warmup_steps(warmup_cosine, steps, warmup)
  return optax.warmup_cosine_decay_schedule(0.0, peak, n, steps, peak * final_fraction)


def warmup_stable_decay(
  steps: int, *, peak: float, warmup: float = 0.02, decay: float = 0.2, final_fraction: float = 0.0
) -> Schedule:
  """Linear up, constant, then linear down over the last `decay` of the steps (WSD: Hu et al. 2024,
  arXiv:2404.06395; the linear cool-down of Hägele et al. 2024, arXiv:2405.18392)."""
  n, down = _warmup_steps(warmup_stable_decay, steps, warmup), round(steps * decay)
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
