"""SIGTERM: a run notices it between two steps, saves, and stops."""

import signal

import jax


class Interrupted(Exception):
  """SIGTERM came; the state is saved."""


class TerminationSignal:
  """Whether SIGTERM was received, by any host."""

  def __init__(self):
    self.received = False
    self.previous = None
    if jax.process_count() > 1:  # jax listens itself, and makes all processes stop at the same step
      return
    try:
      self.previous = signal.signal(signal.SIGTERM, self._receive)
    except ValueError:  # not the main thread, whose owner handles signals
      self.previous = None

  def _receive(self, *_):
    self.received = True

  def check(self, step: int) -> bool:
    if jax.process_count() == 1:
      return self.received
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def restore(self):
    if self.previous is not None:
      signal.signal(signal.SIGTERM, self.previous)
