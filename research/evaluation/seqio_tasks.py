"""Registered seqio tasks with `metric_fns`: what a T5X user expects of an evaluation.

seqio makes the examples and computes the metrics, in a process of its own (`tasks.evaluating`): its Evaluator
is given this model's answers in place of a T5X model's.
"""

import collections
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from research.core.errors import UserError
from research.data.cache import child_environment
from research.evaluation.engine import Engine
from research.evaluation.requests import Failed, GenerateUntil, LogLikelihood
from research.evaluation.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seqio(Task):
  """A seqio task; its metrics of predictions and of scores.

  The context is the task's `inputs` as text and the continuation its `targets`, in the model's own tokenizer.

  Attributes:
    task: its name in seqio's registry.
    module: the module that registers it.
    split: of its examples.
    until, max_tokens: where a prediction ends.
    between: put between inputs and targets, for a decoder that was trained so.
  """

  task: str
  module: str
  split: str = 'validation'
  until: tuple[str, ...] = ()
  max_tokens: int = 64
  between: str = ''

  @property
  def name(self) -> str:
    return f'seqio-{self.task}-{self.split}'

  def items(self):
    raise NotImplementedError('seqio makes the examples of this task itself')

  def measure(self, item, answers):
    raise NotImplementedError('seqio computes the metrics of this task itself')

  def run(self, engine: Engine, progress=lambda done, of: None) -> dict:
    """As `Task.run`. seqio's metrics are of all examples, so one failed request is an error."""
    began = time.monotonic()
    try:
      data = self._seqio('examples')
      requests = []
      contexts = [example['inputs'] + self.between for example in data['examples']]
      if data['predicts']:
        requests += [GenerateUntil(text, tuple(self.until), self.max_tokens) for text in contexts]
      if data['scores']:
        targets = [example['targets'] for example in data['examples']]
        pairs = zip(contexts, targets, strict=True)
        requests += [LogLikelihood(context, target) for context, target in pairs]
      answers = engine.answer(requests, progress)
      failures = collections.Counter(a.reason for a in answers if isinstance(a, Failed))
      if failures:
        raise UserError(
          f'{failures.total()} of {len(answers)} requests failed, and seqio would average over them; the '
          f'most frequent reason: {failures.most_common(1)[0][0]}'
        )
      texts = [answer.text for answer in answers if hasattr(answer, 'text')]
      scores = [answer.nats for answer in answers if hasattr(answer, 'nats')]
      metrics = self._seqio('measure', {'texts': texts, 'scores': scores})
    except UserError as error:
      return {'error': str(error)}
    return {
      'metrics': metrics,
      'items': len(data['examples']),
      'failed': 0,
      'cut': sum(answer.cut > 0 for answer in answers),
      'reasons': {},
      'requests': len(requests),
      'seconds': time.monotonic() - began,
      'settings': self.settings(),
    }

  def _seqio(self, what: str, answers: dict | None = None) -> dict:
    """What `tasks.evaluating` writes.

    Raises:
      UserError: the task is not as this one says.
    """
    with tempfile.TemporaryDirectory(prefix='isoflop-') as folder:
      given, out = pathlib.Path(folder) / 'answers.json', pathlib.Path(folder) / 'out.json'
      given.write_text(json.dumps(answers))
      command = [
        sys.executable, '-m', 'tasks.evaluating', what, f'--module={self.module}', f'--task={self.task}',
        f'--split={self.split}', f'--examples={self.examples}', f'--answers={given}', f'--out={out}',
      ]  # fmt: skip
      done = subprocess.run(command, capture_output=True, text=True, env=child_environment())
      last = (done.stderr.strip().splitlines() or ['it said nothing'])[-1]
      if done.returncode == 2:
        raise UserError(last.removeprefix('error: '))
      if done.returncode:
        raise UserError(f'seqio cannot do {what} of {self.task}: {last}')
      return json.loads(out.read_text())
