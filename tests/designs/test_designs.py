"""Which runs a design yields."""

import math
import re

import pytest

from research.core.errors import Invalid
from research.designs import ablation, grids, isoflop, plan, rates, repeats, shapes
from research.designs.branches import Branches
from research.designs.transfer import Transfer, tokens_for

LENGTH = 128


def ladder(**knobs):
  return plan.Ladder(**{'widths': (16, 512, 16), **knobs})


def rungs():
  """Decoders by their usual count, 12 layers width^2, six FLOPs a parameter and token."""
  sizes = []
  for macros in ladder().macros():
    n = 12 * macros['LAYERS'] * macros['EMBED'] ** 2
    sizes.append(plan.Size(macros, n, 6.0 * n))
  return sizes


def design(**knobs):
  rules = {
    'learning_rate': plan.Rule(value=0.0047, at=108e6, exponent=-1 / 3),
    'batch_size': plan.Rule(value=8),
  }
  return isoflop.IsoFlop(**{'budgets': (1e12, 4e12), 'ladder': ladder(), **rules, **knobs})


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
  rule = plan.Rule(value=160, at=108e6, exponent=2 / 3, low=4, high=256)
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
  sizes = [plan.Size({'EMBED': n, 'LAYERS': 1}, n, 6.0 * n) for n in (100, 1000)]
  assert plan.nearest(sizes, math.sqrt(100 * 1000) * 1.01).params == 1000
  assert plan.nearest(sizes, math.sqrt(100 * 1000) * 0.99).params == 100


RULES = {
  'ladder': ladder(),
  'learning_rate': plan.Rule(value=0.0047, at=108e6, exponent=-1 / 3),
  'batch_size': plan.Rule(value=8),
}


def unique_names(runs):
  assert len({run.name for run in runs}) == len(runs)
  assert all(run.tokens == run.steps * run.batch_size * LENGTH for run in runs)
  return runs


def test_a_grid_has_every_size_on_every_number_of_tokens():
  runs = unique_names(
    grids.KaplanGrid(params=(1e4, 1e5), tokens=(1e5, 2e5), **RULES).plan(rungs(), LENGTH)
  )
  assert len(runs) == 4
  assert len({(run.size.name, round(run.tokens / 1e5)) for run in runs}) == 4


def test_horizons_are_tokens_per_parameter():
  runs = grids.Horizons(params=(1e4, 1e5), horizons=(10, 40), **RULES).plan(rungs(), LENGTH)
  ratios = [run.tokens / run.size.params for run in unique_names(runs)]
  assert ratios == pytest.approx([10, 40] * 2, rel=0.03)


def test_branches_are_the_trunk_up_to_their_fork():
  design = Branches(params=(1e5,), shortest=10, horizons=(1, 2, 4), decay=0.25, **RULES)
  trunk, *branches = unique_names(design.plan(rungs(), LENGTH))
  assert trunk.role == 'trunk'
  settings = lambda run: dict(setting.split('=') for setting in run.settings)
  for run, horizon in zip(branches, (1, 2, 4), strict=True):
    assert (run.role, run.parent, run.learning_rate) == ('fit', trunk.name, trunk.learning_rate)
    assert run.tokens == pytest.approx(horizon * 10 * run.size.params, rel=0.02)
    assert run.fork % int(settings(trunk)['Run.checkpoint_every']) == 0
    assert run.fork <= trunk.steps
    # The decay begins where the trunk is left.
    decay = settings(run)['warmup_stable_decay.decay']
    assert run.steps - round(run.steps * float(decay)) == run.fork
    assert (
      settings(run)['warmup_stable_decay.warmup'] == settings(trunk)['warmup_stable_decay.warmup']
    )
  alone = sum(run.flops for run in branches)
  assert sum(run.cost for run in (trunk, *branches)) < 0.7 * alone


def transfer(**knobs):
  texts = {'before': ("FILES='a.txt'",), 'after': ("FILES='b.txt'",)}
  tokens = {'pretraining': (1e6,), 'tuning': (1e5, 2e5), 'scratch': (1e5, 4e5)}
  return Transfer(**{'params': (1e4, 1e5), **texts, **tokens, **RULES, **knobs})


def test_tuned_runs_start_from_parents_of_their_size():
  methods = (
    ('gin/tuning/start.gin',),
    ('gin/tuning/lora.gin', 'RANK=2'),
    ('gin/tuning/lora.gin', 'RANK=4'),
  )
  design = transfer(methods=methods, pretraining=(1e6, 2e6), tuning_rate=plan.Rule(value=1e-4))
  runs = unique_names(design.plan(rungs(), LENGTH))
  parents = {run.name: run for run in runs if run.role == 'parent'}
  tuned = [run for run in runs if run.method]
  assert (len(parents), len(tuned)) == (2 * 2, 2 * 2 * 3 * 2)
  assert len([run for run in runs if run.role == 'scratch']) == 2 * 2
  for run in tuned:
    assert run.size == parents[run.parent].size
    assert run.settings[0] == "FILES='b.txt'"
    assert (run.role, run.fork, run.learning_rate) == ('fit', 0, 1e-4)
    assert run.cost == run.flops
  assert {run.name.partition('-')[0] for run in tuned} == {'start', 'lora1', 'lora2'}
  assert {run.settings[1:] for run in tuned if run.name.startswith('lora2')} == {('RANK=4',)}
  assert all(run.settings == ("FILES='a.txt'",) for run in parents.values())


