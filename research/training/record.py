"""What a run leaves as it is trained: rows of metrics, evaluations, checkpoints, its one row of results."""

import json
import math
import pathlib
import time
from collections.abc import Callable

import jax
import numpy as np

from research.checkpoints.manager import Checkpoints
from research.core import storage
from research.core.errors import Invalid
from research.data.batches import FrozenMixture
from research.model.counts import Counts
from research.training import metrics
from research.training.experience import Opened
from research.training.run import Run


class Record:
  """The record of one run. Whoever trains it, alone or among others, tells it of every step.

  Attributes:
    start: the step that the run continues from, 0 for a new one.
    state: what the checkpoint of that step held; None for a new run.
  """

  def __init__(
    self,
    run: Run,
    workdir: pathlib.Path,
    frozen,
    validation,
    count: Counts,
    rates: np.ndarray,
    stream,
    abstract: dict,
    sum_losses: Callable,
    params: Callable[[], dict],
    base: dict | None = None,
  ):
    """
    Args:
      frozen, validation: the opened streams of training and of validation.
      count: parameters, and FLOPs per token.
      rates: the learning rate of every step, [steps].
      stream: where progress is shown.
      abstract: shapes and places of the state, to restore a checkpoint by.
      sum_losses: gives the sums of `Program.evaluate` over a whole frozen stream by the parameters of now.
      params: gives the parameters of now, all of the model's, host arrays as nested dicts.
      base: what a checkpoint says of the parameters that it does not hold (`Program.base`).

    Raises:
      UserError: the run has evaluations, and several processes.
    """
    if run.evaluations and jax.process_count() > 1:
      why = (
        'a model is evaluated by one process, and this run has several: leave them out, and evaluate its '
        'checkpoints afterwards (research.evaluate --workdir).'
      )
      raise Invalid(Run, 'evaluations', why)
    self.run = run
    self.workdir = workdir
    self.frozen = frozen
    self.validation = validation
    self.count = count
    self.rates = rates
    self.sum_losses = sum_losses
    self.params = params
    self.base = base
    self.params_learned = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract['params']))
    self.checkpoints = Checkpoints(workdir / 'checkpoints', keep=run.keep_checkpoints)
    self._restore(abstract, stream)
    writes = jax.process_index() == 0
    self.rows = metrics.Rows(workdir, self.start) if writes else metrics.NoRows()
    self.progress = metrics.Progress(run.steps, self.start, count.flops_6n_with_head, stream)
    self.last_evaluation: dict[str, float] | None = None
    self.window: list[dict] = []
    self.clock = time.monotonic()
    self.began = self.clock - self.seconds

  def _restore(self, abstract: dict, stream) -> None:
    def say(text: str) -> None:
      print(text, file=stream, flush=True)

    restored = self.checkpoints.restore(abstract, log=say)
    if restored is None:
      self.start, self.state, self.tokens, self.seconds = 0, None, 0, 0.0
      return
    self.start, self.state, meta = restored
    self.tokens = meta['tokens']
    if isinstance(self.frozen, Opened):
      self.frozen.restore(meta['experience'])
    self.seconds = meta['seconds']
    say(f'resumed from step {self.start:,}')

  # When something is due.

  def saves_at(self, step: int) -> bool:
    every = self.run.checkpoint_every
    return step == self.run.steps or (every is not None and step % every == 0)

  def evaluates_at(self, step: int) -> bool:
    every = self.run.eval_every
    return step == self.run.steps or (every is not None and step % every == 0)

  def pauses_at(self, step: int) -> bool:
    """Whether training waits after this step, to save or to evaluate."""
    return self.saves_at(step) or self.evaluates_at(step)

  # What it is told.

  def look(self, step: int, scalars: dict) -> bool:
    """Fetches a step's metrics and logs them; False when the loss or the gradient is not finite."""
    scalars = {name: float(value) for name, value in jax.device_get(scalars).items()}
    self.window.append(scalars)
    self.tokens += int(scalars['tokens'])
    finite = math.isfinite(scalars['loss']) and math.isfinite(scalars['grad_norm'])
    if step % self.run.log_every == 0 or step == self.run.steps or not finite:
      self._log(step)
    return finite

  def _log(self, step: int) -> None:
    """Writes one row: means over the steps since the row before."""
    now = time.monotonic()
    window = self.window
    seconds = max(now - self.clock, 1e-9)
    row = {'step': step, 'tokens': self.tokens}
    for name in window[0]:
      if name != 'tokens':
        row[name] = sum(scalars[name] for scalars in window) / len(window)
    row['learning_rate'] = float(self.rates[step - 1])
    row['tokens_per_second'] = sum(scalars['tokens'] for scalars in window) / seconds
    row['flops_per_second'] = row['tokens_per_second'] * self.progress.flops_per_token
    self.window = []
    self.clock = now
    self.rows.write(row)
    self.progress.show(row, last=step == self.run.steps)

  def pause(self, step: int, state: dict, save: bool) -> None:
    """Between two steps: evaluates where that is due, and saves `state` where asked."""
    began = time.monotonic()
    if self.evaluates_at(step):
      self._evaluate_and_tell(step)
      # Those of the last step are for the row, when the checkpoint is safe.
      if step < self.run.steps:
        columns = self._ask(step)
        if columns:
          self.rows.write({'step': step, 'tokens': self.tokens, **columns})
    if save:
      # A run that resumes from here drops later rows, and lacks no earlier one.
      self.rows.flush()
      meta = {'tokens': self.tokens, 'seconds': time.monotonic() - self.began}
      if isinstance(self.frozen, Opened):
        meta['experience'] = self.frozen.state()
      if self.base is not None:
        meta['base'] = self.base
      self.checkpoints.save(step, state, meta)
    self.clock += time.monotonic() - began  # the speed that is shown is of training alone

  def _evaluate_and_tell(self, step: int) -> None:
    evaluation = self.evaluate()
    self.last_evaluation = evaluation
    named = {f'validation/{name}': value for name, value in evaluation.items()}
    self.rows.write({'step': step, 'tokens': self.tokens, **named})
    told = f'step {step:,}: validation loss {evaluation["loss"]:.4f}'
    if 'bits_per_byte' in evaluation:
      told += f' nats/token, {evaluation["bits_per_byte"]:.4f} bits/byte'
    for name in self.run.loss.evaluation.reports:
      told += f', {name} {evaluation[name]:.4f}'
    self.progress.say(told)

  def _ask(self, step: int) -> dict[str, float | int | str]:
    """The columns of the run's evaluations that are due at a step."""
    due = [one for one in self.run.evaluations if one.during or step == self.run.steps]
    if not due:
      return {}
    params = self.params()
    folder = self.workdir / 'evaluation'
    columns = {}
    for one in due:
      columns |= one.columns(self.run, params, step, folder, self.progress.say)
    return columns

  def evaluate(self) -> dict[str, float]:
    """Means over all of the validation stream: the loss, in nats also as bits per byte, and its other sums.

    Of a mixture also the loss on each of its parts.
    """
    mixture = isinstance(self.validation, FrozenMixture)
    parts = self.validation.parts if mixture else {'': self.validation}
    sums = {name: self.sum_losses(part) for name, part in parts.items()}
    total = {key: sum(part[key] for part in sums.values()) for key in next(iter(sums.values()))}
    weight = total.pop('weight')
    nats = total.pop('loss')
    evaluation = {'loss': float(nats / weight)}
    if self.run.loss.evaluation.nats:
      size = sum(float(sums[n]['weight']) * part.bytes_per_token for n, part in parts.items())
      evaluation['bits_per_byte'] = float(nats / math.log(2) / size)
    evaluation |= {name: float(value / weight) for name, value in total.items()}
    if mixture:
      evaluation |= {f'{n}/loss': float(s['loss'] / s['weight']) for n, s in sums.items()}
    return evaluation

  # How it ends.

  def row(self, step: int, status: str) -> dict:
    """The run as one row: N, D and C by every convention, the loss, the hyper-parameters."""
    evaluation, asked = {}, {}
    if status == 'finished':
      evaluation = self.last_evaluation or self.evaluate()
      asked = self._ask(step)
    if status == 'nan':
      self.progress.say(
        f'step {step:,}: the loss is not finite; stopped, the last good checkpoint is kept'
      )
    run = self.run
    counted = vars(self.count)
    epochs = self.frozen.epochs(run.batches.examples(step))
    mixture = isinstance(self.frozen, FrozenMixture)
    return {
      'status': status,
      **{name: value for name, value in counted.items() if name.startswith('params_')},
      **({} if run.learns is None else {'params_learned': self.params_learned}),
      **({f'init/{k}': v for k, v in run.init.row().items()} if run.init else {}),
      'tokens': self.tokens,
      'epochs': max(epochs.values()),
      **({f'{name}/epochs': n for name, n in epochs.items()} if mixture else {}),
      **{name: value * self.tokens for name, value in counted.items() if name.startswith('flops_')},
      'loss': evaluation.get('loss'),
      'bits_per_byte': evaluation.get('bits_per_byte'),
      **{name: value for name, value in evaluation.items() if name.endswith('/loss')},
      **{name: evaluation.get(name) for name in run.loss.evaluation.reports},
      **{f'{name}/{k}': v for name, m in run.loss.models.items() for k, v in m.row().items()},
      'steps': step,
      'batch_size': run.batch_size,
      'length': run.target_length,
      'learning_rate': float(self.rates.max()),
      'seed': run.seed,
      'task': run.train.name,
      'seconds': time.monotonic() - self.began,
      'devices': jax.device_count(),
      **asked,
    }

  def write_row(self, row: dict) -> None:
    storage.write_atomic(self.workdir / 'run.json', json.dumps(row, indent=1) + '\n')

  def close(self) -> None:
    self.checkpoints.close()
    self.rows.close()
