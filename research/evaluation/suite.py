"""A suite of tasks over one checkpoint. Its answers are kept, so that a suite that was stopped goes on."""

import collections
import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Callable

import jax
from flax import nnx

from research.core import storage
from research.core.describe import describe
from research.core.errors import Invalid
from research.data.encoding import Encoding, make_encoding
from research.data.vocabularies import Vocabulary
from research.evaluation import loading
from research.evaluation.callbacks import TaskProgress, no_task_progress
from research.evaluation.engine import Engine
from research.evaluation.folder_encoding import FolderEncoding
from research.evaluation.kept import KeptAnswers
from research.evaluation.rows import Settings
from research.evaluation.task import BaseTask
from research.parallel.axes import axis_size
from research.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """The tasks that a checkpoint is evaluated on, and the settings of all of them.

  Attributes:
    tasks: with different names.
    batch_size: rows of a batch, over all devices.
    length: the most tokens of a row; None is the length that the run trained on.
    begin: the id in front of every row, None for none. 'own' is the one that the model was trained with: 0 for
      a run of this project; for any other model, the one that its tokenizer puts in front.
    too_long, stride: see `rows.Settings`.
    vocabulary: the tokenizer; None is the model's own.
    template: a file with a chat template, for tasks that are conversations; None is the model's own.
    name: of the folder of the results, where a run evaluates itself.
    during: whether a run that evaluates itself does so at each of its evaluations, and not only at its end.
  """

  tasks: tuple[BaseTask, ...]
  batch_size: int = 16
  length: int | None = None
  begin: int | str | None = 'own'
  too_long: str = 'refuse'
  stride: int | None = None
  vocabulary: Vocabulary | None = None
  template: str | None = None
  name: str = 'suite'
  during: bool = False

  def __post_init__(self):
    object.__setattr__(self, 'tasks', tuple(self.tasks))  # gin may bind a list
    if not self.tasks or not all(isinstance(task, BaseTask) for task in self.tasks):
      raise Invalid(Suite, 'tasks', 'must be one or more tasks: (@corpus_tasks.Perplexity(),).')
    if self.batch_size < 1:
      raise Invalid(Suite, 'batch_size', f'{self.batch_size!r} must be positive.')
    if self.length is not None and self.length < 2:
      raise Invalid(Suite, 'length', f'{self.length!r} must be 2 or more.')
    if isinstance(self.begin, str) and self.begin != 'own':
      raise Invalid(Suite, 'begin', f"{self.begin!r} is not an id, None or 'own'.")
    if not re.fullmatch(r'[\w.-]+', self.name):
      why = f'{self.name!r} names a folder: use letters, digits, dots and hyphens.'
      raise Invalid(Suite, 'name', why)
    counts = collections.Counter(task.name for task in self.tasks)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
      raise Invalid(Suite, 'tasks', f'two of them are named {repeated[0]}.')

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of its tasks. No other suite of the run may have one of them (`training.evaluations`)."""
    return tuple(task.name for task in self.tasks)

  def columns(self, run: Run, params: dict, step: int, folder, log: Callable[[str], None]) -> dict:
    """Evaluates a run that trains now; see `training.evaluations.Evaluation`."""
    with loading.mesh_for(run.model).use(jax.local_devices()):
      model = loading.abstract_model(run.model)

      def read_params() -> dict:
        return loading.on_devices(run.model, params)

      engine, identity = make_engine(self, model, read_params, run, None)
      identity |= {'run': run.identity(), 'step': step}
      summary = run_suite(self, engine, folder / self.name / f'step-{step}', identity, log)
    return {name: value for name, value in summary['row'].items() if name.startswith('eval/')}


def make_engine(
  suite: Suite,
  model: nnx.Module,
  read_params: Callable[[], dict],
  run: Run | None,
  tokenizer: pathlib.Path | None,
) -> tuple[Engine, dict]:
  """The engine that answers a suite's requests under the mesh in use.

  Args:
    model: with shapes in place of arrays.
    read_params: returns the parameters. It is called last, when everything else is known to fit.
    run: that trained the model; None for a model that was not trained here.
    tokenizer: the folder of such a model's tokenizer.

  Returns:
    (engine, what its answers depend on besides the parameters, as JSON values).

  Raises:
    UserError: the tokenizer is not the model's, or the batch does not fit the devices.
  """
  architecture = loading.architecture_of(run, model)  # refuses an encoder
  vocabulary = suite.vocabulary
  if vocabulary is None and run:
    vocabulary = loading.vocabulary_of(run)
  encoding = make_encoding(vocabulary) if vocabulary else FolderEncoding(tokenizer)
  # An id beyond the model's vocabulary would be looked up as another one, without an error.
  if encoding.size > model.vocab:
    why = f'it has ids up to {encoding.size - 1}, and the model has {model.vocab} logits.'
    raise Invalid(Suite, 'vocabulary', why)
  if suite.batch_size % axis_size('batch'):
    why = f'{suite.batch_size} rows cannot be divided by the {axis_size("batch")} devices.'
    raise Invalid(Suite, 'batch_size', why)
  settings = _settings(suite, architecture, run, model, encoding)
  identity = {
    'vocabulary': type(vocabulary or encoding).__name__,
    'template_sha256': _sha256(settings.template),
    **vars(settings),
  }
  engine = Engine(nnx.graphdef(model), read_params(), encoding, settings, suite.batch_size)
  return engine, identity


def _settings(
  suite: Suite, architecture: str, run: Run | None, model: nnx.Module, encoding: Encoding
) -> Settings:
  """The suite's settings; what it leaves open is the model's own, by its run or its folder."""
  begin = 0 if suite.begin == 'own' else suite.begin
  start = None
  template = suite.template
  if isinstance(encoding, FolderEncoding):
    if suite.begin == 'own':
      begin = encoding.decoder_start if architecture == 'encoder_decoder' else encoding.begin
    start = encoding.start
    template = template or encoding.template
  length = suite.length or loading.length_of(run, model)
  try:
    return Settings(
      length=length,
      architecture=architecture,
      begin=begin,
      start=start,
      template=template,
      too_long=suite.too_long,
      stride=suite.stride,
    )
  except Invalid as error:  # the suite is what was written
    raise Invalid(Suite, error.field, error.why) from None


def _sha256(template: str | None) -> str | None:
  """The hash of a chat template's text: the numbers change with the text, not with the file's name."""
  if template is None:
    return None
  try:
    return hashlib.sha256(pathlib.Path(template).expanduser().read_bytes()).hexdigest()
  except OSError as error:
    raise Invalid(Suite, 'template', f'{template} cannot be read ({error.strerror}).') from error


def run_suite(
  suite: Suite,
  engine: Engine,
  folder: pathlib.Path,
  identity: dict,
  log: Callable[[str], None] = print,
  progress: TaskProgress = no_task_progress,
) -> dict:
  """Runs the tasks that are not finished; writes results.json and row.json of all of them.

  A task whose data are missing gives an error in place of metrics, and the others go on.

  Args:
    identity: what the results depend on, as JSON values: checkpoint, step and settings. A finished task is not
      run again if it was run with the same.

  Returns:
    what results.json says.
  """
  storage.make(folder)
  results = {
    task.name: run_task(task, engine, folder, identity, log, progress) for task in suite.tasks
  }
  return write_summary(folder, identity, results)


def run_task(
  task: BaseTask,
  engine: Engine,
  folder: pathlib.Path,
  identity: dict,
  log: Callable[[str], None] = print,
  progress: TaskProgress = no_task_progress,
) -> dict:
  """The result of one task of `run_suite`, which has the same arguments."""
  name = task.name.replace('/', '-')  # lm-eval's names may have slashes
  path = folder / f'{name}.json'
  answers_path = folder / f'{name}.answers.jsonl'
  # Every field of the task is in its description, so that another value runs it again.
  key = {**identity, 'task': describe(task, 0)}
  result = _finished(path, key)
  if result is None:
    answers = KeptAnswers(engine, answers_path, key)
    if answers.resumed:
      log(f'{task.name}: {answers.resumed:,} earlier answers are kept')
    result = task.run(answers, functools.partial(progress, task.name))
    # A task that could not run is tried again the next time.
    if 'error' not in result:
      storage.write_atomic(path, json.dumps({'of': key, **result}, indent=1) + '\n')
      answers_path.unlink()
  log(show(task.name, result))
  return result


def write_summary(folder: pathlib.Path, identity: dict, results: dict[str, dict]) -> dict:
  """Writes results.json and row.json of a checkpoint's tasks; returns what results.json says."""
  summary = {**identity, 'tasks': results, 'row': row_of(identity, results)}
  storage.write_atomic(folder / 'results.json', json.dumps(summary, indent=1) + '\n')
  storage.write_atomic(folder / 'row.json', json.dumps(summary['row'], indent=1) + '\n')
  return summary


