"""Tasks of EleutherAI's lm-eval (extra `eval`): its prompts, metrics and filters, with this project's engine.

lm-eval has three kinds of request, and this project's engine answers all of them. So every task of lm-eval
runs, a user's own YAML files included. The data come from where the YAML says: local files, or the Hugging Face
hub.
"""

import collections
import dataclasses
import time

from research.core.errors import Invalid, UserError, did_you_mean, first_line
from research.evaluation.callbacks import Progress, no_progress
from research.evaluation.engine import Engine
from research.evaluation.lm_eval_model import NO_TEMPLATE, import_lm_eval, make_model
from research.evaluation.task import BaseTask, standard_error


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmEval(BaseTask):
  """One task of lm-eval, or a group of them.

  Attributes:
    task: its name, as `lm_eval ls tasks` lists it or a YAML file in `folder` gives it.
    folder: a folder with YAML files of more tasks; None for lm-eval's own tasks only.
    shots: solved examples before each question; None is the task's own number.
    examples: the most documents of a task; None for all.
    chat: whether a question is a conversation by the model's chat template, whose turns are the shots.
    system: the system message of the conversation; None for none.
    runs_code: whether the task may run the model's programs on this machine, without a sandbox.
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

  def run(self, engine: Engine, progress: Progress = no_progress) -> dict:
    """See `BaseTask.run`. lm-eval's metrics are means over all documents, so one failed request is an error."""
    start = time.monotonic()
    try:
      model = make_model(engine, progress)
      results = evaluate(self, model)
    except UserError as error:
      return {'error': str(error)}
    metrics = read_metrics(results['results'])
    for task, samples in results['samples'].items():
      label = '' if len(results['results']) == 1 else f'{task}/'
      metrics |= {f'{label}{key}': value for key, value in standard_errors(samples).items()}
    settings = {
      'template': engine.settings.template if self.chat else None,
      'shots': dict(results['n-shot']),
      'versions': dict(results['versions']),
    }
    return self.make_result(
      metrics,
      items=sum(count['effective'] for count in results['n-samples'].values()),
      requests=model.requests,
      start=start,
      cut=model.cut,
      settings=settings,
    )


def read_metrics(results: dict) -> dict[str, float]:
  """lm-eval's results as a flat dict.

  lm-eval names a metric 'metric,filter': 'acc,none' becomes 'acc', 'exact_match,strict' becomes
  'exact_match:strict'.
  """
  metrics = {}
  for task, values in results.items():
    label = '' if len(results) == 1 else f'{task}/'
    for key, value in values.items():
      metric, _, filter_name = key.partition(',')
      # Keys without a filter are no metrics (alias, sample counts).
      if filter_name and isinstance(value, int | float):
        suffix = '' if filter_name == 'none' else f':{filter_name}'
        metrics[f'{label}{metric}{suffix}'] = float(value)
  return metrics


def standard_errors(samples: list[dict]) -> dict[str, float]:
  """The standard error of the mean of each metric that is one number per document.

  lm-eval's own are left out (`bootstrap_iters=0`), because its bootstrap costs more than the requests.
  """
  values = collections.defaultdict(list)
  for sample in samples:
    suffix = '' if sample['filter'] == 'none' else f':{sample["filter"]}'
    for metric in sample['metrics']:
      if isinstance(sample.get(metric), int | float):
        values[f'{metric}{suffix}'].append(float(sample[metric]))
  return {
    f'{metric}_stderr': standard_error(numbers)
    for metric, numbers in values.items()
    if len(numbers) > 1
  }


def evaluate(task: LmEval, model) -> dict:
  """What `lm_eval.simple_evaluate` gives for a task.

  Raises:
    UserError: lm-eval is not installed, has no such task, or cannot get its data.
  """
  lm_eval = import_lm_eval()
  if task.chat and model.chat_template(True) is None:
    raise UserError(NO_TEMPLATE)
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
      fewshot_random_seed=1234 + task.seed,  # 1234 is lm-eval's default
      log_samples=True,
      apply_chat_template=task.chat,
      fewshot_as_multiturn=task.chat,
      system_instruction=task.system,
      confirm_run_unsafe_code=task.runs_code,
    )
  # The hub cannot be reached, a file is missing, or a YAML file is wrong.
  except (OSError, ValueError, ImportError, KeyError) as error:
    if isinstance(error, UserError):
      raise
    raise UserError(f'lm-eval cannot run {task.task}: {first_line(error)}.') from error
