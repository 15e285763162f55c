"""What a sweep plans with: rungs of a ladder of sizes, rules for hyper-parameters, planned runs."""

import dataclasses
import math
from collections.abc import Mapping

from research.core.errors import Invalid


@dataclasses.dataclass(frozen=True)
class Size:
  """A rung of the ladder: the macros that make it, and what it counts."""

  macros: Mapping[str, int]
  params: int
  flops_per_token: float

  @property
  def name(self) -> str:
    return 'x'.join(str(self.macros[k]) for k in ('EMBED', 'LAYERS'))


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run to do. Macros, values and settings are what its gin file is given; the rest is what to expect of it.

  `settings` are more gin bindings, as on a command line. A run with a `parent` starts from that one's
  checkpoint at step `fork`, and `steps` and `tokens` count from the parent's start.
  """

  name: str
  role: str  # 'fit', 'forecast', or 'trunk' of what branches from it
  budget: float | None  # FLOPs that it shares with other runs, if the design is one of budgets
  size: Size
  tokens: int
  steps: int
  batch_size: int
  learning_rate: float
  settings: tuple[str, ...] = ()
  parent: str | None = None
  fork: int = 0

  @property
  def flops(self) -> float:
    """Of the run as its row counts it, its parent's part included."""
    return self.size.flops_per_token * self.tokens

  @property
  def cost(self) -> float:
    """FLOPs that are left to spend on it when its parent is done."""
    return self.flops * (1 - self.fork / self.steps)

  def bindings(self) -> list[str]:
    """What its gin file is given, as on a command line."""
    values = {
      **self.size.macros,
      'LEARNING_RATE': self.learning_rate,
      'Run.steps': self.steps,
      'Run.batch_size': self.batch_size,
    }
    return [*(f'{k}={v!r}' for k, v in values.items()), *self.settings]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """value * (x / at) ** exponent, for x the run's parameters, tokens or FLOPs; kept within [low, high]."""

  value: float
  at: float = 1.0
  exponent: float = 0.0
  by: str = 'params'
  low: float = 0.0
  high: float = math.inf

  def __post_init__(self):
    if self.by not in ('params', 'tokens', 'flops'):
      raise Invalid(Rule, 'by', f"{self.by!r} is not one of 'params', 'tokens', 'flops'.")
    if not (self.value > 0 and self.at > 0):
      raise Invalid(Rule, 'value', 'value and at must be positive.')

  def __call__(self, *, params: float, tokens: float, flops: float) -> float:
    x = {'params': params, 'tokens': tokens, 'flops': flops}[self.by]
    return min(max(self.value * (x / self.at) ** self.exponent, self.low), self.high)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ladder:
  """Sizes of one shape: widths in even steps, depth in proportion to width.

  Attributes:
    widths: (first, last, step) of the widths of the residual stream.
    head_dim: the width of a head; widths are multiples of it.
    heads: so many heads at every width instead; widths are multiples of twice that.
    aspect: width per layer.
    min_layers: at least so many layers, however narrow.
    mlp_ratio: width of the MLP over the model's, rounded to a multiple of 8.
  """

  widths: tuple[int, int, int]
  head_dim: int = 16
  heads: int | None = None
  aspect: float = 32.0
  min_layers: int = 1
  mlp_ratio: float = 8 / 3

  def __post_init__(self):
    if len(self.widths) != 3 or not all(isinstance(w, int) and w > 0 for w in self.widths):
      raise Invalid(
        Ladder, 'widths', f'{self.widths!r} is not (first, last, step), three positive integers.'
      )
    first, last, step = self.widths
    unit = 2 * self.heads if self.heads else self.head_dim
    if first % unit or step % unit or last < first:
      raise Invalid(Ladder, 'widths', f'{self.widths!r} must rise in multiples of {unit}.')

  def macros(self) -> list[dict[str, int]]:
    first, last, step = self.widths
    return [
      {
        'EMBED': width,
        'LAYERS': max(self.min_layers, round(width / self.aspect)),
        'HEADS': self.heads or width // self.head_dim,
        'HEAD_DIM': width // self.heads if self.heads else self.head_dim,
        'MLP': 8 * max(1, round(width * self.mlp_ratio / 8)),
      }
      for width in range(first, last + 1, step)
    ]


def nearest(rungs: list[Size], params: float) -> Size:
  """The rung whose parameters are nearest, by ratio."""
  return min(rungs, key=lambda size: abs(math.log(size.params / params)))
