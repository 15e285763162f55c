"""Repeated data: unique tokens by epochs, and the law of the value of a repeat."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from research.designs.base import Answer, Picked, positive
from research.designs.plan import Planned, Size
from research.scaling import bootstrap, fitted, law_fit, laws
from research.scaling.rows import CONVENTIONS


def repeats(runs: list[Planned], rows: list[dict], flops: str) -> Answer:
  """The data-constrained law of Muennighoff et al. 2023, in the widest form that the rows determine.

  The unique tokens of a row are its tokens / epochs. The forms are: all seven parameters free; alpha = beta, as
  in the paper; and R_N = R_D too.
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
  forms = {'': {}, ', alpha = beta': {'beta': 'alpha'}}
  forms[', alpha = beta, R_N = R_D'] = {'beta': 'alpha', 'R_N': 'R_D'}
  fit = None
  for form, tied in forms.items():
    try:
      fit = law_fit.fit(law, data, loss, tied=tied)
      break
    except (fitted.NotIdentifiable, laws.LawError) as error:
      refused.append(f'{law.name}{form} refused: {error}')
  predict = None
  if fit:

    def predict(n, d, unique):
      return fit.predict(params=n, tokens=d, unique_tokens=unique)

    values = fit.parameters
    spread = bootstrap.bootstrap(fit, 'residual', replicates=400).intervals(0.9)
    low, high = spread['R_D']
    lines = [
      f'after {values["R_D"]:.3g} [{low:.3g}, {high:.3g}] repeats one more is worth 1/e of new tokens.',
      f"L = {law.form}{form}; N' and D' are effective numbers ({law.source}); 90% intervals:",
      *(
        f'  {k:5} {v:<9.4g} [{spread[k][0]:.4g}, {spread[k][1]:.4g}]  {law.parameters[k].meaning}'
        for k, v in values.items()
      ),
      f'fitted over observed loss: within {np.abs(np.expm1(fit.residuals)).max():.2%}',
    ]
  else:
    lines = ['no law of repeated data was fitted: the runs do not determine one.']
  caption = 'Points are runs' + (
    '; lines the fitted law, dotted: had every token been new.' if fit else '.'
  )
  figure = epochs({**data, 'loss': loss}, predict)
  fitted_values = {'law': law.name, 'tied': tied, 'parameters': fit.parameters} if fit else None
  return Answer('\n'.join([*lines, *refused]), {'epochs': (figure, caption)}, fitted_values)


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
