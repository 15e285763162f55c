"""Ablations: a product of choices at every size, and the effect of each choice on the loss."""

import collections
import dataclasses
import itertools
import math
import string
from typing import ClassVar

import numpy as np

from research.core.errors import Invalid
from research.designs.base import Answer, Picked, losses, positive
from research.designs.plan import Planned, Size


def ablation(runs: list[Planned], rows: list[dict]) -> Answer:
  """The mean loss over seeds of every variant, and its difference from the base."""
  from research.designs.charts import differences

  # size -> variant -> losses. The last setting of a run is its seed; the others make its variant.
  by_size = collections.defaultdict(lambda: collections.defaultdict(list))
  for run, loss in losses(runs, rows):
    by_size[run.size.name][' '.join(run.settings[:-1]) or 'base'].append(loss)
  lines = []
  changes = collections.defaultdict(dict)
  for size, variants in by_size.items():
    base = float(np.mean(next(iter(variants.values()))))
    for variant, values in variants.items():
      mean = float(np.mean(values))
      n = len(values)
      error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
      shown = f' +- {error:.4f}' if n > 1 else ''
      lines.append(f'{size} {variant}: {mean:.4f}{shown} ({mean - base:+.4f})')
      changes[size][variant] = mean - base, error
  if not changes:
    return Answer('no run has a loss.')
  caption = 'Means over seeds; the whisker is the standard error of a mean, where there are seeds.'
  return Answer('\n'.join(lines), {'ablation': (differences(changes), caption)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ablation(Picked):
  """A product of gin bindings at every size: the effect of each choice.

  Attributes:
    axes: the alternatives of each choice. Each is a binding as on a command line, or '' for none; the first is
      the base.
    ratio: tokens per parameter.
    seeds: runs of each, with Run.seed 0, 1, ...
  """

  axes: tuple[tuple[str, ...], ...]
  ratio: float = 20.0
  seeds: int = 1
  law: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    positive(self, seeds=(self.seeds,))
    if not self.axes or any(isinstance(axis, str) or len(axis) < 2 for axis in self.axes):
      why = "each choice is a tuple of two bindings or more, such as ('', 'Mlp.bias=True')."
      raise Invalid(Ablation, 'axes', why)

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = []
    choices = itertools.product(*(range(len(axis)) for axis in self.axes))
    for size, alternatives, seed in itertools.product(
      self.sizes(rungs), list(choices), range(self.seeds)
    ):
      name = f'fit-{size.name}-{self.variant(alternatives)}-s{seed}'
      bindings = [self.axes[i][k] for i, k in enumerate(alternatives)]
      settings = (*filter(None, bindings), f'Run.seed={seed}')
      tokens = self.ratio * size.params
      runs.append(self.train_for(tokens, size, length, name, settings=settings))
    return self.long_enough(runs, 'ratio')

  @staticmethod
  def variant(alternatives: tuple[int, ...]) -> str:
    """'a0b1': the first alternative of the first choice, the second of the second."""
    return ''.join(f'{string.ascii_lowercase[i]}{k}' for i, k in enumerate(alternatives))

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    return ablation(runs, rows)
