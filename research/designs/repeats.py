"""Repeated data: unique tokens by epochs, and the law of the value of a repeat."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from research.designs.base import Answer, Picked, positive
from research.designs.plan import Planned, Size
from research.scaling import bootstrap, fitted, law_fit, laws
from research.scaling.rows import CONVENTIONS

# Tied parameters of each form of the law, from the widest to the narrowest. The paper has the second.
FORMS = {
  '': {},
  ', alpha = beta': {'beta': 'alpha'},
  ', alpha = beta, R_N = R_D': {'beta': 'alpha', 'R_N': 'R_D'},
}


def repeats(runs: list[Planned], rows: list[dict], flops: str) -> Answer:
  """The data-constrained law of Muennighoff et al. 2023, in the widest of `FORMS` that the rows determine.

  The unique tokens of a row are its tokens / epochs.

  Args:
    flops: the FLOP convention of the design, which decides what N counts.
  """
  from research.designs.charts import epochs

  finished = [row for row in rows if row.get('status') == 'finished']
  if not finished:
    return Answer('no run has a loss.')

  def column(key: str) -> np.ndarray:
    return np.array([float(row[key]) for row in finished])

  data = {'params': column(CONVENTIONS[flops]), 'tokens': column('tokens')}
  data['unique_tokens'] = data['tokens'] / np.maximum(column('epochs'), 1e-9)
  loss = column('loss')
  law = laws.DataConstrained()
  refused = []
  fit = None
  for form, tied in FORMS.items():
    try:
      fit = law_fit.fit(law, data, loss, tied=tied)
      break
    except (fitted.NotIdentifiable, laws.LawError) as error:
      refused.append(f'{law.name}{form} refused: {error}')
  if fit is None:
    lines = ['no law of repeated data was fitted: the runs do not determine one.', *refused]
    figure = epochs({**data, 'loss': loss})
    return Answer('\n'.join(lines), {'epochs': (figure, 'Points are runs.')})

  def predict(n, d, unique):
    return fit.predict(params=n, tokens=d, unique_tokens=unique)

  figure = epochs({**data, 'loss': loss}, predict)
  caption = 'Points are runs; lines the fitted law, dotted: had every token been new.'
  values = {'law': law.name, 'tied': tied, 'parameters': fit.parameters}
  text = '\n'.join([*_describe(fit, form), *refused])
  return Answer(text, {'epochs': (figure, caption)}, values)


def _describe(fit: fitted.Fit, form: str) -> list[str]:
  """Lines on a fitted law of repeated data; `form` is a key of `FORMS`."""
  law = fit.law
  spread = bootstrap.bootstrap(fit, 'residual', replicates=400).intervals(0.9)
  low, high = spread['R_D']
  lines = [
    f'after {fit.parameters["R_D"]:.3g} [{low:.3g}, {high:.3g}] repeats one more is worth 1/e of new tokens.',
    f"L = {law.form}{form}; N' and D' are effective numbers ({law.source}); 90% intervals:",
  ]
  for name, value in fit.parameters.items():
    low, high = spread[name]
    meaning = law.parameters[name].meaning
    lines.append(f'  {name:5} {value:<9.4g} [{low:.4g}, {high:.4g}]  {meaning}')
  worst = np.abs(np.expm1(fit.residuals)).max()
  return [*lines, f'fitted over observed loss: within {worst:.2%}']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Repeats(Picked):
  """Unique tokens x epochs at every size: the value of repeated data (Muennighoff 2023, arXiv:2305.16264).

  Attributes:
    unique: tokens of the training stream.
    epochs: how often a run reads them.
  """

  unique: tuple[float, ...]
  epochs: tuple[float, ...] = (1, 2, 4, 8)
  law: ClassVar[bool] = False
  repeats: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    positive(self, unique=self.unique, epochs=self.epochs)

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = []
    for size, unique, epochs in itertools.product(self.sizes(rungs), self.unique, self.epochs):
      examples = max(1, round(unique / length))
      name = f'fit-{size.name}-{unique:.2e}-x{epochs:g}'
      settings = (f'train/Stream.examples={examples}',)
      tokens = examples * length * epochs
      runs.append(self.train_for(tokens, size, length, name, settings=settings))
    return self.long_enough(runs, 'unique')

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    return repeats(runs, rows, self.flops)
