"""Handles SIGTERM: a run notices it between two steps, saves a checkpoint, and stops."""

import signal

import jax


class Interrupted(Exception):
  """The run received SIGTERM and saved its state."""


class TerminationSignal:
  """Records whether any host has received SIGTERM."""

  def __init__(self):
    self.received = False
    self.previous = None
    # With several processes jax handles the signal, and makes all processes stop at the same step.
    if jax.process_count() > 1:
      return
    try:
      self.previous = signal.signal(signal.SIGTERM, self._receive)
    except ValueError:  # Python allows handlers in the main thread only, and this is another one
      self.previous = None

  def _receive(self, *_):
    self.received = True

  def check(self, step: int) -> bool:
    """Returns whether to stop after this step. All processes get the same answer."""
    if jax.process_count() == 1:
      return self.received
    from jax.experimental import multihost_utils

    return multihost_utils.reached_preemption_sync_point(step)

  def restore(self):
    """Restores the signal handler that was there before."""
    if self.previous is not None:
      signal.signal(signal.SIGTERM, self.previous)
