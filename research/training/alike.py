"""Which runs are alike enough to be trained together in one compiled step."""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax

from research.core.errors import UserError
from research.parallel.mesh import cores
from research.training.experience import Experience
from research.training.run import Run

# Numbers of optimizers that members may differ in: optax computes with them and never asks what they are.
OPTIMIZER_INPUTS = ('weight_decay', 'weight_decay_rate', 'b1', 'b2', 'eps')


def _any_schedule(steps: int):
  """Stands for a schedule in the comparison of runs: learning rates are inputs of the step."""


def inputs_of(run: Run) -> dict[str, float]:
  """The numbers of a run, beside its rates and its seed, that its compiled step takes as inputs."""
  bound = run.optimizer.keywords if isinstance(run.optimizer, functools.partial) else {}
  of_optimizer = {name: bound[name] for name in OPTIMIZER_INPUTS if name in bound}
  return {f'loss.{name}': value for name, value in run.loss.numbers.items()} | of_optimizer


def with_inputs(run: Run, values: dict) -> Run:
  """The run with these values, numbers or arrays, in place of its own; names as `inputs_of` gives them."""
  of_loss = {k.removeprefix('loss.'): v for k, v in values.items() if k.startswith('loss.')}
  of_optimizer = {k: v for k, v in values.items() if not k.startswith('loss.')}
  optimizer = functools.partial(run.optimizer, **of_optimizer) if of_optimizer else run.optimizer
  loss = dataclasses.replace(run.loss, **of_loss)
  return dataclasses.replace(run, loss=loss, optimizer=optimizer)


def shape(run: Run) -> str:
  """A text that is equal for runs that may be members of one population."""
  # No number, which a loss could refuse: a temperature of 0, say.
  run = with_inputs(run, dict.fromkeys(inputs_of(run)))
  run = dataclasses.replace(run, seed=0, schedule=_any_schedule)
  reports = ('log_every', 'checkpoint_every', 'keep_checkpoints')
  return run.identity() + ''.join(f'{name} = {getattr(run, name)}\n' for name in reports)


def possible(run: Run) -> bool:
  """Whether a run may be a member at all: it lives on one device and one process, and reads a stream."""
  alone = run.mesh is not None or isinstance(run.train, Experience)
  return not alone and jax.process_count() == 1


def check_alike(runs: Sequence[Run]) -> None:
  """Raises UserError where the runs cannot be one population."""
  shapes = [shape(run) for run in runs]
  if len(set(shapes)) > 1:
    other = next(text for text in shapes if text != shapes[0])
    lines = zip(shapes[0].splitlines(), other.splitlines(), strict=False)
    left, right = next(pair for pair in lines if pair[0] != pair[1])
    raise UserError(
      f'runs of a population have one shape, and these differ ("{left.strip()}", "{right.strip()}").'
    )
  if not possible(runs[0]):
    raise UserError(
      'members of a population live on one device each, of one process, and read a stream: unset Run.mesh; '
      'runs of reinforcement are trained alone.'
    )


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
