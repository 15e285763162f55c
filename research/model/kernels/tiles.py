"""The tiles of attention in Pallas kernels for TPUs: which there are, where they lie, and the logits of one.

A tile has keys in rows and queries in columns: then maximum and sum over keys go over registers, and what
belongs to a query is a row.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from research.model.kernels import distance
from research.model.kernels.dot_product import HIDDEN

NT = (((1,), (1,)), ((), ()))  # a b^T
NN = (((1,), (0,)), ((), ()))  # a b
TN = (((0,), (0,)), ((), ()))  # a^T b


def dot(a, b, numbers):
  return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Tiles:
  """The static side of one attention.

  Attributes:
    block: the queries, and the keys, of a tile; a power of two that divides both lengths, at least 128.
    keys: how many of the keys are not padding at the end.
    causal: no token sees a later one.
    prefix: but tokens of a prefix see each other (`marks`).
    window: no token sees one that is so many places away or more.
    soft_cap: c in c tanh(logits / c).
    interpret: runs in Python, for tests.
  """

  block: int
  keys: int
  causal: bool
  prefix: bool = False
  window: int | None = None
  soft_cap: float | None = None
  interpret: bool = False

  def runs(self, ahead, i, j):
    """Returns whether some query of tile i may see a key of tile j, or True."""
    apart = ahead + (i - j) * self.block  # of the first query and the first key
    sees = True
    if self.causal and not self.prefix:
      sees = apart + self.block > 0
    if self.window is not None:
      sees = sees & (apart - self.block + 1 < self.window)
      if not self.causal or self.prefix:
        sees = sees & (apart + self.block - 1 > -self.window)
    return sees

  def key_tile(self, ahead, i, j, tiles: int):
    """Returns j, or the next tile of keys that tile i of queries needs: what is not needed is not read."""
    if self.prefix:
      return j
    if self.causal:
      j = jnp.minimum(j, _tile(ahead + (i + 1) * self.block - 1, self.block, tiles))
    if self.window is not None:
      j = jnp.maximum(j, _tile(ahead + i * self.block - self.window + 1, self.block, tiles))
    return j

  def query_tile(self, ahead, i, j, tiles: int):
    """Returns i, or the next tile of queries that sees tile j of keys."""
    if self.causal and not self.prefix:
      i = jnp.maximum(i, _tile(j * self.block - ahead, self.block, tiles))
    return i

  def sees(self, refs, ahead, i, j):
    """Returns the mask of a tile, [keys, queries], or None."""
    shape = (self.block, self.block)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    query = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    apart = query - key + (ahead + (i - j) * self.block)
    sees = []
    marks = None if refs.query_marks is None else (refs.query_marks[...], refs.key_marks[...])
    if self.causal and self.prefix:
      sees.append((apart >= 0) | (marks[0] & marks[1] & 1 == 1))
    elif self.causal:
      sees.append(apart >= 0)
    if self.window is not None:
      sees.append(jnp.abs(apart) < self.window)
    if marks is not None:
      sees.append(marks[0] ^ marks[1] < 2)
    if self.keys % self.block:
      sees.append(key < self.keys - j * self.block)
    return functools.reduce(jnp.logical_and, sees) if sees else None

  def logits(self, refs, ahead, i, j):
    """Returns the logits of a tile after soft cap, bias and mask, and those after the soft cap alone."""
    s = dot(refs.key[...], refs.query[...], NT)
    if self.soft_cap is not None:
      s = self.soft_cap * jnp.tanh(s / self.soft_cap)
    capped = s
    if refs.windows is not None:
      s = s + distance.spread(refs.windows[...])
    sees = self.sees(refs, ahead, i, j)
    return (s if sees is None else jnp.where(sees, s, HIDDEN)), capped

  def gradients(self, refs, saved, ahead, i, j):
    """Returns the weights of a tile, the gradients of its logits, and the logits after the soft cap alone."""
    dy, log_total, mean = saved
    s, capped = self.logits(refs, ahead, i, j)
    weights = jnp.exp(s - log_total[...])
    # d logits = weights (d weights - sum of weights d weights), and that sum is dy . y.
    return weights, weights * (dot(refs.value[...], dy[...], NT) - mean[...]), capped

  def uncapped(self, ds, capped):
    """Takes the gradient of logits after the soft cap to those before."""
    return ds if self.soft_cap is None else ds * (1 - jnp.square(capped / self.soft_cap))


def _tile(place, block: int, tiles: int):
  """Returns the tile of a place, or the nearest that there is."""
  return jnp.minimum(jax.lax.div(jnp.maximum(place, 0), block), tiles - 1)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['query', 'key', 'value', 'query_marks', 'key_marks', 'windows'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Operands:
  """What all kernels read. Lengths are multiples of a tile. Any but the first three may be None.

  Attributes:
    query: [batch, heads, queries, head_dim], times the factor of the logits.
    key: [batch, kv_heads, keys, head_dim].
    value: [batch, kv_heads, keys, head_dim of value].
    query_marks: int32 [batch, 1, queries]: twice the segment, plus 1 in a prefix.
    key_marks: int32 [batch, keys, 1].
    windows: of the bias (`distance.windows`), [heads, diagonals, 1, 2 block].
  """

  query: jax.Array
  key: jax.Array
  value: jax.Array
  query_marks: jax.Array | None = None
  key_marks: jax.Array | None = None
  windows: jax.Array | None = None


class At(NamedTuple):
  """Which rows of the batch a kernel works on, and where their tokens are.

  Attributes:
    ahead: by how many places the first query is after the first key.
    query_row: the first row of queries.
    key_row: the first row of keys.
    rows: how many rows; None is all of them.
  """

  ahead: jax.Array | int = 0
  query_row: jax.Array | int = 0
  key_row: jax.Array | int = 0
  rows: int | None = None

  @property
  def numbers(self) -> jax.Array:
    return jnp.stack([jnp.asarray(x, jnp.int32) for x in self[:3]])


class Grid:
  """Where the blocks of arrays are in the steps of a grid.

  `place(ahead, *indices)` returns row, head of queries, head of keys, tile of queries and tile of keys.
  """

  def __init__(self, tiles: Tiles, operands: Operands, at: At, place):
    self.tiles = tiles
    self.at = at
    self.rows = at.rows or operands.query.shape[0]
    self.block = tiles.block
    self.operands = operands
    self.place = place
    self.counts = tuple(x.shape[2] // tiles.block for x in (operands.query, operands.key))

  def spec(self, shape, index):
    from jax.experimental import pallas as pl

    def where(*args):
      *indices, at = args
      row, *others = self.place(at[0], *indices)
      return index(at[1] + row, at[2] + row, *others)

    return pl.BlockSpec(shape, where)

  def rows_of_query(self, size):
    return self.spec((None, None, self.block, size), lambda q, k, h, _, i, j: (q, h, i, 0))

  def rows_of_key(self, size):
    return self.spec((None, None, self.block, size), lambda q, k, _, h, i, j: (k, h, j, 0))

  def numbers_of_query(self):
    return self.spec((None, None, 1, self.block), lambda q, k, h, _, i, j: (q, h, 0, i))

  def inputs(self) -> Operands:
    x = self.operands
    marks = (None, None)
    windows = None
    if x.query_marks is not None:
      marks = (
        self.spec((None, 1, self.block), lambda q, k, h, _, i, j: (q, 0, i)),
        self.spec((None, self.block, 1), lambda q, k, h, _, i, j: (k, j, 0)),
      )
    if x.windows is not None:
      keys = self.counts[1]
      windows = self.spec(
        (None, None, 1, 2 * self.block), lambda q, k, h, _, i, j: (h, i - j + keys - 1, 0, 0)
      )
    return Operands(
      self.rows_of_query(x.query.shape[3]), self.rows_of_key(x.key.shape[3]),
      self.rows_of_key(x.value.shape[3]), *marks, windows,
    )  # fmt: skip

  def saved(self, saved):
    return self.rows_of_query(saved[0].shape[3]), self.numbers_of_query(), self.numbers_of_query()

  def cost(self, saved, outputs, products: tuple[int, int], *, once: str):
    """Returns what a kernel computes, and reads and writes. If `ahead` is no number, all tiles count.

    Args:
      saved: what the backward pass needs beside the operands, or ().
      outputs: what is written by rows, and read if that is in place.
      products: of weights and head_dim, and of weights and head_dim of value, as often as a tile has them.
      once: 'query' if the tiles of queries stay while those of keys pass by, or 'key'.
    """
    from jax.experimental import pallas as pl

    x = self.operands
    queries, keys = self.counts
    pairs = [(i, j) for i in range(queries) for j in range(keys)]
    if isinstance(self.at.ahead, int):
      pairs = [(i, j) for i, j in pairs if self.tiles.runs(self.at.ahead, i, j)]
    area = self.rows * x.query.shape[1] * len(pairs) * self.block**2
    of_queries = [x.query, x.query_marks, *saved]
    of_keys = [x.key, x.value, x.key_marks]
    stay, pass_by = (of_queries, of_keys) if once == 'query' else (of_keys, of_queries)
    # What passes by is read again for every tile that stays, if it has more than one tile.
    passing = keys if once == 'query' else queries
    again = len(pairs) / passing if passing > 1 else 1
    if once == 'query':
      again *= x.query.shape[1] // x.key.shape[1]
    nbytes = self.bytes(stay) + again * self.bytes(pass_by) + self.bytes(outputs)
    if x.windows is not None:
      nbytes += self.rows * x.query.shape[1] * len(pairs) * 2 * self.block * 4
    sizes = x.query.shape[3], x.value.shape[3]
    flops = 2 * area * sum(n * size for n, size in zip(products, sizes, strict=True))
    return pl.CostEstimate(flops=flops, transcendentals=area, bytes_accessed=int(nbytes))

  def bytes(self, tree) -> int:
    """Returns the bytes of the rows that a kernel works on."""
    arrays = jax.tree.leaves(tree)
    return sum(self.rows * math.prod(x.shape[1:]) * x.dtype.itemsize for x in arrays)
