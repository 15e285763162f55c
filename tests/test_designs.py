"""Which runs a design yields."""

import math

import pytest

from research.errors import Invalid
from research.scaling import designs

LENGTH = 128


def ladder(**knobs):
  return designs.Ladder(**{'widths': (16, 512, 16), **knobs})


def rungs():
  """Decoders by their usual count, 12 layers width^2, six FLOPs a parameter and token."""
  sizes = []
  for macros in ladder().macros():
    n = 12 * macros['LAYERS'] * macros['EMBED'] ** 2
    sizes.append(designs.Size(macros, n, 6.0 * n))
  return sizes


def design(**knobs):
  rules = {
    'learning_rate': designs.Rule(value=0.0047, at=108e6, exponent=-1 / 3),
    'batch_size': designs.Rule(value=8),
  }
  return designs.IsoFlop(**{'budgets': (1e12, 4e12), 'ladder': ladder(), **rules, **knobs})


def test_every_run_spends_its_budget_to_half_a_step():
  for run in design().plan(rungs(), LENGTH):
    step = run.batch_size * LENGTH * run.size.flops_per_token
    assert abs(run.flops - run.budget) <= step / 2
    assert run.tokens == run.steps * run.batch_size * LENGTH


def test_sizes_straddle_the_expected_optimum():
  for budget in (1e12, 4e12):
    runs = [run for run in design().plan(rungs(), LENGTH) if run.budget == budget]
    ratios = [run.tokens / run.size.params for run in runs]
    assert len(runs) == 5
    assert min(ratios) < 20 < max(ratios)
    assert len({run.name for run in runs}) == 5


def test_hyperparameters_follow_the_size():
  runs = design().plan(rungs(), LENGTH)
  small, large = min(runs, key=lambda r: r.size.params), max(runs, key=lambda r: r.size.params)
  ratio = (large.size.params / small.size.params) ** (-1 / 3)
  assert large.learning_rate / small.learning_rate == pytest.approx(ratio, rel=1e-3)
  rule = designs.Rule(value=160, at=108e6, exponent=2 / 3, low=4, high=256)
  assert rule(params=108e6, tokens=1, flops=1) == 160
  assert rule(params=1e3, tokens=1, flops=1) == 4
  assert rule(params=1e12, tokens=1, flops=1) == 256


def test_shapes_of_the_ladder():
  for macros in ladder(aspect=64, head_dim=16).macros():
    assert macros['EMBED'] == macros['HEADS'] * macros['HEAD_DIM']
    assert macros['LAYERS'] == max(1, round(macros['EMBED'] / 64))
    assert macros['MLP'] % 8 == 0
  for macros in ladder(heads=2, widths=(8, 64, 4)).macros():
    assert (macros['HEADS'], macros['HEAD_DIM']) == (2, macros['EMBED'] // 2)


def test_nearest_is_by_ratio():
  sizes = [designs.Size({'EMBED': n, 'LAYERS': 1}, n, 6.0 * n) for n in (100, 1000)]
  assert designs.nearest(sizes, math.sqrt(100 * 1000) * 1.01).params == 1000
  assert designs.nearest(sizes, math.sqrt(100 * 1000) * 0.99).params == 100


@pytest.mark.parametrize(
  ('make', 'says'),
  [
    (lambda: design(budgets=()), r'IsoFlop\.budgets'),
    (lambda: design(budgets=(-1e12,)), r'IsoFlop\.budgets'),
    (lambda: design(sizes=2), r'IsoFlop\.sizes: 2 sizes do not show a minimum'),
    (lambda: design(spread=1.0), r'IsoFlop\.spread'),
    (lambda: design(flops='flops'), r'IsoFlop\.flops: .*flops_6n_with_head'),
    (lambda: ladder(widths=(10, 20, 5)), r'Ladder\.widths: .*multiples of 16'),
    (lambda: ladder(widths=(16, 32)), r'Ladder\.widths: .*first, last, step'),
    (lambda: designs.Rule(value=1, by='width'), r"Rule\.by: 'width'"),
    (
      lambda: design(budgets=(1e8,)).plan(rungs(), LENGTH),
      r'IsoFlop\.budgets: 1e\+08 FLOPs leave \d sizes',
    ),
  ],
)
def test_what_cannot_be_planned_is_refused(make, says):
  with pytest.raises(Invalid, match=says):
    make()
