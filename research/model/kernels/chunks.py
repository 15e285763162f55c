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
from research.model.kernels.tiles import At, Tiles
from research.model.positions import by_place


class Block(NamedTuple):
  """Arrays of keys, [chunks, batch, chunk, ...]. Any may be None."""

  key: jax.Array | None
  value: jax.Array | None
  segments: jax.Array | None
  prefix: jax.Array | None


class Pair(NamedTuple):
  """A chunk of queries and a chunk of keys: which of those at hand, and which of the sequence."""

  i: jax.Array | int
  j: jax.Array | int
  number: jax.Array | int
  other: jax.Array | int


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
    """Takes chunks [chunks, batch, chunk, kv_heads, (group,) head_dim] to those of this product, scaled."""
    return query * self.scale, key, value

  def leave(self, y):
    """The inverse of `enter`, for the result."""
    return y

  def start(self, query, value):
    """Returns the sums over no keys: the result, float32, and the logarithms of the sums of weights."""
    rows = jnp.swapaxes(query, 2, 3).shape[:-1]
    y = jnp.zeros((*rows, value.shape[-1]), jnp.float32)
    return y, jnp.full(rows, FLOOR, jnp.float32)

  def finish(self, sums, dtype):
    """Returns the result, with the axes of the queries, and the logarithms of the sums of weights."""
    return jnp.swapaxes(sums[0].astype(dtype), 2, 3), sums[1]

  def saved(self, dy, y, log_total):
    """Returns what the backward pass needs: dy, the logarithms, and the sums of dy y over head_dim."""
    mean = jnp.sum(dy.astype(jnp.float32) * y, axis=-1)
    return dy, log_total, jnp.swapaxes(mean, 2, 3)

  def forward(self, sums, query, block, passing, pair: Pair, bias):
    """Returns the sums with those of a pair of chunks.

    Args:
      sums: those so far (`start`).
      query: all chunks of queries.
      block: what belongs to their tokens.
      passing: all chunks of keys, and what belongs to them.
      pair: the two chunks.
      bias: [kv_heads, group, distances] of the whole sequence, or None.
    """
    s, _ = self.logits(query, block, passing, pair, self.bias(bias, pair.number, pair.other))
    top = jnp.maximum(jnp.max(s, axis=-1), FLOOR)
    weights = jnp.exp(s - top[..., None])
    total = jnp.maximum(jnp.sum(weights, axis=-1), 1e-30)
    v = _entry(passing.value, pair.j)
    part = jnp.einsum(
      'bkqgs,bskd->bkqgd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    y, log_total = (_entry(x, pair.i) for x in sums)
    new = jnp.logaddexp(log_total, top + jnp.log(total))
    old, fresh = (jnp.exp(x - new)[..., None] for x in (log_total, top))
    updated = (y * old + part * fresh, new)
    return tuple(x.at[pair.i].set(y) for x, y in zip(sums, updated, strict=True))

  def backward(self, sums, query, block, passing, pair: Pair, bias, saved, learns):
    """Returns the sums with those of a pair of chunks, and the bias's gradient of this pair alone.

    Args:
      sums: the gradients of all chunks so far, float32: of queries, keys and values.
      query: as in `forward`, and so are the next four.
      block: see above.
      passing: see above.
      pair: see above.
      bias: see above.
      saved: `saved`, with the logarithms over all keys.
      learns: whether the bias needs its gradient.
    """
    del learns  # XLA leaves out what nothing needs
    dy, log_total, mean = (_entry(x, pair.i) for x in saved)
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    term, add_bias = None, None
    if bias is not None:
      of_pair = functools.partial(self.bias, number=pair.number, other=pair.other)
      term, add_bias = jax.vjp(of_pair, bias)
    s, capped = self.logits(query, block, passing, pair, term)
    weights = jnp.exp(s - log_total[..., None])
    # d logits = weights (d weights - sum of weights d weights), and that sum is dy . y.
    key, value = (_entry(x, pair.j) for x in (passing.key, passing.value))
    ds = weights * (dot('bqkgd,bskd->bkqgs', dy, value) - mean[..., None])
    d_bias = None
    if bias is not None:
      d_bias = add_bias(jnp.sum(ds, axis=0, keepdims=True).astype(bias.dtype))[0]
    if self.soft_cap is not None:
      ds = ds * (1 - jnp.square(capped / self.soft_cap))
    weights, ds = weights.astype(dy.dtype), ds.astype(query.dtype)
    dq, dk, dv = sums
    dq = dq.at[pair.i].add(dot('bkqgs,bskd->bqkgd', ds, key))
    dk = dk.at[pair.j].add(dot('bkqgs,bqkgd->bskd', ds, _entry(query, pair.i)))
    dv = dv.at[pair.j].add(dot('bkqgs,bqkgd->bskd', weights, dy))
    return (dq, dk, dv), d_bias

  def logits(self, query, block, passing, pair, bias):
    mine, theirs = _entry(block, pair.i), _entry(passing, pair.j)
    mask = self.mask(mine, theirs, pair.number, pair.other)
    return logits(1, self.soft_cap, _entry(query, pair.i), theirs.key, mask, bias)

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
  """The same with [chunks, batch, heads, chunk, head_dim], without [query, key] in memory, updated in place.

  Attributes:
    interpret: runs the kernels in Python, for tests.
  """

  interpret: bool = False

  @property
  def block(self) -> int:
    """The size of tiles. Most pairs of chunks have no hidden tiles, so large ones waste nothing."""
    return block_of(self.chunk, self.chunk, most=1024)

  def enter(self, query, key, value):
    chunks, batch, chunk, kv_heads, group, size = query.shape
    query = query.reshape(chunks, batch, chunk, kv_heads * group, size) * self.scale
    return tuple(jnp.swapaxes(x, 2, 3) for x in (query, key, value))

  def leave(self, y):
    return jnp.swapaxes(y, 2, 3)

  def start(self, query, value):
    y = jnp.zeros((*query.shape[:-1], value.shape[-1]), jnp.float32)
    return y, jnp.full((*query.shape[:3], 1, query.shape[3]), FLOOR, jnp.float32)

  def finish(self, sums, dtype):
    return sums[0].astype(dtype), sums[1]

  def saved(self, dy, y, log_total):
    return dy, log_total, jnp.sum(dy.astype(jnp.float32) * y, axis=-1)[..., None, :]

  def forward(self, sums, query, block, passing, pair, bias):
    windows = self.bias(bias, pair.number, pair.other)
    arguments = self.arguments(query, block, passing, pair, windows)
    updated = tile_kernels.forward(*arguments, jnp.float32, tuple(map(_rows, sums)))
    return tuple(y.reshape(x.shape) for x, y in zip(sums, updated, strict=True))

  def backward(self, sums, query, block, passing, pair, bias, saved, learns):
    windows, add_bias = None, None
    if bias is not None:
      of_pair = functools.partial(self.bias, number=pair.number, other=pair.other)
      windows, add_bias = jax.vjp(of_pair, bias)
    arguments = (*self.arguments(query, block, passing, pair, windows), tuple(map(_rows, saved)))
    dq, dk, dv = map(_rows, sums)
    dq, d_windows = tile_kernels.backward_query(*arguments, jnp.float32, dq, d_bias=learns)
    dk, dv = tile_kernels.backward_keys(*arguments, jnp.float32, (dk, dv))
    d_bias = None
    if bias is not None:
      d_bias = add_bias(d_windows)[0] if learns else jnp.zeros_like(bias)
    return tuple(y.reshape(x.shape) for x, y in zip(sums, (dq, dk, dv), strict=True)), d_bias

  def arguments(self, query, block, passing, pair, windows):
    """Returns the arguments of the kernels. They work on the chunks where they are, as rows of the batch."""
    marks = None
    if block.segments is not None or block.prefix is not None:
      marks = tuple(_rows(mark(x.segments, x.prefix)) for x in (block, passing))
    tiles = Tiles(
      self.block, self.chunk, self.causal, block.prefix is not None,
      self.window, self.soft_cap, self.interpret,
    )  # fmt: skip
    arrays = map(_rows, (query, passing.key, passing.value))
    batch = query.shape[1]
    ahead = (pair.number - pair.other) * self.chunk
    at = At(ahead, pair.i * batch, pair.j * batch, batch)
    return tiles, operands_of(*arrays, windows, marks), at

  def bias(self, bias, number, other):
    """Returns the windows of the tiles of two chunks (`distance.windows`), or None."""
    if bias is None:
      return None
    near = self.near(bias, number, other).reshape(-1, 2 * self.chunk - 1)
    return distance.windows(near, self.chunk, self.chunk, self.block)


def _entry(tree, slot):
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, slot, keepdims=False), tree)


def _rows(x):
  """Takes [chunks, batch, ...] to rows of one batch."""
  return x.reshape(-1, *x.shape[2:])
