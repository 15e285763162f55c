"""FIXME: say what this module is."""

import json
import math
import os
import pathlib
import sys
import time

import jax
import numpy as np

from research.checkpoints import folders
from research.checkpoints.manager import Checkpoints
from research.core import storage
from research.core.text import si
from research.data import batches as batches_module
from research.data import cache
from research.data.batches import FrozenMixture, batch_at, eval_batches
from research.parallel import processes
from research.parallel.hosts import host_share, on_mesh, place
from research.parallel.mesh import describe
from research.training import background_jit, metrics
from research.training.checks import check_fits, count_of
from research.training.interrupt import Interrupted, _Signal
from research.training.program import keep_compiled, make_program, mesh_of, rates
from research.training.run import Run
from research.training.workdir import open_workdir


def train(run: Run, workdir: str | pathlib.Path, config_text: str = '', stream=sys.stderr) -> dict:
  """Trains to the end, or from where a checkpoint in `workdir` left it; returns the run's row.

  Raises:
    UserError: something does not fit; before anything is compiled.
    Interrupted: SIGTERM came; a checkpoint was saved.
  """
  workdir = storage.place(workdir)
  keep_compiled()
  with mesh_of(run, jax.devices()).use() as mesh, open(os.devnull, 'w') as silence:
    stream = stream if jax.process_index() == 0 else silence
    open_workdir(workdir, run, config_text)
    say = lambda text: print(text, file=stream, flush=True)
    devices = jax.devices()
    say(f'{len(devices)} {devices[0].device_kind} device(s), mesh {describe(mesh)}')
    frozen, validation = open_data(run, say)
    program = make_program(run)
    check_fits(run, program.vocab, program.inputs, frozen)
    count = count_of(run)
    say(
      f'{si(count.params_total)} parameters ({si(count.params_non_embedding)} non-embedding), '
      f'{si(run.batches.examples(run.steps) * run.target_length)} tokens to train on; '
      f'a uniform guess has a loss of ln {program.vocab} = {math.log(program.vocab):.3f} nats/token'
    )
    loop = _Loop(run, program, workdir, frozen, validation, count, rates([run])[0], stream)
    try:
      row = loop.train()
    finally:
      loop.close()
    if jax.process_index() == 0:
      storage.write_atomic(workdir / 'run.json', json.dumps(row, indent=1) + '\n')
    return row


def open_data(run: Run, log) -> list:
  """The run's frozen streams, made by the first process where the others see its cache."""
  first, streams = jax.process_index() == 0, [run.train, run.validation]
  opened = cache.open_streams(streams, log=log) if first else None
  processes.exchange('data', '', timeout=24 * 3600.0)  # to freeze a large corpus takes hours
  return opened or cache.open_streams(streams, log=log)


