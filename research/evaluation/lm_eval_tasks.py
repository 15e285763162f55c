"""Tasks of EleutherAI's lm-eval (extra `eval`): its prompts, metrics and filters, with this project's engine.

lm-eval asks a model three things, which are requests of ours; so every one of its tasks runs, a user's own YAML
files among them. Their data come from where the YAML says: local files, or the Hugging Face hub.
"""

import dataclasses
import logging
import time

from research.core.errors import Invalid, UserError, did_you_mean
from research.evaluation.engine import Engine
from research.evaluation.requests import (
  Failed,
  GenerateUntil,
  LogLikelihood,
  Request,
  RollingLogLikelihood,
)
from research.evaluation.task import Task

# lm-eval's own default where a task sets none.
MAX_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEval(Task):
  """One task of lm-eval, or a group of them.

  Attributes:
    task: its name, as `lm_eval ls tasks` lists it or a YAML file in `folder` gives it.
    folder: a folder with YAML files of more tasks; None for lm-eval's own alone.
    shots: solved examples before each question; None is the task's own number.
    examples: at most so many documents; None for all.
  """

  task: str
  folder: str | None = None
  shots: int | None = None
  examples: int | None = None

  def __post_init__(self):
    if self.examples is not None:
      super().__post_init__()
    if self.shots is not None and self.shots < 0:
      raise Invalid(LmEval, 'shots', f'{self.shots!r} must be 0 or more.')

  @property
  def name(self) -> str:
    return f'lm-eval-{self.task}' + ('' if self.shots is None else f'-{self.shots}shot')

  def items(self):
    raise NotImplementedError('lm-eval makes the requests of this task itself')

  def measure(self, item, answers):
    raise NotImplementedError('lm-eval judges the answers of this task itself')

  def run(self, engine: Engine, progress=lambda done, of: None) -> dict:
    """As `Task.run`. lm-eval's metrics are means over all documents, so one failed request is an error."""
    began = time.monotonic()
    try:
      model = make_model(engine, progress)
      results = evaluate(self, model)
    except UserError as error:
      return {'error': str(error)}
    metrics = {}
    for task, values in results['results'].items():
      label = '' if len(results['results']) == 1 else f'{task}/'
      for key, value in values.items():
        metric, _, rule = key.partition(',')
        if rule and isinstance(value, int | float):
          suffix = '' if rule == 'none' else f':{rule}'
          metrics[f'{label}{metric}{suffix}'] = float(value)
    return {
      'metrics': metrics,
      'items': sum(count['effective'] for count in results['n-samples'].values()),
      'failed': 0,
      'cut': model.cut,
      'reasons': {},
      'requests': model.requests,
      'seconds': time.monotonic() - began,
      'lm_eval': {'versions': results['versions'], 'shots': results['n-shot']},
    }


def evaluate(task: LmEval, model) -> dict:
  """What `lm_eval.simple_evaluate` gives for a task.

  Raises:
    UserError: lm-eval is not installed, has no such task, or cannot get its data.
  """
  lm_eval, _ = import_lm_eval()
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=task.folder)
  if task.task not in manager.all_tasks:
    raise UserError(
      f'lm-eval has no task {task.task!r}.{did_you_mean(task.task, manager.all_tasks)}'
    )
  try:
    return lm_eval.simple_evaluate(
      model,
      tasks=[task.task],
      num_fewshot=task.shots,
      limit=task.examples,
      task_manager=manager,
      bootstrap_iters=0,
      random_seed=task.seed,
      fewshot_random_seed=1234 + task.seed,
      log_samples=True,
    )
  except (OSError, ValueError) as error:  # a hub that cannot be reached, a file that is not there
    if isinstance(error, UserError):
      raise
    raise UserError(f'lm-eval cannot run {task.task}: {str(error).splitlines()[0]}') from error


def import_lm_eval():
  """(the module, its LM class).

  Raises:
    UserError: it is not installed.
  """
  try:
    import lm_eval
    from lm_eval.api.model import LM
  except ImportError as error:
    raise UserError(f'lm-eval is needed: uv sync --extra eval ({error}).') from None
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  return lm_eval, LM


def make_model(engine: Engine, progress=lambda done, of: None):
  """The engine as a model of lm-eval, `lm_eval.api.model.LM`."""
  _, base = import_lm_eval()

  class Model(base):
    """Answers lm-eval's requests with an `Engine`.

    Attributes:
      requests: how many were asked.
      cut: how many of them were cut on the left.
    """

    def __init__(self):
      super().__init__()
      self.requests = self.cut = 0

    def ask(self, requests: list[Request]) -> list:
      answers = engine.answer(requests, progress)
      self.requests += len(requests)
      failures = [answer.reason for answer in answers if isinstance(answer, Failed)]
      if failures:
        raise UserError(
          f'{len(failures)} of {len(answers)} requests failed; the first: {failures[0]}'
        )
      self.cut += sum(answer.cut > 0 for answer in answers)
      return answers

    def loglikelihood(self, requests, disable_tqdm=False):
      answers = self.ask([LogLikelihood(*request.args) for request in requests])
      return [(answer.nats, answer.greedy) for answer in answers]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      answers = self.ask([RollingLogLikelihood(*request.args) for request in requests])
      return [answer.nats for answer in answers]

    def generate_until(self, requests, disable_tqdm=False):
      return [answer.text for answer in self.ask([to_request(*r.args) for r in requests])]

  return Model()


def to_request(context: str, options: dict) -> GenerateUntil:
  """lm-eval's request for a text as ours.

  Raises:
    UserError: it asks for anything but greedy choice.
  """
  options = dict(options)
  until = options.pop('until', ())
  max_tokens = options.pop('max_gen_toks', MAX_TOKENS)
  if options.pop('do_sample', False) and options.pop('temperature', 1.0) > 0:
    raise UserError('this task samples its texts, and only greedy choice is done here.')
  options.pop('temperature', None)  # of no effect on a greedy choice
  if options:
    raise UserError(f'{next(iter(options))} of generation_kwargs is not understood here.')
  until = (until,) if isinstance(until, str) else tuple(until)
  return GenerateUntil(context, tuple(stop for stop in until if stop), max_tokens)