def _finished(path: pathlib.Path, key: dict) -> dict | None:
  """The result of a task that was finished with the same checkpoint, fields and settings; None without one."""
  try:
    result = json.loads(path.read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return None
  return result if result.pop('of', None) == key else None


def row_of(identity: dict, results: dict[str, dict]) -> dict:
  """The results as one flat row: a column eval/<task>/<metric> each, and the items that failed or were cut."""
  row = dict(identity)
  for name, result in results.items():
    if 'error' in result:
      row[f'eval/{name}/error'] = result['error']
      continue
    row |= {f'eval/{name}/{metric}': value for metric, value in result['metrics'].items()}
    row |= {f'eval/{name}/{key}': result[key] for key in ('items', 'failed', 'cut')}
    row |= {f'eval/{name}/{key}': str(value) for key, value in result.get('settings', {}).items()}
  return row


def show(name: str, result: dict) -> str:
  """A task's result in a line. What was cut or failed takes another line each."""
  if 'error' in result:
    return f'{name}: not run: {result["error"]}'
  metrics = ', '.join(
    f'{key} {value:.4g}' for key, value in result['metrics'].items() if '_stderr' not in key
  )
  lines = [f'{name}: {metrics or "no item has an answer"} ({result["items"]} items)']
  if result['cut']:
    lines.append(f'  {result["cut"]} items were cut on the left to fit the length')
  for reason, count in result['reasons'].items():
    lines.append(f'  {count} items failed: {reason}')
  return '\n'.join(lines)
