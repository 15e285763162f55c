"""A run asks the evaluations that a gin file binds, and their columns are in its rows."""

import dataclasses
import json
import os

import numpy as np
import pytest

from research.core import configs, storage
from research.core.errors import Invalid
from research.training import loop, population


@dataclasses.dataclass
class Asked:
  """An evaluation that keeps what it was called with."""

  name: str = 'asked'
  labels: tuple = ('mine',)
  during: bool = False

  def columns(self, run, params, step, folder, log):
    log(f'asked at {step}')
    assert all(isinstance(x, np.ndarray) for x in _leaves(params))
    total = float(sum(np.abs(x.astype(np.float64)).sum() for x in _leaves(params)))
    return {f'eval/{self.labels[0]}/step': step, f'eval/{self.labels[0]}/total': total}


def _leaves(tree):
  return [
    leaf
    for value in tree.values()
    for leaf in (_leaves(value) if isinstance(value, dict) else [value])
  ]


def load(text_file, **more):
  more = {'Run.steps': 4, 'Run.eval_every': 2, **more}
  bindings = [f"FILES='{text_file}'", *(f'{k}={v}' for k, v in more.items())]
  return configs.load('tests/gin/decoder.gin', bindings)


@pytest.mark.slow
def test_the_columns_of_evaluations_are_in_the_rows(text_file, one_device, tmp_path):
  config = load(text_file)
  plain = config.build()
  during = Asked('during', ('often',), during=True)
  run = dataclasses.replace(plain, evaluations=(Asked(), during))
  # Who is asked what changes nothing about the run: it resumes in a workdir of before.
  assert run.identity() == plain.identity()
  with open(os.devnull, 'w') as silence:
    row = loop.train(run, tmp_path / 'run', config.text, stream=silence)
    again = loop.train(run, tmp_path / 'run', config.text, stream=silence)
    (member,) = population.train_population([run], [tmp_path / 'member'], streams=[silence])
  assert row['eval/mine/step'] == row['eval/often/step'] == 4
  assert json.loads((tmp_path / 'run' / 'run.json').read_text()) == again
  for other in (again, member):
    assert other['eval/mine/total'] == pytest.approx(row['eval/mine/total'], rel=1e-6)
  rows = [
    r for r in storage.read_rows(tmp_path / 'run' / 'metrics.jsonl') if 'eval/often/step' in r
  ]
  assert [(r['step'], 'eval/mine/step' in r) for r in rows] == [(2, False)]


@pytest.mark.parametrize(
  ('evaluations', 'why'),
  [
    ((3,), r'must be suites: \(@suite\.Suite\(\),\)'),
    ((Asked(), Asked(labels=('other',))), 'two of them are named asked'),
    ((Asked(), Asked('other')), 'two of them have a task mine'),
  ],
)
def test_evaluations_that_would_overwrite_each_other_are_refused(evaluations, why, text_file):
  run = load(text_file).build()
  with pytest.raises(Invalid, match=rf'Run\.evaluations: {why}'):
    dataclasses.replace(run, evaluations=evaluations)