class _Loop:
  """The loop around the step: dispatches it, and looks at each step's metrics one step later."""

  def __init__(self, run, program, workdir, frozen, validation, count, rates, stream):
    self.run, self.program, self.workdir, self.rates = run, program, workdir, rates
    self.frozen, self.validation, self.count = frozen, validation, count
    self.signal = _Signal()
    self.checkpoints = Checkpoints(workdir / 'checkpoints', keep=run.keep_checkpoints)
    self.compile()
    restored = self.checkpoints.restore(program.abstract, log=self._say(stream))
    if restored:
      self.start, self.state, meta = restored
      self.tokens, self.seconds = meta['tokens'], meta['seconds']
      print(f'resumed from step {self.start:,}', file=stream, flush=True)
    else:
      self.start, self.state, self.tokens, self.seconds = 0, self.initial(), 0, 0.0
    writes = jax.process_index() == 0
    self.rows = metrics.Rows(workdir, self.start) if writes else metrics.NoRows()
    flops = count.flops_6n_with_head
    self.progress = metrics.Progress(run.steps, self.start, flops, stream)
    self.window: list[dict] = []
    self.clock = time.monotonic()
    self.began = self.clock - self.seconds

  def compile(self) -> None:
    """Begins to compile what the run calls."""
    program, run, share = self.program, self.run, host_share()
    state = on_mesh(program.abstract)
    batch = place(batch_at(self.frozen, run.batches, run.seed, 0, *share))
    saved = folders.saved_steps(self.workdir / 'checkpoints')
    self.init_fn = background_jit.jit(program.init, *([] if saved else [self.key()]))
    self.step_fn = background_jit.jit(program.step, state, batch, self.rates[0], donate_argnums=0)
    batch = place(next(eval_batches(self.validation, run.batch_size, *share)))
    self.evaluate_fn = background_jit.jit(program.evaluate, state['params'], batch)

  def initial(self) -> dict:
    return self.init_fn(self.key())

  def key(self) -> jax.Array:
    return jax.random.key(self.run.seed)

  @staticmethod
  def _say(stream):
    return lambda text: print(text, file=stream, flush=True)

  def train(self) -> dict:
    run, pending, status, step = self.run, None, 'finished', self.start
    part, parts = host_share()
    batches = batches_module.batches(
      self.frozen,
      run.batches,
      run.seed,
      start=self.start,
      process_index=part,
      process_count=parts,
    )
    for step in range(self.start + 1, run.steps + 1):
      self.state, scalars = self.step_fn(self.state, place(next(batches)), self.rates[step - 1])
      if pending is not None and not self.look(*pending):
        status = 'nan'
        break
      pending = step, scalars
      stop = self.signal.check(step)
      if stop or step == run.steps or self.due(step):
        pending = None
        if not self.look(step, scalars):
          status = 'nan'
          break
        self.pause(
          step, last=step == run.steps, save=stop or step == run.steps or self.due_checkpoint(step)
        )
      if stop and step < run.steps:
        self.checkpoints.wait()
        raise Interrupted(f'stopped at step {step:,} with a checkpoint; start again to go on')
    return self.row(step, status)

  def due_checkpoint(self, step: int) -> bool:
    return bool(self.run.checkpoint_every) and step % self.run.checkpoint_every == 0

  def due(self, step: int) -> bool:
    return self.due_checkpoint(step) or (
      bool(self.run.eval_every) and step % self.run.eval_every == 0
    )

  def look(self, step: int, scalars: dict) -> bool:
    """Fetches a step's metrics and logs them; False when the loss is no number."""
    scalars = {k: float(v) for k, v in jax.device_get(scalars).items()}
    self.window.append(scalars)
    self.tokens += int(scalars['tokens'])
    good = math.isfinite(scalars['loss']) and math.isfinite(scalars['grad_norm'])
    if step % self.run.log_every == 0 or step == self.run.steps or not good:
      self.log(step)
    return good

  def log(self, step: int) -> None:
    """One row: means over the steps since the last row."""
    now = time.monotonic()
    window, seconds = self.window, max(now - self.clock, 1e-9)
    tokens = sum(w['tokens'] for w in window)
    mean = lambda key: sum(w[key] for w in window) / len(window)
    row = {'step': step, 'tokens': self.tokens} | {k: mean(k) for k in window[0] if k != 'tokens'}
    row |= {'learning_rate': float(self.rates[step - 1]), 'tokens_per_second': tokens / seconds}
    row['flops_per_second'] = row['tokens_per_second'] * self.progress.flops_per_token
    self.window, self.clock = [], now
    self.rows.write(row)
    self.progress.show(row, last=step == self.run.steps)

  def pause(self, step: int, last: bool, save: bool) -> None:
    """Between steps: evaluate, save."""
    began = time.monotonic()
    if last or (self.run.eval_every and step % self.run.eval_every == 0):
      self.last_evaluation = self.evaluate()
      self.rows.write(
        {
          'step': step,
          'tokens': self.tokens,
          **{f'validation/{k}': v for k, v in self.last_evaluation.items()},
        }
      )
      self.progress.say(
        f'step {step:,}: validation loss {self.last_evaluation["loss"]:.4f} nats/token, '
        f'{self.last_evaluation["bits_per_byte"]:.4f} bits/byte'
      )
    if save:
      self.rows.flush()  # a run resumed from here drops what is later, and lacks nothing earlier
      self.checkpoints.save(
        step, self.state, {'tokens': self.tokens, 'seconds': time.monotonic() - self.began}
      )
    self.clock += time.monotonic() - began  # speed is of training alone

  def evaluate(self) -> dict[str, float]:
    """Mean over all target tokens of the validation stream, in nats per token and bits per byte; for a mixture
    also the loss on each of its parts."""
    mixture = isinstance(self.validation, FrozenMixture)
    parts = self.validation.parts if mixture else {'': self.validation}
    sums = {name: self.sum_losses(part) for name, part in parts.items()}
    nll, tokens = (sum(s) for s in zip(*sums.values(), strict=True))
    size = sum(sums[name][1] * part.bytes_per_token for name, part in parts.items())
    losses = {f'{name}/loss': n / t for name, (n, t) in sums.items()} if mixture else {}
    return {'loss': nll / tokens, 'bits_per_byte': nll / math.log(2) / size, **losses}

  def sum_losses(self, frozen) -> tuple[float, float]:
    """Nats and target tokens of a whole stream."""
    batches = eval_batches(frozen, self.run.batch_size, *host_share())
    sums = [self.evaluate_fn(self.state['params'], place(batch)) for batch in batches]
    nll, tokens = zip(*jax.device_get(sums), strict=True)
    return float(np.sum(nll, dtype=np.float64)), float(np.sum(tokens, dtype=np.float64))

  def row(self, step: int, status: str) -> dict:
    """The run as one row: N, D and C by every convention, the loss, the hyper-parameters."""
    run, evaluation = self.run, getattr(self, 'last_evaluation', {}) if status == 'finished' else {}
    if status == 'finished' and not evaluation:
      evaluation = self.evaluate()
    if status == 'nan':
      self.progress.say(
        f'step {step:,}: the loss is not a number; stopped, the last good checkpoint is kept'
      )
    epochs = self.frozen.epochs(run.batches.examples(step))
    mixture = isinstance(self.frozen, FrozenMixture)
    return {
      'status': status,
      **{k: v for k, v in vars(self.count).items() if k.startswith('params_')},
      'tokens': self.tokens,
      'epochs': max(epochs.values()),
      **({f'{name}/epochs': n for name, n in epochs.items()} if mixture else {}),
      **{k: v * self.tokens for k, v in vars(self.count).items() if k.startswith('flops_')},
      'loss': evaluation.get('loss'),
      'bits_per_byte': evaluation.get('bits_per_byte'),
      **{name: value for name, value in evaluation.items() if name.endswith('/loss')},
      'steps': step,
      'batch_size': run.batch_size,
      'length': run.target_length,
      'learning_rate': float(self.rates.max()),
      'seed': run.seed,
      'task': run.train.name,
      'seconds': time.monotonic() - self.began,
      'devices': jax.device_count(),
    }  # fmt: skip

  def close(self):
    self.signal.restore()
    self.checkpoints.close()
    self.rows.close()