def test_tokens_for_a_loss_lie_on_the_curve():
  power = lambda d: 7.0 * d**-0.1
  curve = [(d, power(d)) for d in (1e6, 1e4, 1e5)]
  assert tokens_for(power(3e4), curve) == pytest.approx(3e4)
  assert tokens_for(power(1e6), curve) == pytest.approx(1e6)
  assert tokens_for(power(9e3), curve) is None
  assert tokens_for(power(2e6), curve) is None
  assert tokens_for(2.0, [(1e4, 3.0)]) is None
  assert tokens_for(2.0, [(1e4, 2.0), (1e5, 2.0)]) is None


@pytest.mark.slow
def test_the_laws_of_transfer_are_found_in_the_rows():
  """D_T = k D_F^a N^b by construction: the losses are those from scratch at D_F + D_T."""
  k, a, b = 40.0, 0.3, 0.5
  tokens = tuple(2.0**i * 1e5 for i in range(10))
  design = transfer(params=(1e4, 1e5, 1e6), scratch=tokens, tuning=tokens[:4], min_steps=10)
  runs = design.plan(rungs(), LENGTH)
  rows = []
  for run in runs:
    n, d = run.size.params, run.tokens
    worth = k * d**a * n**b if run.method else 0.0
    loss = 3 * n**-0.05 * (d + worth) ** -0.1
    row = {'run': run.name, 'role': run.role, 'status': 'finished', 'tokens': d, 'loss': loss}
    rows.append({**row, 'params_with_head': n, 'init/tokens': 1e6 if run.method else None})
  answer = design.answer(runs, rows)
  found = answer.fit['start, data transferred']
  assert found == pytest.approx({'k': k, 'a': a, 'b': b}, rel=1e-6)
  for row in rows:
    extra = answer.columns.get(row['run'])
    assert (extra is None) == (row['role'] != 'fit')
    if extra:
      worth = k * row['tokens'] ** a * row['params_with_head'] ** b
      assert extra['data_transferred'] == pytest.approx(worth, rel=1e-6)
  assert 'start, loss by params_with_head' in answer.fit or 'no law' in answer.text
  # No power law has what pre-training made worse, and it is told.
  harmed = next(row for row in reversed(rows) if row['role'] == 'fit')
  harmed['loss'] = 3 * harmed['params_with_head'] ** -0.05 * (harmed['tokens'] * 0.7) ** -0.1
  answer = design.answer(runs, rows)
  assert re.search(rf'{harmed["run"]}: .* from scratch: pre-training did harm', answer.text)
  assert answer.fit['start, data transferred'] == pytest.approx({'k': k, 'a': a, 'b': b}, rel=1e-6)


def test_the_law_of_the_learning_rate_is_found():
  design = rates.LearningRateBatch(params=(1e4, 1e5, 1e6), batches=(1, 2), **RULES)
  runs = unique_names(design.plan(rungs(), LENGTH))
  assert len(runs) == 3 * 5 * 2
  true = lambda n: 0.04 * (n / 1e5) ** -0.3

  def loss(run):
    miss = math.log(run.learning_rate / true(run.size.params))
    return 3.0 + 0.02 * miss**2 + 0.1 * (run.batch_size > 8)

  rows = [{'run': run.name, 'loss': loss(run)} for run in runs]
  said = design.answer(runs, rows).text
  exponent = float(said.rpartition('exponent = ')[2])
  value, at = (float(said.partition(f'{name} = ')[2].split()[0]) for name in ('value', 'at'))
  assert exponent == pytest.approx(-0.3, abs=0.002)
  assert value == pytest.approx(true(at), rel=0.01)
  # Where the best is at the end of a grid there is no law of it, and a run without a loss is no matter.
  falls = [{'run': run.name, 'loss': 3 - run.learning_rate} for run in runs[:-1]]
  assert 'no law: 0 sizes' in design.answer(runs, falls).text


def test_repeats_have_streams_of_their_own():
  design = repeats.Repeats(params=(1e4,), unique=(64e3, 128e3), epochs=(1, 4), **RULES)
  runs = unique_names(design.plan(rungs(), LENGTH))
  for run, (unique, epochs) in zip(
    runs, [(64e3, 1), (64e3, 4), (128e3, 1), (128e3, 4)], strict=True
  ):
    assert run.settings == (f'train/Stream.examples={round(unique / LENGTH)}',)
    assert run.tokens == pytest.approx(unique * epochs, rel=0.01)
  assert design.repeats


