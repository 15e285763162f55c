"""A registered seqio task's examples, and seqio's own metrics of a model's answers to them.

A process of its own, because TensorFlow is nowhere else. `research.evaluation.seqio_tasks` starts it twice:

    python -m tasks.evaluating examples --module=M --task=T --split=S --examples=N --out=FILE
    python -m tasks.evaluating measure  --module=M --task=T --split=S --examples=N --answers=FILE --out=FILE
"""

import argparse
import importlib
import json
import pathlib

import numpy as np
import seqio

from research.core import cli
from research.core.errors import UserError, did_you_mean, failure


def open_task(module: str, name: str, split: str) -> seqio.Task:
  """The task of somebody's module.

  Raises:
    UserError: the module cannot be imported; it has no such task, split or metric.
  """
  try:
    importlib.import_module(module)
  except Exception as error:  # the module is somebody else's
    raise UserError(f'Seqio.module: {module!r} cannot be imported: {failure(error)}.') from error
  names = seqio.TaskRegistry.names()
  if name not in names:
    hint = did_you_mean(name, names)
    raise UserError(f'Seqio.task: {module} registers no seqio task {name!r}.{hint}')
  task = seqio.get_mixture_or_task(name)
  if split not in task.splits:
    hint = did_you_mean(split, task.splits)
    raise UserError(f'Seqio.split: {name} has no split {split!r}.{hint}')
  if not (task.predict_metric_fns or task.score_metric_fns):
    raise UserError(f'Seqio.task: {name} has no metric_fns of predictions or scores.')
  return task


def make_evaluator(task: seqio.Task, split: str, examples: int) -> seqio.Evaluator:
  """seqio's evaluator of the first examples of a split, in their order."""
  two_sided = 'inputs' in task.output_features
  kind = seqio.EncDecFeatureConverter if two_sided else seqio.LMFeatureConverter
  return seqio.Evaluator(
    task.name, kind(pack=False), eval_split=split, num_examples=examples, shuffle=False
  )


def read_examples(task: seqio.Task, evaluator: seqio.Evaluator) -> list[dict]:
  """The text of every example's inputs and targets, decoded from the task's own tokens."""
  dataset = evaluator.cached_task_datasets[task.name].as_numpy_iterator()
  texts = []
  for example in dataset:
    text = {}
    for side in ('inputs', 'targets'):
      if side in task.output_features:
        vocabulary = task.output_features[side].vocabulary
        ids = [int(i) for i in example[side] if i not in (0, vocabulary.eos_id)]
        text[side] = vocabulary.decode(ids)
    texts.append({'inputs': '', **text})
  return texts


def measure(task: seqio.Task, evaluator: seqio.Evaluator, answers: dict) -> dict[str, float]:
  """seqio's metrics.

  Args:
    answers: 'texts', a prediction for each example; 'scores', a log-likelihood of each example's target. One of
      them may be missing where no metric of the task asks for it.
  """
  vocabulary = task.output_features['targets'].vocabulary

  # As a T5X model's: rows of one length, an end and padding behind each.
  ids = [[*vocabulary.encode(text), vocabulary.eos_id] for text in answers['texts']]
  longest = max(map(len, ids), default=0)

  def predict(dataset, model_feature_shapes=None):
    return [(i, np.pad(row, (0, longest - len(row)))) for i, row in enumerate(ids)]

  def score(dataset, model_feature_shapes=None):
    return list(enumerate(answers['scores']))

  metrics, _ = evaluator.evaluate(compute_metrics=True, step=0, predict_fn=predict, score_fn=score)
  values = metrics.result() if hasattr(metrics, 'result') else metrics
  flat = {}
  for key, value in values[task.name].items():
    value = getattr(value, 'value', value)  # seqio's Scalar
    if np.ndim(value) == 0 and np.issubdtype(np.asarray(value).dtype, np.number):
      flat[key] = float(value)
  return flat


def main(argv=None) -> None:
  parser = argparse.ArgumentParser(prog='python -m tasks.evaluating')
  parser.add_argument('what', choices=('examples', 'measure'))
  for name in ('module', 'task', 'split', 'out'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--examples', type=int, required=True)
  parser.add_argument('--answers')
  flags = parser.parse_args(argv)
  task = open_task(flags.module, flags.task, flags.split)
  evaluator = make_evaluator(task, flags.split, flags.examples)
  if flags.what == 'examples':
    result = {
      'examples': read_examples(task, evaluator),
      'predicts': bool(task.predict_metric_fns),
      'scores': bool(task.score_metric_fns),
    }
  else:
    result = measure(task, evaluator, json.loads(pathlib.Path(flags.answers).read_text()))
  pathlib.Path(flags.out).write_text(json.dumps(result))


if __name__ == '__main__':
  cli.run(main)
