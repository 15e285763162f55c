"""Decides which runs are alike enough to be trained together in one compiled step."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax

from research.core.errors import UserError
from research.parallel.mesh import cores
from research.training.experience import Experience
from research.training.run import Run

# Arguments of optimizers that members may differ in. optax only computes with them and never branches on their
# values, so they may be traced arrays.
OPTIMIZER_INPUTS = ('weight_decay', 'weight_decay_rate', 'b1', 'b2', 'eps')


def _any_schedule(steps: int):
  """Replaces every schedule when runs are compared: learning rates are inputs of the step."""


def inputs_of(run: Run) -> dict[str, float]:
  """Returns the numbers of a run that its compiled step can take as inputs, beside its rates and its seed.

  Returns:
    Values by name: 'loss.<field>' for numbers of the loss, the plain argument name for those of the optimizer.
  """
  bound = run.optimizer.keywords if isinstance(run.optimizer, functools.partial) else {}
  of_optimizer = {name: bound[name] for name in OPTIMIZER_INPUTS if name in bound}
  return {f'loss.{name}': value for name, value in run.loss.numbers.items()} | of_optimizer


def with_inputs(run: Run, values: dict) -> Run:
  """Returns the run with these values in place of its own.

  Args:
    run: any run.
    values: numbers or arrays, by the names that `inputs_of` returns.
  """
  of_loss = {k.removeprefix('loss.'): v for k, v in values.items() if k.startswith('loss.')}
  of_optimizer = {k: v for k, v in values.items() if not k.startswith('loss.')}
  optimizer = functools.partial(run.optimizer, **of_optimizer) if of_optimizer else run.optimizer
  loss = dataclasses.replace(run.loss, **of_loss)
  return dataclasses.replace(run, loss=loss, optimizer=optimizer)


def shape(run: Run) -> str:
  """Returns a text that is equal for runs that may be members of one population."""
  # None and not some number: a loss may refuse a number, such as a temperature of 0.
  run = with_inputs(run, dict.fromkeys(inputs_of(run)))
  run = dataclasses.replace(run, seed=0, schedule=_any_schedule)
  reports = ('log_every', 'checkpoint_every', 'keep_checkpoints')
  return run.identity() + ''.join(f'{name} = {getattr(run, name)}\n' for name in reports)


def possible(run: Run) -> bool:
  """Returns whether a run may be a member at all: it uses one device and one process, and reads a stream."""
  alone = run.mesh is not None or isinstance(run.train, Experience)
  return not alone and jax.process_count() == 1


def check_alike(runs: Sequence[Run]) -> None:
  """Raises UserError if the runs cannot be one population."""
  shapes = [shape(run) for run in runs]
  if len(set(shapes)) > 1:
    other = next(text for text in shapes if text != shapes[0])
    lines = zip(shapes[0].splitlines(), other.splitlines(), strict=False)
    first_line, other_line = next(pair for pair in lines if pair[0] != pair[1])
    raise UserError(
      'runs of one population may differ only in their seed, rates and other numbers, and these differ '
      f'("{first_line.strip()}", "{other_line.strip()}"); train them one by one.'
    )
  if not possible(runs[0]):
    raise UserError(
      'every member of a population uses one device of one process and reads a frozen stream: unset Run.mesh, '
      'and train runs of reinforcement learning alone.'
    )


def share_cores(most: int) -> bool:
  """Gives each member a core of its own: makes up to `most` cores of this process separate jax devices.

  Call it before jax starts. By default jax divides every matrix product over all cores, which is slower for
  small products.

  Returns:
    True if there are several devices. A run that is trained alone then has one core.
  """
  devices = min(cores(), most)
  if devices > 1:
    os.environ['PJRT_NPROC'] = (
      '1'  # the threads that a product is divided over, beside the device's own
    )
    jax.config.update('jax_num_cpu_devices', devices)
  return devices > 1