def test_widths_and_depths_share_a_budget():
  design = shapes.WidthDepth(
    budget=1e12, depths=(1, 2, 4), **{**RULES, 'ladder': ladder(widths=(32, 64, 32))}
  )
  sizes = [
    plan.Size(m, 12 * m['LAYERS'] * m['EMBED'] ** 2, 72.0 * m['LAYERS'] * m['EMBED'] ** 2)
    for m in design.macros()
  ]
  runs = unique_names(design.plan(sizes, LENGTH))
  assert [run.size.name for run in runs] == ['32x1', '32x2', '32x4', '64x1', '64x2', '64x4']
  assert [run.flops for run in runs] == pytest.approx([1e12] * 6, rel=0.02)
  rows = [{'run': run.name, 'loss': 2.0 + abs(i - 3)} for i, run in enumerate(runs)]
  assert 'best: 64 wide, 1 layers (64 wide a layer): 2.0000' in design.answer(runs, rows).text


def test_an_ablation_is_a_product_over_seeds():
  axes = (('', 'Mlp.bias=True'), ('', 'Run.clip=None', 'Run.clip=0.1'))
  design = ablation.Ablation(params=(1e5,), axes=axes, seeds=2, **RULES)
  runs = unique_names(design.plan(rungs(), LENGTH))
  assert len(runs) == 2 * 3 * 2
  assert runs[0].settings == ('Run.seed=0',)
  assert runs[-1].settings == ('Mlp.bias=True', 'Run.clip=0.1', 'Run.seed=1')
  loss = lambda run: (
    3.0 - 0.1 * ('Mlp.bias=True' in run.settings) + 0.01 * run.settings[-1].endswith('1')
  )
  rows = [{'run': run.name, 'loss': loss(run)} for run in runs]
  said = design.answer(runs, rows).text
  assert 'base: 3.0050 +- 0.0050 (+0.0000)' in said
  assert 'Mlp.bias=True Run.clip=0.1: 2.9050 +- 0.0050 (-0.1000)' in said


@pytest.mark.parametrize(
  ('make', 'says'),
  [
    (lambda: design(budgets=()), r'IsoFlop\.budgets'),
    (lambda: design(budgets=(-1e12,)), r'IsoFlop\.budgets'),
    (lambda: design(sizes=2), r'IsoFlop\.sizes: 2 sizes do not show a minimum'),
    (lambda: design(spread=1.0), r'IsoFlop\.spread'),
    (lambda: grids.KaplanGrid(params=(), tokens=(1e6,), **RULES), r'KaplanGrid\.params'),
    (
      lambda: grids.KaplanGrid(params=(1e5,), tokens=(1e3,), **RULES).plan(rungs(), LENGTH),
      r'KaplanGrid\.tokens: no run has 50 steps',
    ),
    (
      lambda: Branches(params=(1e5,), shortest=9, horizons=(1, 1.5), **RULES),
      r'Branches\.horizons',
    ),
    (lambda: Branches(params=(1e5,), shortest=9, decay=1.0, **RULES), r'Branches\.decay'),
    (lambda: ablation.Ablation(params=(1e5,), axes=('Run.clip=None',), **RULES), r'Ablation\.axes'),
    (lambda: transfer(after=("FILES='a.txt'",)), r'Transfer\.after: is the same as before'),
    (lambda: transfer(after="FILES='b.txt'"), r'Transfer\.after: must be bindings'),
    (lambda: transfer(methods=('gin/tuning/lora.gin',)), r'Transfer\.methods: each method is'),
    (lambda: transfer(tuning=()), r'Transfer\.tuning'),
    (lambda: transfer(pretraining=(1e3,)).plan(rungs(), LENGTH), r'Transfer\.pretraining: no run'),
    (lambda: design(flops='flops'), r'IsoFlop\.flops: .*flops_6n_with_head'),
    (lambda: ladder(widths=(10, 20, 5)), r'Ladder\.widths: .*multiples of 16'),
    (lambda: ladder(widths=(16, 32)), r'Ladder\.widths: .*first, last, step'),
    (lambda: plan.Rule(value=1, by='width'), r"Rule\.by: 'width'"),
    (
      lambda: design(budgets=(1e8,)).plan(rungs(), LENGTH),
      r'IsoFlop\.budgets: 1e\+08 FLOPs leave \d sizes',
    ),
  ],
)
def test_what_cannot_be_planned_is_refused(make, says):
  with pytest.raises(Invalid, match=says):
    make()


def test_a_budget_has_as_many_seeds_as_it_is_given():
  once = design().plan(rungs(), LENGTH)
  runs = design(seeds=(1, 3)).plan(rungs(), LENGTH)
  count = lambda budget: len([run for run in runs if run.budget == budget])
  alone = lambda budget: len([run for run in once if run.budget == budget])
  assert (count(1e12), count(4e12)) == (alone(1e12), 3 * alone(4e12))
  assert len({run.name for run in runs}) == len(runs)
  assert [run for run in runs if not run.settings] == once
  assert {run.settings for run in runs} == {(), ('Run.seed=1',), ('Run.seed=2',)}
  with pytest.raises(Invalid, match='one for each of the 2 budgets'):
    design(seeds=(1, 2, 3))
