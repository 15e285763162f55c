"""A suite: tasks over one checkpoint, each finished task kept, so that a suite that was stopped goes on."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Callable

from research.core import storage
from research.core.describe import describe
from research.core.errors import Invalid
from research.data.vocabularies import Vocabulary
from research.evaluation.engine import Engine
from research.evaluation.task import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """What is asked of a checkpoint.

  Attributes:
    tasks: each of another name.
    batch_size: rows of a batch, over all devices.
    length: the most tokens of a row; None is what the run trained on.
    begin: the id in front of every row, 0 as this project trains; None for a model trained without one.
    too_long, stride: as in `rows.Settings`.
    vocabulary: the tokenizer; None is the run's.
  """

  tasks: tuple[Task, ...]
  batch_size: int = 16
  length: int | None = None
  begin: int | None = 0
  too_long: str = 'refuse'
  stride: int | None = None
  vocabulary: Vocabulary | None = None

  def __post_init__(self):
    object.__setattr__(self, 'tasks', tuple(self.tasks))
    if not self.tasks or not all(isinstance(task, Task) for task in self.tasks):
      raise Invalid(Suite, 'tasks', 'must be one or more tasks: (@corpus_tasks.Perplexity(),).')
    if self.batch_size < 1:
      raise Invalid(Suite, 'batch_size', f'{self.batch_size!r} must be positive.')
    counts = collections.Counter(task.name for task in self.tasks)
    if twice := [name for name, count in counts.items() if count > 1]:
      raise Invalid(Suite, 'tasks', f'two of them are named {twice[0]}.')


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
  results = {}
  for task in suite.tasks:
    path = folder / f'{task.name}.json'
    key = {**identity, 'task': describe(task, 0)}
    result = _finished(path, key)
    if result is None:
      result = task.run(engine, lambda done, of, task=task: progress(task.name, done, of))
      if 'error' not in result:
        storage.write_atomic(path, json.dumps({'of': key, **result}, indent=1) + '\n')
    results[task.name] = result
    log(show(task.name, result))
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
