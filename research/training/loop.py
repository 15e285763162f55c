"""Trains one run: the loop around the step."""

import math
import os
import pathlib
import sys
from collections.abc import Callable

import jax
import numpy as np

from research.checkpoints import folders
from research.core import storage
from research.core.text import si
from research.data import batches as batches_module
from research.data import cache
from research.data.batches import batch_at, eval_batches
from research.model.counts import Counts
from research.parallel import dispatch, processes
from research.parallel.hosts import host_share, on_mesh, place
from research.parallel.mesh import describe
from research.training import background_jit
from research.training.checks import check_fits, check_start, count_of
from research.training.experience import Experience, Opened
from research.training.interrupt import Interrupted, TerminationSignal
from research.training.program import Program, keep_compiled, make_program, mesh_of
from research.training.record import Record
from research.training.run import Run
from research.training.schedules import rates
from research.training.workdir import open_workdir


def train(run: Run, workdir: str | pathlib.Path, config_text: str = '', stream=sys.stderr) -> dict:
  """Trains a run to its end, from the last checkpoint in `workdir` if there is one.

  Args:
    run: the run.
    workdir: a folder or a bucket for checkpoints, metrics and the row of results.
    config_text: the gin text of the run, for its config.gin.
    stream: where the first process prints its progress.

  Returns:
    The run's row of results: N, D and C by every convention, the loss, the hyper-parameters.

  Raises:
    UserError: something does not fit. This is raised before anything is compiled.
    Interrupted: the process received SIGTERM; a checkpoint was saved.
  """
  workdir = storage.place(workdir)
  dispatch.run_one_program_at_once()
  keep_compiled()
  with mesh_of(run, jax.devices()).use() as mesh, open(os.devnull, 'w') as silence:
    stream = stream if jax.process_index() == 0 else silence

    def say(text: str) -> None:
      print(text, file=stream, flush=True)

    # Every check that needs no data comes before the data is frozen, which can take hours.
    check_start(run)
    open_workdir(workdir, run, config_text)
    devices = jax.devices()
    say(f'{len(devices)} {devices[0].device_kind} device(s), mesh {describe(mesh)}')
    frozen, validation = open_data(run, say)
    program = make_program(run)
    check_fits(run, program.vocab, program.inputs, frozen, validation)
    count = count_of(run)
    say(_describe(run, count, program.vocab))
    loop = Loop(run, program, workdir, frozen, validation, count, stream)
    try:
      row = loop.train()
    finally:
      loop.close()
    if jax.process_index() == 0:
      loop.record.write_row(row)
    return row


def _describe(run: Run, count: Counts, vocab: int) -> str:
  """Returns the line that a person reads before the first step."""
  tokens = run.batches.examples(run.steps) * run.target_length
  return (
    f'{si(count.params_total)} parameters ({si(count.params_non_embedding)} non-embedding), '
    f'{si(tokens)} tokens to train on; '
    f'a uniform guess has a loss of ln {vocab} = {math.log(vocab):.3f} nats/token'
  )


def open_data(run: Run, log: Callable[[str], None]) -> list:
  """Opens the run's training and validation streams. The first process freezes them; the others read its cache.

  In place of the training stream a run of reinforcement learning has an `experience.Opened`.
  """
  if isinstance(run.train, Experience):
    return [run.train.open(run), *cache.open_streams([run.validation], log=log)]
  streams = [run.train, run.validation]
  is_first = jax.process_index() == 0
  opened = cache.open_streams(streams, log=log) if is_first else None
  # The others wait here. A large corpus takes hours to freeze.
  processes.exchange('data', '', timeout=24 * 3600.0)
  return opened or cache.open_streams(streams, log=log)


