"""A registered seqio task's metrics are those of seqio's own Evaluator on the same predictions."""

import sys

import pytest

from research.evaluation.requests import Failed, GenerateUntil, Generation, Likelihood
from research.evaluation.seqio_tasks import Seqio
from tests.evaluation.scripted import Scripted

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # TensorFlow's own, at import

MODULE = """
import functools
import numpy as np
import seqio
import t5.evaluation.metrics as t5_metrics
import tensorflow as tf

PAIRS = [(f'say {word}', word) for word in ('the law', 'of loss', 'falls with', 'compute', 'and data')]

def dataset(split, shuffle_files=False, seed=None):
  inputs, targets = zip(*PAIRS)
  return tf.data.Dataset.from_tensor_slices({'inputs': list(inputs), 'targets': list(targets)})

def upper(text, example=None, is_target=False):
  return text.upper()

def mean_score(targets, scores):
  return {'mean_score': seqio.metrics.Scalar(float(np.mean(scores)))}

def add(name, postprocess_fn, metric_fns):
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(dataset, splits=('validation',)),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={
      side: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for side in ('inputs', 'targets')
    },
    postprocess_fn=postprocess_fn,
    metric_fns=metric_fns,
  )

add('my_words', None, [t5_metrics.bleu, t5_metrics.rouge, t5_metrics.sequence_accuracy, mean_score])
add('my_upper', upper, [t5_metrics.accuracy])
add('my_silent', None, [])
"""
ANSWERS = {'say the law': 'the law', 'say of loss': 'of', 'say falls with': 'falls with',
           'say compute': 'compute', 'say and data': 'data'}  # fmt: skip


def answer(request):
  if isinstance(request, GenerateUntil):
    return Generation(ANSWERS[request.context], 3, True)
  return Likelihood(-float(len(request.continuation)), 3, True)


@pytest.fixture
def module(tmp_path, monkeypatch):
  (tmp_path / 'my_seqio_tasks.py').write_text(MODULE)
  monkeypatch.syspath_prepend(tmp_path)
  yield 'my_seqio_tasks'
  sys.modules.pop('my_seqio_tasks', None)


def test_the_metrics_of_seqio_on_the_same_predictions(module):
  task = Seqio(task='my_words', module=module, examples=5)
  engine = Scripted(answer)
  result = task.run(engine)
  assert 'error' not in result, result
  assert (result['items'], engine.requests) == (5, 10)
  # The metrics straight from their functions, without seqio's Evaluator.
  import t5.evaluation.metrics as reference

  targets = [text.removeprefix('say ') for text in ANSWERS]
  predictions = list(ANSWERS.values())
  expected = {
    **reference.bleu(targets, predictions),
    **reference.rouge(targets, predictions),
    **reference.sequence_accuracy(targets, predictions),
    'mean_score': -sum(map(len, targets)) / 5,
  }
  assert len(result['metrics']) == len(expected) >= 6
  for name, value in expected.items():
    assert result['metrics'][name] == pytest.approx(float(getattr(value, 'value', value)), abs=1e-9)


def test_what_a_task_makes_of_texts_and_what_is_wrong_with_it(module):
  upper = Seqio(task='my_upper', module=module, examples=3).run(Scripted(answer))
  assert upper['metrics'] == {'accuracy': pytest.approx(200 / 3)}
  for task, why in (
    (Seqio(task='my_wrods', module=module), "no seqio task 'my_wrods'. Did you mean my_words"),
    (Seqio(task='my_words', module=module, split='test'), "has no split 'test'"),
    (Seqio(task='my_silent', module=module), 'my_silent has no metric_fns'),
    (Seqio(task='my_words', module='no_such_module'), "'no_such_module' cannot be imported"),
  ):
    assert why in task.run(Scripted(answer))['error']
  failing = Seqio(task='my_upper', module=module, examples=3).run(
    Scripted(lambda r: Failed('too long.'))
  )
  assert failing['error'].startswith('3 of 3 requests failed')
