"""Records a run as it is trained: rows of metrics, evaluations, checkpoints, and its row of results."""

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
  """The record of one run. The loop of a single run and that of a population call it after every step.

  Attributes:
    start: the step that the run continues from, 0 for a new run.
    state: the state from the checkpoint of that step; None for a new run.
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
      run: the run.
      workdir: its folder or bucket.
      frozen: the opened training stream.
      validation: the opened validation stream.
      count: parameters, and FLOPs per token.
      rates: the learning rate of every step, [steps].
      stream: where progress is printed.
      abstract: shapes and shardings of the state, to restore a checkpoint into.
      sum_losses: returns the sums of `Program.evaluate` over a whole frozen stream, for the current parameters.
      params: returns all current parameters of the model, host arrays as nested dicts.
      base: where a checkpoint says the parameters are that it does not hold (`Program.base`).

    Raises:
      Invalid: the run has evaluations and several processes.
    """
    _check_evaluations(run)
    self.run = run
    self.workdir = workdir
    self.frozen = frozen
    self.validation = validation
    self.count = count
    self.rates = rates
    self.sum_losses = sum_losses
    self.params = params
    self.base = base
    # `abstract` has only the parameters that learn.
    self.params_learned = sum(math.prod(x.shape) for x in jax.tree.leaves(abstract['params']))
    self.checkpoints = Checkpoints(workdir / 'checkpoints', keep=run.keep_checkpoints)
    self._restore(abstract, stream)
    # The first process writes for all: their metrics are equal.
    writes = jax.process_index() == 0
    self.rows = metrics.Rows(workdir, self.start) if writes else metrics.NoRows()
    self.progress = metrics.Progress(run.steps, self.start, count.flops_6n_with_head, stream)
    self.last_evaluation: dict[str, float] | None = None
    self.window: list[dict] = []  # metrics of the steps since the last row
    self.clock = time.monotonic()  # when the window began
    self.began = self.clock - self.seconds  # as if the run had never stopped

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

  # When to save and to evaluate.

  def saves_at(self, step: int) -> bool:
    every = self.run.checkpoint_every
    return step == self.run.steps or (every is not None and step % every == 0)

  def evaluates_at(self, step: int) -> bool:
    every = self.run.eval_every
    return step == self.run.steps or (every is not None and step % every == 0)

  def pauses_at(self, step: int) -> bool:
    """Returns whether training waits after this step to save or to evaluate."""
    return self.saves_at(step) or self.evaluates_at(step)

  # After every step.

  def log_step(self, step: int, scalars: dict) -> bool:
    """Fetches the metrics of a step and logs them.

    Args:
      step: the number of the step, from 1.
      scalars: metrics of `Program.step`, on the device. This waits for them.

    Returns:
      False if the loss or the norm of the gradient is not finite.
    """
    scalars = {name: float(value) for name, value in jax.device_get(scalars).items()}
    self.window.append(scalars)
    self.tokens += int(scalars['tokens'])
    finite = math.isfinite(scalars['loss']) and math.isfinite(scalars['grad_norm'])
    if step % self.run.log_every == 0 or step == self.run.steps or not finite:
      self._log(step)
    return finite

  def _log(self, step: int) -> None:
    """Writes a row of metrics: means over the steps since the last row."""
    time_now = time.monotonic()
    window = self.window
    seconds = max(time_now - self.clock, 1e-9)
    row = {'step': step, 'tokens': self.tokens}
    for name in window[0]:
      if name != 'tokens':
        row[name] = sum(scalars[name] for scalars in window) / len(window)
    row['learning_rate'] = float(self.rates[step - 1])
    row['tokens_per_second'] = sum(scalars['tokens'] for scalars in window) / seconds
    row['flops_per_second'] = row['tokens_per_second'] * self.progress.flops_per_token
    self.window = []
    self.clock = time_now
    self.rows.write(row)
    self.progress.show(row, last=step == self.run.steps)

  def pause(self, step: int, state: dict, save: bool) -> bool:
    """Between two steps: evaluates if an evaluation is due, and saves `state` if `save` is True.

    Returns:
      False if the validation loss is not finite. Then nothing is saved.
    """
    began = time.monotonic()
    if self.evaluates_at(step):
      self._validate(step)
      if not math.isfinite(self.last_evaluation['loss']):
        return False
      # `row` does the evaluations of the last step, after its checkpoint is saved.
      if step < self.run.steps:
        columns = self._evaluation_columns(step)
        if columns:
          self.rows.write({'step': step, 'tokens': self.tokens, **columns})
    if save:
      # Before the checkpoint: a run that resumes from it must find all earlier rows.
      self.rows.flush()
      meta = {'tokens': self.tokens, 'seconds': time.monotonic() - self.began}
      if isinstance(self.frozen, Opened):
        meta['experience'] = self.frozen.state()
      if self.base is not None:
        meta['base'] = self.base
      self.checkpoints.save(step, state, meta)
    self.clock += time.monotonic() - began  # tokens per second count training alone
    return True

  def _validate(self, step: int) -> None:
    """Evaluates on the validation stream, writes a row, and prints the losses."""
    evaluation = self.evaluate()
    self.last_evaluation = evaluation
    named = {f'validation/{name}': value for name, value in evaluation.items()}
    self.rows.write({'step': step, 'tokens': self.tokens, **named})
    message = f'step {step:,}: validation loss {evaluation["loss"]:.4f}'
    if 'bits_per_byte' in evaluation:
      message += f' nats/token, {evaluation["bits_per_byte"]:.4f} bits/byte'
    for name in self.run.loss.evaluation.reports:
      message += f', {name} {evaluation[name]:.4f}'
    self.progress.say(message)

  def _evaluation_columns(self, step: int) -> dict[str, float | int | str]:
    """Does the run's evaluations that are due at a step; returns their columns."""
    last = step == self.run.steps
    due = [evaluation for evaluation in self.run.evaluations if last or evaluation.during]
    if not due:
      return {}
    params = self.params()
    folder = self.workdir / 'evaluation'
    columns = {}
    for evaluation in due:
      columns |= evaluation.columns(self.run, params, step, folder, self.progress.say)
    return columns

  def evaluate(self) -> dict[str, float]:
    """Returns means over the whole validation stream, by name.

    These are the loss, the other terms and counts, and 'bits_per_byte' if the loss is in nats. Of a mixture
    also '<part>/loss' of each of its parts.
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

  # The end of the run.

  def row(self, step: int, status: str) -> dict:
    """Returns the run's row of results: N, D and C by every convention, the loss, the hyper-parameters.

    Args:
      step: the last step.
      status: 'finished', or 'nan' for a loss or a gradient that was not finite. A run whose validation loss is
        not finite has not finished, either.
    """
    evaluation = {}
    columns = {}
    if status == 'finished':
      evaluation = self.last_evaluation or self.evaluate()
      if math.isfinite(evaluation['loss']):
        columns = self._evaluation_columns(step)
      else:
        status, evaluation = 'nan', {}
    if status == 'nan':
      self.progress.say(
        f'step {step:,}: the loss or the norm of its gradient is not finite; stopped. '
        'Try a lower learning rate. Earlier checkpoints stay.'
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
      # A finished run that is started again trains no longer.
      'seconds': self.seconds if self.start == step else time.monotonic() - self.began,
      'devices': jax.device_count(),
      **columns,
    }

  def write_row(self, row: dict) -> None:
    storage.write_atomic(self.workdir / 'run.json', json.dumps(row, indent=1) + '\n')

  def close(self) -> None:
    self.checkpoints.close()
    self.rows.close()


def _check_evaluations(run: Run) -> None:
  if run.evaluations and jax.process_count() > 1:
    why = (
      'one process must evaluate the whole model, and this run has several: leave the evaluations out, and '
      'evaluate its checkpoints afterwards (research.evaluate --workdir).'
    )
    raise Invalid(Run, 'evaluations', why)
