"""A suite: tasks over one checkpoint. What was answered is kept, so that a suite that was stopped goes on."""

import collections
import dataclasses
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
from research.data.encoding import make_encoding
from research.data.vocabularies import Vocabulary
from research.evaluation import loading
from research.evaluation.engine import Engine
from research.evaluation.folder_encoding import FolderEncoding
from research.evaluation.kept import KeptAnswers
from research.evaluation.rows import Settings
from research.evaluation.task import Task
from research.parallel.axes import axis_size
from research.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """What is asked of a checkpoint.

  Attributes:
    tasks: each of another name.
    batch_size: rows of a batch, over all devices.
    length: the most tokens of a row; None is what the run trained on.
    begin: the id in front of every row, None for none; 'own' is what the model was trained with: 0 of a run of
      this project, of any other model what its tokenizer puts in front.
    too_long, stride: as in `rows.Settings`.
    vocabulary: the tokenizer; None is the model's own.
    template: a file with a chat template, for tasks that are conversations; None is the model's own.
    name: of the folder of its results, where a run evaluates itself.
    during: whether a run that evaluates itself does so at each of its evaluations, and not at its end alone.
  """

  tasks: tuple[Task, ...]
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
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
      raise Invalid(Suite, 'tasks', 'must be one or more tasks: (@corpus_tasks.Perplexity(),).')
    if self.batch_size < 1:
      raise Invalid(Suite, 'batch_size', f'{self.batch_size!r} must be positive.')
    if isinstance(self.begin, str) and self.begin != 'own':
      raise Invalid(Suite, 'begin', f"{self.begin!r} is not an id, None or 'own'.")
    if not re.fullmatch(r'[\w.-]+', self.name):
      why = f'{self.name!r} names a folder: letters, digits, dots and hyphens.'
      raise Invalid(Suite, 'name', why)
    counts = collections.Counter(task.name for task in self.tasks)
    if twice := [name for name, count in counts.items() if count > 1]:
      raise Invalid(Suite, 'tasks', f'two of them are named {twice[0]}.')

  @property
  def labels(self) -> tuple[str, ...]:
    """The names of its tasks, which no other suite of a run may have (`training.evaluations`)."""
    return tuple(task.name for task in self.tasks)

  def columns(self, run: Run, params: dict, step: int, folder, log: Callable[[str], None]) -> dict:
    """Evaluates a run of now; see `training.evaluations.Evaluation`."""
    with loading.mesh_for(run.model).use(jax.local_devices()):
      model = loading.abstract_model(run.model)
      engine, identity = make_engine(self, model, lambda: loading.put(run.model, params), run, None)
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
  """The engine that answers a suite's requests, and what its answers depend on, as JSON values.

  Args:
    model: with shapes in place of arrays.
    read_params: called when everything else is known to fit.
    run: that trained the model; None for another's.
    tokenizer: the folder of another's.

  Raises:
    UserError: the tokenizer is not the model's, or the batch does not fit the devices. Under the mesh in use.
  """
  architecture = loading.architecture_of(run, model)
  begin, start, template = suite.begin, None, suite.template
  vocabulary = suite.vocabulary
  if vocabulary is None and run:
    vocabulary = loading.vocabulary_of(run)
  if vocabulary:
    encoding = make_encoding(vocabulary)
    begin = 0 if begin == 'own' else begin
  else:
    encoding = FolderEncoding(tokenizer)
    if begin == 'own':
      begin = encoding.decoder_start if architecture == 'encoder_decoder' else encoding.begin
    start, template = encoding.start, template or encoding.template
  if encoding.size > model.vocab:
    why = f'it has ids up to {encoding.size - 1}, and the model has {model.vocab} logits.'
    raise Invalid(Suite, 'vocabulary', why)
  if suite.batch_size % axis_size('batch'):
    why = f'{suite.batch_size} rows cannot be divided by the {axis_size("batch")} devices.'
    raise Invalid(Suite, 'batch_size', why)
  settings = Settings(
    length=suite.length or loading.length_of(run),
    architecture=architecture,
    begin=begin,
    start=start,
    template=template,
    too_long=suite.too_long,
    stride=suite.stride,
  )
  identity = {
    'vocabulary': type(vocabulary or encoding).__name__,
    'template_sha256': _sha256(template),
    **vars(settings),
  }
  engine = Engine(nnx.graphdef(model), read_params(), encoding, settings, suite.batch_size)
  return engine, identity


def _sha256(template: str | None) -> str | None:
  """Of the file of a chat template: the numbers change with what it says, and not with where it lies."""
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
  progress: Callable[[str, int, int], None] = lambda task, done, of: None,
) -> dict:
  """Runs the tasks that are not finished; returns, and writes to results.json, what all of them gave.

  Args:
    identity: what the results are of: checkpoint, step and settings, as JSON values. A finished task is kept
      only if it was done with the same; else it is done again.
    progress: called with a task's name, the rows that are done, and how many there are.

  A task whose data are missing gives an error in place of metrics, and the others go on.
  """
  storage.make(folder)
  results = {
    task.name: run_task(task, engine, folder, identity, log, progress) for task in suite.tasks
  }
  return write_summary(folder, identity, results)


def run_task(
  task: Task,
  engine: Engine,
  folder: pathlib.Path,
  identity: dict,
  log: Callable[[str], None] = print,
  progress: Callable[[str, int, int], None] = lambda task, done, of: None,
) -> dict:
  """The result of one task of `run_suite`, which has the same arguments."""
  name = task.name.replace('/', '-')
  path, kept = folder / f'{name}.json', folder / f'{name}.answers.jsonl'
  key = {**identity, 'task': describe(task, 0)}
  result = _finished(path, key)
  if result is None:
    answers = KeptAnswers(engine, kept, key)
    if answers.resumed:
      log(f'{task.name}: {answers.resumed:,} answers of before are kept')
    result = task.run(answers, lambda done, of: progress(task.name, done, of))
    if 'error' not in result:
      storage.write_atomic(path, json.dumps({'of': key, **result}, indent=1) + '\n')
      kept.unlink()
  log(show(task.name, result))
  return result


def write_summary(folder: pathlib.Path, identity: dict, results: dict[str, dict]) -> dict:
  """Writes results.json and row.json of a checkpoint's tasks; returns what results.json has."""
  summary = {**identity, 'tasks': results, 'row': row_of(identity, results)}
  storage.write_atomic(folder / 'results.json', json.dumps(summary, indent=1) + '\n')
  storage.write_atomic(folder / 'row.json', json.dumps(summary['row'], indent=1) + '\n')
  return summary


def _finished(path: pathlib.Path, key: dict) -> dict | None:
  """The result of a task that was finished for the same checkpoint, task and settings."""
  try:
    result = json.loads(path.read_text())
  except (FileNotFoundError, json.JSONDecodeError):
    return None
  return result if result.pop('of', None) == key else None


def row_of(identity: dict, results: dict[str, dict]) -> dict:
  """The results as one flat row: a column eval/<task>/<metric> each, with what failed and what was cut."""
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
  """A task's result in a line, its failures in more."""
  if 'error' in result:
    return f'{name}: not done: {result["error"]}'
  metrics = ', '.join(
    f'{key} {value:.4g}' for key, value in result['metrics'].items() if '_stderr' not in key
  )
  lines = [f'{name}: {metrics or "no item has an answer"} ({result["items"]} items)']
  if result['cut']:
    lines.append(f'  {result["cut"]} items were cut on the left to fit the length')
  for reason, count in result['reasons'].items():
    lines.append(f'  {count} items failed: {reason}')
  return '\n'.join(lines)
