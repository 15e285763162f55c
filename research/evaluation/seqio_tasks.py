"""Registered seqio tasks with `metric_fns`, as T5X evaluates them.

seqio makes the examples and computes the metrics in another process (`tasks.evaluating`), because no process of
research/ imports TensorFlow. Its Evaluator gets this model's answers in place of a T5X model's.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time

from research.core.errors import UserError
from research.data.cache import child_environment
from research.evaluation.callbacks import Progress, no_progress
from research.evaluation.engine import Engine
from research.evaluation.requests import GenerateUntil, Generation, Likelihood, LogLikelihood
from research.evaluation.task import BaseTask, check_none_failed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seqio(BaseTask):
  """A seqio task, with its metrics of predictions and of scores.

  The context is the task's `inputs` as text, the continuation its `targets`. The model's own tokenizer encodes
  both.

  Attributes:
    task: its name in seqio's registry.
    module: the module that registers it.
    split: of its examples.
    until, max_tokens: where a prediction ends, as in `requests.GenerateUntil`.
    between: a text between inputs and targets, for a decoder that was trained with one.
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

  def run(self, engine: Engine, progress: Progress = no_progress) -> dict:
    """See `BaseTask.run`. seqio's metrics are of all examples, so one failed request is an error."""
    start = time.monotonic()
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
      check_none_failed(answers, 'seqio')
      texts = [answer.text for answer in answers if isinstance(answer, Generation)]
      scores = [answer.nats for answer in answers if isinstance(answer, Likelihood)]
      metrics = self._seqio('measure', {'texts': texts, 'scores': scores})
    except UserError as error:
      return {'error': str(error)}
    return self.make_result(
      metrics,
      items=len(data['examples']),
      requests=len(requests),
      start=start,
      cut=sum(answer.cut > 0 for answer in answers),
    )

  def _seqio(self, action: str, answers: dict | None = None) -> dict:
    """What `tasks.evaluating` writes for an action, 'examples' or 'measure'.

    Raises:
      UserError: the module, the task or its split does not exist, or seqio fails.
    """
    with tempfile.TemporaryDirectory(prefix='isoflop-') as folder:
      answers_path = pathlib.Path(folder) / 'answers.json'
      out = pathlib.Path(folder) / 'out.json'
      answers_path.write_text(json.dumps(answers))
      command = [
        sys.executable, '-m', 'tasks.evaluating', action, f'--module={self.module}',
        f'--task={self.task}', f'--split={self.split}', f'--examples={self.examples}',
        f'--answers={answers_path}', f'--out={out}',
      ]  # fmt: skip
      process = subprocess.run(command, capture_output=True, text=True, env=child_environment())
      # The last line is the error; warnings of TensorFlow come before it.
      message = (process.stderr.strip().splitlines() or ['no message'])[-1]
      if process.returncode == 2:  # a UserError there
        raise UserError(message.removeprefix('error: '))
      if process.returncode:
        raise UserError(f'seqio cannot do {action} of {self.task}: {message}')
      return json.loads(out.read_text())
