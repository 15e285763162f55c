"""The contract between a stack and its parts, the modules that mix tokens or channels.

A *part* is a module `part(embed, **knobs, rngs=...)`. The parent passes `embed`; gin binds the knobs.
Attention, an MLP, a mixture of experts and a state-space layer are parts. So are the wirings
(`residual.PreNorm`), which contain parts, and stacks, which contain wirings. docs/parts.md shows how to write
one.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
from flax import nnx

from research.core.errors import UserError, first_line
from research.parallel.axes import split_axes, splits

# What gin binds for a part, a norm or a head: `factory(sizes from the parent, rngs=rngs)` returns the module.
Factory = Callable[..., nnx.Module]


@dataclasses.dataclass(frozen=True)
class Context:
  """What a part may use besides its own input. `segments` is 0 for padding."""

  positions: jax.Array  # [batch, length], from 0 in every packed document
  segments: jax.Array | None = None  # [batch, length], the packed document each token belongs to
  prefix: jax.Array | None = None  # [batch, length] bool, tokens that see each other both ways
  causal: bool = True
  bias: jax.Array | None = None  # [heads, 2 length - 1], by the distance key - query
  encoded: jax.Array | None = None  # [batch, encoder length, embed]
  encoded_segments: jax.Array | None = None  # [batch, encoder length]
  # In training, [batch]: a number that goes on from row to row, and from step to step.
  turns: jax.Array | None = None
  # In decoding: the cached arrays of the tokens before.
  state: 'DecodingState | None' = None
  # [batch, keys], the positions of the keys that `recall` returned; negative for empty entries of the cache.
  key_positions: jax.Array | None = None

  def recall(self, *new: jax.Array, window: int | None = None) -> tuple:
    """Adds the cached entries of earlier tokens to arrays with an entry per token, such as keys and values.

    Args:
      *new: [batch, length, heads, ...] or [batch, length, ...], of these tokens.
      window: the part never needs a token further back than this.

    Returns:
      The arrays and a context for them. In training both are unchanged. In decoding, after the prompt, the
      arrays have all cached tokens, and the context has their `key_positions`.
    """
    return (*new, self) if self.state is None else self.state.recall(new, self, window)

  def carry(self, f: Callable, initial):
    """Runs a recurrence f(state) -> (state, y) and returns y.

    It starts from `initial`; in decoding, from the state after the token before.
    """
    return f(initial)[1] if self.state is None else self.state.carry(f, initial)

  def once(self, *arrays: jax.Array) -> tuple:
    """Returns arrays that are the same for every token: in decoding, those of the first call."""
    return arrays if self.state is None else self.state.once(arrays)

  def reach(self, length: int) -> int:
    """Returns how far apart two tokens can be: the length; in decoding after the prompt, the cache's length."""
    return length if self.state is None or self.state.first else self.state.room


class DecodingState(Protocol):
  """The arrays that the parts of a model cache from call to call (`inference.state.State`).

  Parts use it through `Context`.

  Attributes:
    first: True in the call that reads the prompts.
    room: the most tokens that a row can have.
    requests: how often parts have called `recall`, `carry` or `once` in this call of the model.
  """

  first: bool
  room: int
  requests: int

  def recall(self, new: tuple, context: Context, window: int | None) -> tuple: ...

  def carry(self, f: Callable, initial): ...

  def once(self, arrays: tuple) -> tuple: ...

  def through_layers(self, layer: Callable, x: jax.Array, stacked) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a part costs beyond the products of its parameters with tokens, which `counts` adds by itself.

  All fields are for one forward pass of one sequence, unless they say otherwise.

  Attributes:
    full: FLOPs of mixing tokens (a multiplication and an addition are two), if every query saw every key.
    visible: the same for the pairs that a causal mask and the window leave. Equal to `full` for a recurrence.
    softmax: FLOPs of the softmax over all pairs, 3 per pair and head (Hoffmann et al. 2022, appendix F).
    cached: array elements that decoding caches per token of the part's own sequence.
    cached_encoder: array elements that decoding caches per token of the encoder's input.
    encoder_params: parameters that are multiplied with the encoder's tokens and not with the part's own.
    encoder_matrices: those of them that are matrices.
    one_hot: multiplications per token of the look-up of token vectors, written as a dense product.
    logits: multiplications per token of the matrix of the logits, embed x vocab.
  """

  full: float = 0
  visible: float = 0
  softmax: float = 0
  cached: int = 0
  cached_encoder: int = 0
  encoder_params: float = 0
  encoder_matrices: float = 0
  one_hot: int = 0
  logits: int = 0

  def __add__(self, other: 'Cost') -> 'Cost':
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
    return Cost(*(a + b for a, b in pairs))

  def times(self, repeats: int) -> 'Cost':
    """Returns the cost of `repeats` parts like this one."""
    return Cost(*(repeats * value for value in dataclasses.astuple(self)))


@runtime_checkable
class Part(Protocol):
  """The contract of parts, wirings and stacks: two methods. The only base class is nnx.Module."""

  def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the output, and scalars by name that training adds to the loss (most parts have none).

    Args:
      x: [batch, length, embed], as is the output. Its dtype is that of the computation: parameters stay float32
        and are cast where they are used.
      context: positions, packed documents, and which token may see which.
    """

  def cost(self, length: int, encoder_length: int) -> Cost:
    """Returns the cost for a sequence of `length` tokens; `encoder_length` is 0 without an encoder.

    A part that does not mix tokens returns `Cost()`.
    """


