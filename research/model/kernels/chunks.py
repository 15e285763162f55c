"""The product of a chunk of queries with a chunk of keys of the same sequence, and its gradients.

`Plain` is for any device, in XLA. `Fused` is for TPUs, by the kernels of `tile_kernels.py`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.model.kernels import distance, tile_kernels
from research.model.kernels.dot_product import FLOOR, logits
from research.model.kernels.tiled import block_of, mark, operands_of
from research.model.kernels.tiles import Tiles
from research.model.positions import by_place


class Block(NamedTuple):
  """Arrays of keys, [batch, chunk, ...] as in `ring_attention` (`Fused`: keys and values with heads first).

  In the ring the chunks of a device come before. Any may be None.
  """

  key: jax.Array | None
  value: jax.Array | None
  segments: jax.Array | None
  prefix: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Plain:
  """The static side of one attention. Chunks have `chunk` tokens, and chunk `number` is at number x chunk.

  The other attributes are as in `ring_attention`.
  """

  chunk: int
  causal: bool
  window: int | None
  scale: float
  soft_cap: float | None

  def enter(self, query, key, value):
    """Takes chunks [chunks, batch, chunk, kv_heads, (group,) head_dim] to the axes of this product."""
    return query, key, value

  def leave(self, y):
    """The inverse of `enter`, for the result."""
    return y

  def of_rows(self, x):
    """Takes an array of queries to the axes of sums over keys."""
    return jnp.swapaxes(x, 2, 3)

  def of_queries(self, x):
    """The inverse of `of_rows`."""
    return jnp.swapaxes(x, 2, 3)

  def forward(self, query, mine, theirs, number, other, bias):
    """Returns the normalised result, float32, and the logarithms of the sums of weights.

    Args:
      query: a chunk of queries.
      mine: what belongs to its tokens.
      theirs: a chunk of keys, and what belongs to them.
      number: which chunk of the sequence the queries are.
      other: which chunk the keys are.
      bias: [kv_heads, group, distances] of the whole sequence, or None.
    """
    s, _ = self.logits(query, mine, theirs, number, other, self.bias(bias, number, other))
    top = jnp.maximum(jnp.max(s, axis=-1), FLOOR)
    weights = jnp.exp(s - top[..., None])
    total = jnp.maximum(jnp.sum(weights, axis=-1), 1e-30)
    v = theirs.value
    y = jnp.einsum(
      'bkqgs,bskd->bkqgd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return y / total[..., None], top + jnp.log(total)

  def backward(self, query, mine, theirs, number, other, bias, saved, learns):
    """Returns the gradients of queries, keys, values and bias, float32.

    Args:
      query: as in `forward`, and so are the next five.
      mine: see above.
      theirs: see above.
      number: see above.
      other: see above.
      bias: see above.
      saved: of the queries: the gradient of the result, the logarithms of the sums of weights over all chunks,
        and the sums over head_dim of results and their gradients.
      learns: whether the bias needs its gradient.
    """
    del learns  # XLA leaves out what nothing needs
    dy, log_total, mean = saved
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    term, add_bias = None, None
    if bias is not None:
      term, add_bias = jax.vjp(functools.partial(self.bias, number=number, other=other), bias)
    s, capped = self.logits(query, mine, theirs, number, other, term)
    weights = jnp.exp(s - log_total[..., None])
    # d logits = weights (d weights - sum of weights d weights), and that sum is dy . y.
    ds = weights * (dot('bqkgd,bskd->bkqgs', dy, theirs.value) - mean[..., None])
    d_bias = None
    if bias is not None:
      d_bias = add_bias(jnp.sum(ds, axis=0, keepdims=True).astype(bias.dtype))[0]
    if self.soft_cap is not None:
      ds = ds * (1 - jnp.square(capped / self.soft_cap))
    weights, ds = weights.astype(dy.dtype), ds.astype(query.dtype)
    dq = dot('bkqgs,bskd->bqkgd', ds, theirs.key) * self.scale
    dk = dot('bkqgs,bqkgd->bskd', ds, query * self.scale)
    return dq, dk, dot('bkqgs,bqkgd->bskd', weights, dy), d_bias

  def logits(self, query, mine, theirs, number, other, bias):
    mask = self.mask(mine, theirs, number, other)
    return logits(self.scale, self.soft_cap, query, theirs.key, mask, bias)

  def mask(self, mine, theirs, number, other):
    """Returns the mask of two chunks, [batch or 1, 1, chunk, 1, chunk] bool, or None."""
    place = jnp.arange(self.chunk)
    apart = (number - other) * self.chunk + place[:, None] - place[None, :]
    see = None
    if self.causal:
      see = (apart >= 0)[None]
      if mine.prefix is not None:
        see = see | (mine.prefix[:, :, None] & theirs.prefix[:, None, :])
    if self.window is not None:
      near = (jnp.abs(apart) < self.window)[None]
      see = near if see is None else see & near
    if mine.segments is not None:
      same = mine.segments[:, :, None] == theirs.segments[:, None, :]
      see = same if see is None else see & same
    return None if see is None else see[:, None, :, None]

  def bias(self, bias, number, other):
    """Returns the bias of two chunks, [1, kv_heads, chunk, group, chunk], or None."""
    if bias is None:
      return None
    return jnp.swapaxes(by_place(self.near(bias, number, other), self.chunk), 1, 2)[None]

  def near(self, bias, number, other):
    """Returns the distances of two chunks, [kv_heads, group, 2 chunk - 1], of those of the sequence."""
    start = (other - number) * self.chunk + (bias.shape[-1] + 1) // 2 - self.chunk
    return jax.lax.dynamic_slice_in_dim(bias, start, 2 * self.chunk - 1, axis=2)


@dataclasses.dataclass(frozen=True)
class Fused(Plain):
  """The same with [batch, heads, chunk, head_dim], without [query, key] in memory.

  Attributes:
    interpret: runs the kernels in Python, for tests.
  """

  interpret: bool = False

  def enter(self, query, key, value):
    chunks, batch, chunk, kv_heads, group, size = query.shape
    query = query.reshape(chunks, batch, chunk, kv_heads * group, size)
    return tuple(jnp.swapaxes(x, 2, 3) for x in (query, key, value))

  def leave(self, y):
    return jnp.swapaxes(y, 2, 3)

  def of_rows(self, x):
    return x

  def of_queries(self, x):
    return x

  def forward(self, query, mine, theirs, number, other, bias):
    windows = self.bias(bias, number, other)
    tiles, operands, ahead = self.operands(query, mine, theirs, number, other, windows)
    y, log_total = tile_kernels.forward(tiles, operands, ahead, jnp.float32)
    return y, log_total[:, :, 0]

  def backward(self, query, mine, theirs, number, other, bias, saved, learns):
    windows, add_bias = None, None
    if bias is not None:
      windows, add_bias = jax.vjp(functools.partial(self.bias, number=number, other=other), bias)
    arguments = self.operands(query, mine, theirs, number, other, windows)
    dy, log_total, mean = saved
    saved = (dy, log_total[:, :, None], mean[:, :, None])
    dq, d_windows = tile_kernels.backward_query(*arguments, saved, jnp.float32, d_bias=learns)
    dk, dv = tile_kernels.backward_keys(*arguments, saved, jnp.float32)
    d_bias = None
    if bias is not None:
      d_bias = add_bias(d_windows)[0] if learns else jnp.zeros_like(bias)
    return dq * self.scale, dk, dv, d_bias

  def operands(self, query, mine, theirs, number, other, windows):
    """Returns the arguments of the kernels."""
    marks = None
    if mine.segments is not None or mine.prefix is not None:
      marks = (mark(mine.segments, mine.prefix), mark(theirs.segments, theirs.prefix))
    tiles = Tiles(
      block_of(self.chunk, self.chunk), self.chunk, self.causal, mine.prefix is not None,
      self.window, self.soft_cap, self.interpret,
    )  # fmt: skip
    operands = operands_of(query * self.scale, theirs.key, theirs.value, windows, marks)
    return tiles, operands, (number - other) * self.chunk

  def bias(self, bias, number, other):
    """Returns the windows of the tiles of two chunks (`distance.windows`), or None."""
    if bias is None:
      return None
    near = self.near(bias, number, other).reshape(-1, 2 * self.chunk - 1)
    return distance.windows(near, self.chunk, self.chunk, block_of(self.chunk, self.chunk))