class Loop:
  """Dispatches the steps of a run, and reads the metrics of each step one step later.

  That way the device already computes the next step while the host waits for the metrics. On a CPU
  the metrics are read at once: one device computes a step while it is dispatched
  (`dispatch.run_one_program_at_once`), and several would hold the memory of two steps.
  """

  def __init__(self, run: Run, program: Program, workdir, frozen, validation, count, stream):
    self.run = run
    self.program = program
    self.frozen = frozen
    self.validation = validation
    self.rates = rates([run])[0]
    self.fixed = program.fixed()
    self.signal = TerminationSignal()
    self.reads_at_once = jax.default_backend() == 'cpu'
    # XLA compiles in the background while the checkpoint is read.
    self.compile(workdir)
    self.record = Record(
      run, workdir, frozen, validation, count, self.rates, stream, program.abstract, self.sum_losses,
      self.params_on_host, base=program.base(),
    )  # fmt: skip
    restored = self.record.state is not None
    # If all checkpoints of a run that resumes are damaged, it starts again, and `compile` made no arguments.
    arguments = self.init_arguments or ([] if restored else self.arguments_of_init())
    self.state = self.record.state if restored else self.init_fn(*arguments)
    # Neither may keep a second copy of the parameters alive: the step donates the memory of its state.
    del self.init_arguments
    self.record.state = None

  def compile(self, workdir: pathlib.Path) -> None:
    """Starts to compile init, step and evaluate in the background."""
    share = host_share()
    state = on_mesh(self.program.abstract)
    resumes = bool(folders.saved_steps(workdir / 'checkpoints'))
    # A run that resumes does not call init, and without arguments it is not compiled.
    self.init_arguments = [] if resumes else self.arguments_of_init()
    self.init_fn = background_jit.jit(self.program.init, *self.init_arguments)
    if isinstance(self.frozen, Opened):
      batch = self.frozen.empty(self.run.batch_size)
    else:
      batch = batch_at(self.frozen, self.run.batches, self.run.seed, 0, *share)
    batch = place(batch)
    self.step_fn = background_jit.jit(
      self.program.step, state, batch, self.rates[0], self.fixed, donate_argnums=0
    )
    batch = place(next(eval_batches(self.validation, self.run.batch_size, *share)))
    self.evaluate_fn = background_jit.jit(self.program.evaluate, state['params'], batch, self.fixed)

  def arguments_of_init(self) -> list:
    """Returns the seed's key and, if the run starts from a checkpoint, the values that it takes from there."""
    key = jax.random.key(self.run.seed)
    return [key] if self.run.init is None else [key, self.program.initial_values()]

  def whole_params(self) -> dict:
    """Returns all current parameters, those that do not learn too, on the mesh in use."""
    return self.program.whole(self.state['params'], self.fixed)

  def params_on_host(self) -> dict:
    """Returns all current parameters as host arrays."""
    return jax.device_get(self.whole_params())

  def train(self) -> dict:
    """Trains from `record.start` to the last step; returns the run's row.

    Raises:
      Interrupted: SIGTERM was received; a checkpoint was saved.
    """
    run = self.run
    record = self.record
    batches = self.batches(record.start)
    pending = None
    step = record.start
    for step in range(record.start + 1, run.steps + 1):
      batch, row_metrics = next(batches)
      batch = place(batch)
      self.state, scalars = self.step_fn(self.state, batch, self.rates[step - 1], self.fixed)
      scalars |= row_metrics
      # The metrics of the step before: the device has the next step to compute while the host waits for them.
      if pending is not None and not record.log_step(*pending):
        return record.row(pending[0], 'nan')
      pending = step, scalars
      stop = self.signal.check(step) and self.may_stop(step)
      pauses = stop or record.pauses_at(step)
      # Nothing is saved or evaluated before the metrics say that the state is finite.
      if pauses or self.reads_at_once:
        pending = None
        if not record.log_step(step, scalars):
          return record.row(step, 'nan')
      if pauses and not record.pause(step, self.state, save=stop or record.saves_at(step)):
        return record.row(step, 'nan')
      if stop and step < run.steps:
        record.checkpoints.wait()
        why = (
          f'stopped at step {step:,} with a checkpoint; start the same command again to continue'
        )
        raise Interrupted(why)
    return record.row(step, 'finished')

  def batches(self, start: int):
    """Yields (batch, its metrics by name) for every step from `start` on, without end."""
    if isinstance(self.frozen, Opened):
      return self.frozen.batches(self.program, start, self.whole_params)
    run = self.run
    part, parts = host_share()
    batches = batches_module.batches(
      self.frozen, run.batches, run.seed, start=start, process_index=part, process_count=parts
    )
    return ((batch, {}) for batch in batches)

  def may_stop(self, step: int) -> bool:
    """Returns whether a checkpoint after this step holds all that the next step needs."""
    train = self.run.train
    return not isinstance(train, Experience) or step % train.round_steps == 0

  def sum_losses(self, frozen) -> dict[str, float]:
    """Returns the sums of `Program.evaluate` over a whole stream, for the current parameters."""
    batches = eval_batches(frozen, self.run.batch_size, *host_share())
    params = self.state['params']
    return total([self.evaluate_fn(params, place(batch), self.fixed) for batch in batches])

  def close(self) -> None:
    """Restores the signal handler, and waits for checkpoints that are being written."""
    self.signal.restore()
    self.record.close()


def total(sums: list[dict]) -> dict:
  """Adds up the sums of several batches, in float64: float32 would lose the small terms of a long sum."""
  sums = jax.device_get(sums)
  return {name: np.sum([part[name] for part in sums], axis=0, dtype=np.float64) for name in sums[0]}