def check_part(part: nnx.Module) -> nnx.Module:
  """Returns the part.

  Raises:
    UserError: it has no method `cost`. Its FLOPs would be missing from C, the x-axis of every law.
  """
  if not isinstance(part, Part):
    missing = '__call__(x, context)' if not callable(part) else 'cost(length, encoder_length)'
    raise UserError(
      f'{type(part).__module__}.{type(part).__name__}: a part needs a method {missing}; docs/parts.md says '
      'what it returns (Cost() for a part that does not mix tokens).'
    )
  return part


def call_part(part: nnx.Module, x: jax.Array, context: Context) -> tuple[jax.Array, dict]:
  """Calls a part and checks its output.

  Raises:
    UserError: the output has another shape or dtype than x (a smaller shape would be broadcast silently), or
      the part does not run on this mesh. In decoding also: it mixes tokens without the cache of earlier ones.
  """
  name = f'{type(part).__module__}.{type(part).__name__}'
  requests = None if context.state is None else context.state.requests
  try:
    result = part(x, context)
  except Exception as error:
    if isinstance(error, UserError) or not (splits() and _is_about_sharding(error)):
      raise
    why = first_line(error)
    raise UserError(
      f'{name} does not run on this mesh, which splits {", ".join(split_axes())}: {why}. Move its arrays to '
      'the devices that need them with axes.shard(x, ...) (docs/parts.md), or choose another mesh.'
    ) from error
  if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
    raise UserError(f'{name} returned {type(result).__name__}; return (y, penalties by name).')
  y = result[0]
  if y.shape != x.shape or y.dtype != x.dtype:
    raise UserError(
      f'{name} returned {y.dtype}{list(y.shape)} for an input of {x.dtype}{list(x.shape)}; they must be alike.'
    )
  # A part without any cost of mixing (an MLP) needs no cache.
  if requests is not None and context.state.requests == requests and cost_of(part, 2, 2).full:
    raise UserError(
      f'{name} mixes tokens and keeps none of them, so it cannot decode: call context.recall or context.carry '
      'in it (docs/parts.md).'
    )
  return result


def _is_about_sharding(error: Exception) -> bool:
  # jax exports no class for these: it raises a private ShardingTypeError, or a ValueError with such words.
  text = f'{type(error).__name__} {error}'.lower()
  return any(word in text for word in ('shard', 'partitionspec', 'mesh'))


def cost_of(part: nnx.Module, length: int, encoder_length: int) -> Cost:
  """Returns the cost of a part (`Part.cost`).

  Raises:
    UserError: the part has no such method, or the method returns no `Cost`.
  """
  cost = check_part(part).cost(length, encoder_length)
  if not isinstance(cost, Cost):
    raise UserError(
      f'{type(part).__module__}.{type(part).__name__}.cost returned {cost!r}; return a part.Cost.'
    )
  return cost
