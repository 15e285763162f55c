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
from research.parallel import processes
from research.parallel.hosts import host_share, on_mesh, place
from research.parallel.mesh import describe
from research.training import background_jit
from research.training.checks import check_fits, check_start, count_of
from research.training.experience import Experience, Opened
from research.training.interrupt import Interrupted, TerminationSignal
from research.training.program import Program, keep_compiled, make_program, mesh_of, rates
from research.training.record import Record
from research.training.run import Run
from research.training.workdir import open_workdir


def train(run: Run, workdir: str | pathlib.Path, config_text: str = '', stream=sys.stderr) -> dict:
  """Trains to the end, or from where a checkpoint in `workdir` left it; returns the run's row.

  Raises:
    UserError: something does not fit; before anything is compiled.
    Interrupted: SIGTERM was received; a checkpoint was saved.
  """
  workdir = storage.place(workdir)
  keep_compiled()
  with mesh_of(run, jax.devices()).use() as mesh, open(os.devnull, 'w') as silence:
    stream = stream if jax.process_index() == 0 else silence

    def say(text: str) -> None:
      print(text, file=stream, flush=True)

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
  """What a person should know before the first step."""
  tokens = run.batches.examples(run.steps) * run.target_length
  return (
    f'{si(count.params_total)} parameters ({si(count.params_non_embedding)} non-embedding), '
    f'{si(tokens)} tokens to train on; '
    f'a uniform guess has a loss of ln {vocab} = {math.log(vocab):.3f} nats/token'
  )


def open_data(run: Run, log: Callable[[str], None]) -> list:
  """The run's frozen streams. The first process freezes them, where the others see its cache.

  In the place of the training stream, what makes the rows of a run that has none.
  """
  if isinstance(run.train, Experience):
    return [run.train.open(run), *cache.open_streams([run.validation], log=log)]
  streams = [run.train, run.validation]
  is_first = jax.process_index() == 0
  opened = cache.open_streams(streams, log=log) if is_first else None
  # A large corpus takes hours to freeze.
  processes.exchange('data', '', timeout=24 * 3600.0)
  return opened or cache.open_streams(streams, log=log)


class Loop:
  """Dispatches the steps of a run, and looks at each step's metrics one step later.

  One step later, so that the device computes the next step while the host waits for the metrics.
  """

  def __init__(self, run: Run, program: Program, workdir, frozen, validation, count, stream):
    self.run = run
    self.program = program
    self.frozen = frozen
    self.validation = validation
    self.rates = rates([run])[0]
    self.fixed = program.fixed()
    self.signal = TerminationSignal()
    # XLA compiles in the background while the checkpoint is read.
    self.compile(workdir)
    self.record = Record(
      run, workdir, frozen, validation, count, self.rates, stream, program.abstract, self.sum_losses,
      lambda: jax.device_get(self.program.whole(self.state['params'], self.fixed)),
      base=program.base(),
    )  # fmt: skip
    restored = self.record.state is not None
    # Where a run resumes from nothing but damaged checkpoints, it begins anew.
    first = self.first or ([] if restored else self.arguments_of_init())
    self.state = self.record.state if restored else self.init_fn(*first)
    del self.first  # the parameters that it started from
    self.record.state = None  # the step donates the state's memory

  def compile(self, workdir: pathlib.Path) -> None:
    """Begins to compile what the run calls."""
    share = host_share()
    state = on_mesh(self.program.abstract)
    resumes = bool(folders.saved_steps(workdir / 'checkpoints'))
    self.first = [] if resumes else self.arguments_of_init()
    self.init_fn = background_jit.jit(self.program.init, *self.first)
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
    """The seed's key and, where the run starts from a checkpoint, what that gives."""
    key = jax.random.key(self.run.seed)
    return [key] if self.run.init is None else [key, self.program.given()]

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
      batch, of_rows = next(batches)
      batch = place(batch)
      self.state, scalars = self.step_fn(self.state, batch, self.rates[step - 1], self.fixed)
      scalars |= of_rows
      if pending is not None and not record.look(*pending):
        return record.row(step, 'nan')
      pending = step, scalars
      stop = self.signal.check(step) and self.may_stop(step)
      if stop or record.pauses_at(step):
        pending = None
        if not record.look(step, scalars):
          return record.row(step, 'nan')
        record.pause(step, self.state, save=stop or record.saves_at(step))
      if stop and step < run.steps:
        record.checkpoints.wait()
        raise Interrupted(f'stopped at step {step:,} with a checkpoint; start again to go on')
    return record.row(step, 'finished')

  def batches(self, start: int):
    """Without end (batch, what a row of metrics says of it), from step `start` on."""
    if isinstance(self.frozen, Opened):
      return self.frozen.batches(
        self.program, start, lambda: self.program.whole(self.state['params'], self.fixed)
      )
    run = self.run
    part, parts = host_share()
    batches = batches_module.batches(
      self.frozen, run.batches, run.seed, start=start, process_index=part, process_count=parts
    )
    return ((batch, {}) for batch in batches)

  def may_stop(self, step: int) -> bool:
    """Whether a checkpoint after this step holds all that the next one needs."""
    train = self.run.train
    return not isinstance(train, Experience) or step % train.round_steps == 0

  def sum_losses(self, frozen) -> dict[str, float]:
    """Sums over a whole stream, by the parameters of now, as `Program.evaluate` names them."""
    batches = eval_batches(frozen, self.run.batch_size, *host_share())
    params = self.state['params']
    return total([self.evaluate_fn(params, place(batch), self.fixed) for batch in batches])

  def close(self) -> None:
    self.signal.restore()
    self.record.close()


def total(sums: list[dict]) -> dict:
  """The sums of several batches as one, float64: float32 would lose the small terms of a long sum."""
  sums = jax.device_get(sums)
  return {name: np.sum([part[name] for part in sums], axis=0, dtype=np.float64) for name in sums[0]}
