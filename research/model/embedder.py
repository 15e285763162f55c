"""FIXME: say what this module is."""

from collections.abc import Callable

import jax
from flax import nnx

from research.model.parameters import Initializer, check_sizes, look_up, normal, param
from research.model.part import Part
from research.parallel.axes import gather, shard

# A number, or how it follows from `embed`: then it is right at every width of a ladder.
Scale = float | Callable[[int], float]


def inverse_sqrt(embed: int) -> float:
  """embed^-1/2: a `Scale` (T5 1.0, PaLM)."""
  return embed**-0.5


class Embedder(nnx.Module):
  """Tokens (and, where learned, positions and a type) to vectors.

  Knobs:
    positions: how many learned positions there are (GPT-2, BERT); None for none.
    position_offset: the row of position 0 (OPT has 2 rows before it, so its table has 2 more).
    fixed_positions: added too, `positions.sinusoidal`.
    types: how many token types (BERT); tokens are of type 0.
    scale: of the token vectors, a number or a function of embed (Gemma: `math.sqrt`).
    norm: after the sum (BERT, BLOOM).
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
    norm: Part | None = None,
    init: Initializer = normal,
    rngs: nnx.Rngs,
  ):
    check_sizes(Embedder, positions=positions, types=types)
    self.scale = scale(embed) if callable(scale) else scale
    self.position_offset, self.fixed_positions = position_offset, fixed_positions
    table = lambda n, axis: param(rngs, (n, embed), (axis, 'embed'), init) if n else None
    self.tokens, self.positions, self.types = (
      table(vocab, 'vocab'),
      table(positions, None),
      table(types, None),
    )
    self.norm = norm(embed, rngs=rngs) if norm else None

  def __call__(self, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    x = look_up(self.tokens[...].astype(dtype), 'vocab', tokens) * self.scale
    if self.positions is not None:
      x = x + look_up(self.positions[...].astype(dtype), None, positions + self.position_offset)
    if self.fixed_positions is not None:
      fixed = self.fixed_positions(positions, x.shape[-1]).astype(dtype)
      x = x + shard(fixed, 'batch', 'sequence', None)
    if self.types is not None:
      x = x + shard(self.types[...], None, None)[0].astype(dtype)
    return self.norm(x) if self.norm is not None else x

  def weights(self, dtype) -> jax.Array:
    """The token vectors [vocab, embed], gathered to multiply with."""
    return gather(self.tokens[...].astype(dtype), 'vocab', None)
