"""Chooses the next token: the settings of a request, and the choice for all rows of a batch at once.

The settings of all rows are arrays, so that requests with different settings share a compiled step. The order
is that of transformers: penalties and biases, temperature, top-k, top-p, min-p, typical. Each filter works on
the tokens that the one before has left.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from research.core.errors import Invalid

HIDDEN = -jnp.inf  # the logit of a token that cannot be chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How the tokens of a request are chosen.

  Attributes:
    temperature: divides the logits; 0 is greedy, the likeliest token.
    top_k: keeps only the k likeliest tokens (Fan et al. 2018, arXiv:1805.04833); 0 for all.
    top_p: keeps the fewest tokens that together have this probability (Holtzman et al. 2019, arXiv:1904.09751).
    min_p: keeps tokens with at least this fraction of the highest probability (Nguyen et al. 2024,
      arXiv:2407.01082).
    typical: keeps the fewest tokens that together have this probability, those whose surprise is nearest to the
      entropy first (Meister et al. 2022, arXiv:2202.00666).
    repetition_penalty: divides positive logits of tokens that occurred in the prompt or the answer, and
      multiplies negative ones (Keskar et al. 2019, arXiv:1909.05858).
    presence_penalty: subtracted from the logit of a token that was generated before, as OpenAI's API defines
      it: the prompt does not count.
    frequency_penalty: the same, for each time that the token was generated.
    logit_bias: added to the logits of these tokens.
    seed: the request's tokens depend on this and on nothing else that is random. Samples derive their seeds
      from it.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  typical: float = 1.0
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  # A mapping has no hash; settings with another bias are still not equal.
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict, hash=False)
  seed: int = 0

  def __post_init__(self):
    # A smaller probability is 0 in float32, or nearly 0, and no token would be left. Logits divided by a
    # smaller temperature would be infinite.
    least = 1e-30
    wrong = {
      'temperature': (
        self.temperature == 0 or least <= self.temperature < math.inf,
        'must be 0 (greedy), or a finite number above 0',
      ),
      'top_k': (isinstance(self.top_k, int) and self.top_k >= 0, 'must be 0 (all) or a number of tokens'),
      'top_p': (least <= self.top_p <= 1, 'must be above 0 and at most 1'),
      'min_p': (0 <= self.min_p <= 1, 'must be from 0 to 1'),
      'typical': (least <= self.typical <= 1, 'must be above 0 and at most 1'),
      'repetition_penalty': (
        least <= self.repetition_penalty < math.inf, 'must be a finite number above 0 (1 for none)',
      ),
      'presence_penalty': (math.isfinite(self.presence_penalty), 'must be a number'),
      'frequency_penalty': (math.isfinite(self.frequency_penalty), 'must be a number'),
      'seed': (isinstance(self.seed, int) and 0 <= self.seed < 2**31, 'must be from 0 to 2^31 - 1'),
    }  # fmt: skip
    for field, (right, why) in wrong.items():
      if not right:
        raise Invalid(Sampling, field, f'{getattr(self, field)!r} {why}.')

  @property
  def draws(self) -> bool:
    """Whether tokens are drawn at random."""
    return self.temperature > 0 and self.top_k != 1

  @property
  def filters(self) -> bool:
    """Whether some tokens are excluded from the draw."""
    return self.draws and bool(self.top_k or self.top_p < 1 or self.min_p or self.typical < 1)

  @property
  def penalises(self) -> bool:
    """Whether the logits depend on which tokens occurred before."""
    return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)


FIELDS = (
  'temperature', 'top_k', 'top_p', 'min_p', 'typical', 'repetition_penalty', 'presence_penalty',
  'frequency_penalty', 'seed',
)  # fmt: skip
INTEGERS = ('top_k', 'seed')


def as_rows(settings: list[Sampling]) -> dict[str, np.ndarray]:
  """Returns the settings of all rows, an array [rows] for each field."""
  dtype = {name: np.int32 if name in INTEGERS else np.float32 for name in FIELDS}
  return {name: np.array([getattr(s, name) for s in settings], dtype[name]) for name in FIELDS}


def penalise(
  logits: jax.Array, rows: Mapping[str, jax.Array], occurred: jax.Array, generated: jax.Array
) -> jax.Array:
  """Applies the three penalties to logits.

  Args:
    logits: [rows, vocab].
    rows: the settings, by `as_rows`.
    occurred: [rows, vocab], whether a token occurred in the prompt or the answer.
    generated: [rows, vocab], how often a token was generated.
  """
  penalty = rows['repetition_penalty'][:, None]
  logits = jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
  logits = logits - rows['presence_penalty'][:, None] * (generated > 0)
  return logits - rows['frequency_penalty'][:, None] * generated


def keep_top_k(logits: jax.Array, k: jax.Array) -> jax.Array:
  """Hides all but the k [rows] likeliest tokens and those as likely as the last of them; 0 keeps all."""
  vocab = logits.shape[-1]
  ordered = jnp.sort(logits, axis=-1, descending=True)
  last = jnp.take_along_axis(ordered, jnp.clip(k - 1, 0, vocab - 1)[:, None], axis=-1)
  return jnp.where((k[:, None] > 0) & (logits < last), HIDDEN, logits)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
  """Hides all but the fewest tokens that together have probability p [rows]; 1 keeps all."""
  ordered = jnp.sort(logits, axis=-1, descending=True)
  probability = jax.nn.softmax(ordered, axis=-1)
  before = jnp.cumsum(probability, axis=-1) - probability
  least = jnp.min(jnp.where(before < p[:, None], ordered, jnp.inf), axis=-1, keepdims=True)
  return jnp.where((p[:, None] < 1) & (logits < least), HIDDEN, logits)


def keep_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
  """Hides tokens that have less than p [rows] times the highest probability; 0 keeps all."""
  least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)[:, None]
  return jnp.where(logits < least, HIDDEN, logits)


def keep_typical(logits: jax.Array, mass: jax.Array) -> jax.Array:
  """Hides all but the fewest tokens near the entropy that have probability `mass` [rows]; 1 keeps all."""
  log_p = jax.nn.log_softmax(logits, axis=-1)
  p = jnp.exp(log_p)
  entropy = -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1, keepdims=True)
  off = jnp.where(p > 0, jnp.abs(-log_p - entropy), jnp.inf)
  order = jnp.argsort(off, axis=-1)
  ordered = jnp.take_along_axis(p, order, axis=-1)
  before = jnp.cumsum(ordered, axis=-1) - ordered
  included = before < mass[:, None]
  ordered_off = jnp.take_along_axis(off, order, axis=-1)
  furthest = jnp.max(jnp.where(included, ordered_off, -1.0), axis=-1, keepdims=True)
  return jnp.where((mass[:, None] < 1) & (off > furthest), HIDDEN, logits)


def distribution(logits: jax.Array, rows: Mapping[str, jax.Array], filters: bool) -> jax.Array:
  """Returns the logits of the distribution that tokens are drawn from. That of a greedy row has a single token.

  Args:
    logits: [rows, vocab], after penalties and biases.
    rows: the settings, by `as_rows`.
    filters: whether any row has a filter; if not, none is computed.
  """
  greedy = (rows['temperature'] == 0)[:, None]
  best = jnp.argmax(logits, axis=-1)[:, None] == jnp.arange(logits.shape[-1])
  drawn = logits / jnp.where(greedy, 1.0, rows['temperature'][:, None])
  if filters:
    drawn = keep_top_k(drawn, rows['top_k'])
    drawn = keep_top_p(drawn, rows['top_p'])
    drawn = keep_min_p(drawn, rows['min_p'])
    drawn = keep_typical(drawn, rows['typical'])
  return jnp.where(greedy, jnp.where(best, 0.0, HIDDEN), drawn)


def draw(logits: jax.Array, seeds: jax.Array, number: jax.Array) -> jax.Array:
  """Draws a token for each row, [rows], from the softmax of its logits.

  The key of a row depends on its seed and on how many tokens it has drawn. So its tokens do not depend on its
  slot, on the other rows, or on the time of the request.

  Args:
    logits: [rows, vocab].
    seeds: [rows].
    number: [rows], how many tokens each row has drawn.
  """

  def draw_row(logits, seed, number):
    key = jax.random.fold_in(jax.random.key(seed), number)
    return jax.random.categorical(key, logits)

  return jax.vmap(draw_row)(logits, seeds, number).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=('draws', 'filters'))
def choose(
  logits: jax.Array,
  rows: Mapping[str, jax.Array],
  number: jax.Array,
  *,
  draws: bool,
  filters: bool,
) -> jax.Array:
  """Returns the next token of every row, [rows].

  Args:
    logits: [rows, vocab], after penalties and biases.
    rows: the settings, by `as_rows`.
    number: [rows], how many tokens each row has generated.
    draws, filters: whether any row draws, or has a filter.
  """
  if not draws:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return draw(distribution(logits, rows, filters), rows['seed'], number)
