"""Tasks of EleutherAI's lm-eval (extra `eval`): its prompts, metrics and filters, with this project's engine.

lm-eval asks a model three things, which are requests of ours; so every one of its tasks runs, a user's own YAML
files among them. Their data come from where the YAML says: local files, or the Hugging Face hub.
"""

import collections
import dataclasses
import math
import time

from research.core.errors import Invalid, UserError, did_you_mean, first_line
from research.evaluation.engine import Engine
from research.evaluation.lm_eval_model import import_lm_eval, make_model
from research.evaluation.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEval(Task):
  """One task of lm-eval, or a group of them.

  Attributes:
    task: its name, as `lm_eval ls tasks` lists it or a YAML file in `folder` gives it.
    folder: a folder with YAML files of more tasks; None for lm-eval's own alone.
    shots: solved examples before each question; None is the task's own number.
    examples: at most so many documents of a task; None for all.
    chat: whether questions are put as conversations, by the model's chat template; shots are turns of it.
    system: what the system says first; None for nothing.
    runs_code: whether the task may run the model's own programs here, outside of any sandbox.
  """

  task: str
  folder: str | None = None
  shots: int | None = None
  examples: int | None = None
  chat: bool = False
  system: str | None = None
  runs_code: bool = False

  def __post_init__(self):
    if self.examples is not None:
      super().__post_init__()
    if self.shots is not None and self.shots < 0:
      raise Invalid(LmEval, 'shots', f'{self.shots!r} must be 0 or more.')

  @property
  def name(self) -> str:
    shots = '' if self.shots is None else f'-{self.shots}shot'
    return f'lm-eval-{self.task}{shots}{"-chat" if self.chat else ""}'

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
    metrics = read_metrics(results['results'])
    for task, samples in results['samples'].items():
      label = '' if len(results['results']) == 1 else f'{task}/'
      metrics |= {f'{label}{key}': value for key, value in standard_errors(samples).items()}
    return {
      'metrics': metrics,
      'items': sum(count['effective'] for count in results['n-samples'].values()),
      'failed': 0,
      'cut': model.cut,
      'reasons': {},
      'requests': model.requests,
      'seconds': time.monotonic() - began,
      'settings': {
        'template': engine.settings.template if self.chat else None,
        'shots': dict(results['n-shot']),
        'versions': dict(results['versions']),
      },
    }


def read_metrics(results: dict) -> dict[str, float]:
  """lm-eval's results as a flat dict: 'acc,none' is 'acc', 'exact_match,strict' is 'exact_match:strict'."""
  metrics = {}
  for task, values in results.items():
    label = '' if len(results) == 1 else f'{task}/'
    for key, value in values.items():
      metric, _, rule = key.partition(',')
      if rule and isinstance(value, int | float):
        suffix = '' if rule == 'none' else f':{rule}'
        metrics[f'{label}{metric}{suffix}'] = float(value)
  return metrics


def standard_errors(samples: list[dict]) -> dict[str, float]:
  """Of each metric that is one number per document: the standard error of its mean."""
  values = collections.defaultdict(list)
  for sample in samples:
    suffix = '' if sample['filter'] == 'none' else f':{sample["filter"]}'
    for metric in sample['metrics']:
      if isinstance(sample.get(metric), int | float):
        values[f'{metric}{suffix}'].append(float(sample[metric]))
  errors = {}
  for metric, numbers in values.items():
    count = len(numbers)
    if count > 1:
      mean = sum(numbers) / count
      variance = sum((number - mean) ** 2 for number in numbers) / (count - 1)
      errors[f'{metric}_stderr'] = math.sqrt(variance / count)
  return errors


def evaluate(task: LmEval, model) -> dict:
  """What `lm_eval.simple_evaluate` gives for a task.

  Raises:
    UserError: lm-eval is not installed, has no such task, or cannot get its data.
  """
  lm_eval = import_lm_eval()
  if task.chat and model.chat_template(True) is None:
    raise UserError(
      'this model has no chat template: bind Suite.template to a file with one, or leave LmEval.chat out.'
    )
  manager = lm_eval.tasks.TaskManager(include_path=task.folder)
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
      apply_chat_template=task.chat,
      fewshot_as_multiturn=task.chat,
      system_instruction=task.system,
      confirm_run_unsafe_code=task.runs_code,
    )
  # A hub that cannot be reached, a file that is not there, a YAML file that says something wrong.
  except (OSError, ValueError, ImportError, KeyError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'lm-eval cannot run {task.task}: {first_line(error)}.') from error
