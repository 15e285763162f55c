"""The parts of a plan: a ladder of sizes, rules for hyper-parameters, and planned runs."""

import dataclasses
import math
from collections.abc import Mapping

from research.core.errors import Invalid


@dataclasses.dataclass(frozen=True)
class Size:
  """A size of the ladder: the macros that make it, and its counts."""

  macros: Mapping[str, int]
  params: int
  flops_per_token: float

  @property
  def name(self) -> str:
    """Its width and depth, '128x4'."""
    return 'x'.join(str(self.macros[k]) for k in ('EMBED', 'LAYERS'))


@dataclasses.dataclass(frozen=True)
class Planned:
  """A run to do: what to bind in its gin file, and the counts to expect.

  `settings` are more gin bindings, as on a command line. A run with a `parent` starts from it, in one of two
  ways. A branch goes on from the parent's checkpoint at step `fork`; its `steps` and `tokens` count from the
  start of the parent. A run with a `method`, a gin file of gin/tuning, is one of its own, whose parameters are
  at first those of the finished parent.
  """

  name: str
  role: str  # 'fit', 'forecast', or what fits need: 'trunk', 'parent', 'scratch'
  budget: float | None  # in FLOPs, for a design with budgets
  size: Size
  tokens: int
  steps: int
  batch_size: int
  learning_rate: float
  settings: tuple[str, ...] = ()
  parent: str | None = None
  fork: int = 0
  method: str | None = None

  @property
  def flops(self) -> float:
    """Training FLOPs in the run's row, including those of its parent."""
    return self.size.flops_per_token * self.tokens

  @property
  def cost(self) -> float:
    """Training FLOPs of the run itself, without those of its parent."""
    return self.flops * (1 - self.fork / self.steps)

  def bindings(self) -> list[str]:
    """The bindings of the run, as on a command line."""
    values = {
      **self.size.macros,
      'LEARNING_RATE': self.learning_rate,
      'Run.steps': self.steps,
      'Run.batch_size': self.batch_size,
    }
    return [*(f'{k}={v!r}' for k, v in values.items()), *self.settings]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
  """value * (x / at) ** exponent, clipped to [low, high]; x is the run's parameters, tokens or FLOPs."""

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
  """Sizes of one shape: evenly spaced widths, and a depth in proportion to the width.

  Attributes:
    widths: (first, last, step) of the widths of the residual stream.
    head_dim: the width of a head; widths are multiples of it.
    heads: the number of heads at every width, instead of `head_dim`; widths are multiples of twice that.
    aspect: width per layer.
    min_layers: the least number of layers.
    mlp_ratio: MLP width / model width; the MLP width is rounded to a multiple of 8.
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
    """The gin macros of each size, smallest first."""
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
  """The size whose number of parameters is nearest to `params`, by ratio."""
  return min(rungs, key=lambda size: abs(math.log(size.params / params)))
