"""FIXME: say what this module is."""

import dataclasses
import functools
import os

import jax

from research.parallel.mesh import cores
from research.training.run import Run

OPTIMIZER_INPUTS = ('weight_decay', 'weight_decay_rate', 'b1', 'b2', 'eps')


def _any_schedule(steps: int):
  """Stands for a schedule in the comparison of runs: rates are inputs of the step."""


def _inputs(run: Run) -> dict[str, float]:
  """The numbers of a run, beside its rates and its seed, that its compiled step takes as inputs."""
  bound = run.optimizer.keywords if isinstance(run.optimizer, functools.partial) else {}
  return {'z_loss': run.z_loss, **{k: bound[k] for k in OPTIMIZER_INPUTS if k in bound}}


def _with_inputs(run: Run, values: dict) -> Run:
  bound = {k: v for k, v in values.items() if k != 'z_loss'}
  optimizer = functools.partial(run.optimizer, **bound) if bound else run.optimizer
  return dataclasses.replace(run, z_loss=values['z_loss'], optimizer=optimizer)


def shape(run: Run) -> str:
  """A text that is equal for runs that may be members of one population."""
  run = _with_inputs(run, dict.fromkeys(_inputs(run), 0.0))
  run = dataclasses.replace(run, seed=0, schedule=_any_schedule)
  reports = ('log_every', 'checkpoint_every', 'keep_checkpoints')
  return run.identity() + ''.join(f'{name} = {getattr(run, name)}\n' for name in reports)


def possible(run: Run) -> bool:
  """Whether a run may be a member at all: it lives on one device, and one process."""
  return run.mesh is None and jax.process_count() == 1


def share_cores(most: int) -> bool:
  """Makes the cores that this process may use, `most` at most, devices of jax, which has not started yet.

  A core to a member: by itself jax would divide every product over the cores, which small ones do not repay.
  True where there are several; then a run that is alone has one core.
  """
  devices = min(cores(), most)
  if devices > 1:
    os.environ['PJRT_NPROC'] = '1'  # threads to divide a product over; a device has one of its own
    jax.config.update('jax_num_cpu_devices', devices)
  return devices > 1
