"""The first layer of every model: turns tokens into vectors."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid
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
    noise: alpha of the noise on token vectors in training (NEFTune, Jain et al. 2023, arXiv:2310.05914,
      equation 1; they took 5, 10 and 15). 0 for none.
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
    noise: float = 0.0,
    init: Initializer = normal,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    check_sizes(Embedder, positions=positions, types=types)
    if not noise >= 0:
      raise Invalid(Embedder, 'noise', f'{noise!r} must be 0 or more.')
    self.noise = noise
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

  def __call__(
    self,
    tokens: jax.Array,
    positions: jax.Array,
    dtype,
    seeds: jax.Array | None = None,
    segments: jax.Array | None = None,
  ) -> jax.Array:
    """The vectors [batch, length, embed] of tokens.

    Args:
      tokens, positions: [batch, length].
      seeds: of the noise of each row, uint32 [batch, 2]; None for no noise.
      segments: [batch, length], of packed rows. The noise of a token depends on the length of its segment.
    """
    x = rows(self.tokens, 'vocab', tokens, dtype)
    if seeds is not None and self.noise:
      x = x + self.noise * uniform_noise(seeds, segments, x)
    x = x * self.scale
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


def uniform_noise(seeds: jax.Array, segments: jax.Array | None, x: jax.Array) -> jax.Array:
  """Uniform numbers within +-1 / sqrt(L embed), L being the tokens of a segment: Jain et al. 2023, equation 1.

  Args:
    seeds: uint32 [batch, 2]; each row has its own, so that the noise does not depend on how a batch is cut.
    segments: [batch, length]; without them L is the length of the row.
    x: [batch, length, embed], whose shape, type and sharding the noise has.
  """

  def of_row(seed):
    key = jax.random.wrap_key_data(seed, impl='threefry2x32')
    return jax.random.uniform(key, x.shape[1:], x.dtype, -1.0, 1.0)

  noise = shard(jax.vmap(of_row)(seeds), 'batch', 'sequence', None)
  length = x.shape[1]
  if segments is not None:
    whole = shard(segments, 'batch', None)
    same = shard(segments, 'batch', 'sequence')[:, :, None] == whole[:, None, :]
    length = jnp.sum(same, axis=-1, keepdims=True)
  return noise * jax.lax.rsqrt(jnp.asarray(length * x.shape[-1], jnp.float32)).astype(x.dtype)
