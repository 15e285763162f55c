"""The first layer of every model: turns tokens into vectors."""

from collections.abc import Callable

import jax
from flax import nnx

from research.model.parameters import Initializer, check_sizes, look_up, normal, param
from research.model.part import Cost, Factory
from research.model.weights import Matrix, make_weight, rows
from research.parallel.axes import gather, shard

# A number, or a function of `embed`, which suits models of every width.
Scale = float | Callable[[int], float]


def inverse_sqrt(embed: int) -> float:
  """embed^-1/2: a `Scale` (T5 1.0, PaLM)."""
  return embed**-0.5


class Embedder(nnx.Module):
  """Token vectors, plus learned or fixed vectors of positions and of token types if the model has them.

  Knobs:
    positions: number of learned positions (GPT-2, BERT); None for none.
    position_offset: the row of position 0 (the table of OPT has 2 rows before it).
    fixed_positions: a function of positions that is added, such as `positions.sinusoidal`.
    types: number of token types (BERT); all tokens are of type 0.
    scale: factor of the token vectors, a number or a function of embed (Gemma: `math.sqrt`).
    norm: a norm after the sum (BERT, BLOOM).
    init: initializer of the tables.
    weight: makes the table of token vectors (see `weights`); None takes the model's choice.
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    positions: int | None = None,
    position_offset: int = 0,
    fixed_positions: Callable[..., jax.Array] | None = None,
    types: int | None = None,
    scale: Scale = 1.0,
    norm: Factory | None = None,
    init: Initializer = normal,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    check_sizes(Embedder, positions=positions, types=types)
    self.scale = scale(embed) if callable(scale) else scale
    self.position_offset = position_offset
    self.fixed_positions = fixed_positions
    self.one_hot = vocab * embed
    tokens = Matrix((vocab, embed), ('vocab', 'embed'), init, kind='table')
    self.tokens = make_weight(tokens, weight, rngs=rngs)

    def table(rows):
      return param(rngs, (rows, embed), (None, 'embed'), init, kind='table') if rows else None

    self.positions = table(positions)
    self.types = table(types)
    self.norm = norm(embed, rngs=rngs) if norm else None

  def __call__(self, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    x = rows(self.tokens, 'vocab', tokens, dtype) * self.scale
    if self.positions is not None:
      x = x + look_up(self.positions[...].astype(dtype), None, positions + self.position_offset)
    if self.fixed_positions is not None:
      fixed = self.fixed_positions(positions, x.shape[-1]).astype(dtype)
      x = x + shard(fixed, 'batch', 'sequence', None)
    if self.types is not None:
      x = x + shard(self.types[...], None, None)[0].astype(dtype)
    return self.norm(x) if self.norm is not None else x

  def weights(self, dtype) -> jax.Array:
    """Returns the token vectors [vocab, embed], gathered over 'embed' for the product of a tied head."""
    return gather(self.tokens[...].astype(dtype), 'vocab', None)

  def cost(self, length: int, encoder_length: int) -> Cost:
    return Cost(one_hot=self.one_hot)
