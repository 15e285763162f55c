"""FIXME: say what this module is."""

import dataclasses
from collections.abc import Callable

import jax
from flax import nnx

Part = Callable[..., nnx.Module]


@dataclasses.dataclass(frozen=True)
class Context:
  """What a part may look at besides its own input. `segments` is 0 where there is only padding."""

  positions: jax.Array  # [batch, length], from 0 in every packed document
  segments: jax.Array | None = None  # [batch, length], the packed document each token belongs to
  prefix: jax.Array | None = None  # [batch, length] bool, tokens that see each other both ways
  causal: bool = True
  bias: jax.Array | None = None  # [heads, 2 length - 1], by the distance key - query
  encoded: jax.Array | None = None  # [batch, encoder length, embed]
  encoded_segments: jax.Array | None = None  # [batch, encoder length]
