"""FIXME: say what this module is."""

import signal

import jax


class Interrupted(Exception):
  """SIGTERM came; the state is saved."""


class _Signal:
  """True once SIGTERM came, on any host."""

  def __init__(self):
    self.came, self.previous = False, None
    if jax.process_count() > 1:  # jax listens, and makes all the processes stop at one step
      return
    try:
      self.previous = signal.signal(signal.SIGTERM, self._come)
    except ValueError:  # not the main thread: whoever started it handles signals
      self.previous = None

  def _come(self, *_):
    self.came = True

  def check(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self.came
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def restore(self):
    if self.previous is not None:
      signal.signal(signal.SIGTERM, self.previous)
