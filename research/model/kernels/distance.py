"""A bias by distance, tile by tile: every tile of a TPU kernel computes its own from a few numbers.

The bias of a query and a key depends on their distance alone, so a tile of block x block has 2 block - 1
different entries. These are its window: a row from which the tile follows by shifts, within the chip. Nothing
of the size [query, key] is in memory. A tile has keys in rows and queries in columns.
"""

import jax
import jax.numpy as jnp

SUBLANES = 8  # rows of a register


def windows(bias: jax.Array, queries: int, keys: int, block: int) -> jax.Array:
  """Returns the window of every diagonal of tiles; entries beyond the bias are zero.

  Args:
    bias: [heads, queries + keys - 1]: entry queries - 1 + d is for keys d places after the query.
    queries: how many queries there are.
    keys: how many keys there are.
    block: the queries, and the keys, of a tile.

  Returns:
    float32 [heads, diagonals, 1, 2 block]. That of tile i of queries and tile j of keys is at i - j + (tiles of
    keys) - 1. Entry block + d of it is for the query that is d further on in its tile than the key in its own.
  """
  before = -(-keys // block) * block - (keys - 1)
  after = -(-queries // block) * block - queries
  by_query = jnp.pad(bias[:, ::-1].astype(jnp.float32), ((0, 0), (before, after)))
  parts = by_query.reshape(bias.shape[0], -1, block)
  return jnp.concatenate([parts[:, :-1], parts[:, 1:]], axis=-1)[:, :, None]


def spread(window: jax.Array) -> jax.Array:
  """Turns a window [1, 2 block] into its tile [block of keys, block of queries], within a kernel."""
  from jax.experimental.pallas import tpu as pltpu

  block = window.shape[1] // 2
  # Row c is the window shifted by c. The first eight rows by the bits of c, the others from those before.
  rows = jnp.broadcast_to(window, (SUBLANES, 2 * block))
  row = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
  for shift in (1, 2, 4):
    rows = jnp.where(row & shift != 0, pltpu.roll(rows, shift, 1), rows)
  while rows.shape[0] < block:
    rows = jnp.concatenate([rows, pltpu.roll(rows, rows.shape[0], 1)], axis=0)
  return rows[:, block:]


def gathered(tile: jax.Array) -> jax.Array:
  """The transpose of `spread`, but for `finished`: sums a tile into [8, 2 block], within a kernel."""
  from jax.experimental.pallas import tpu as pltpu

  block = tile.shape[0]
  rows = jnp.concatenate([jnp.zeros_like(tile), tile], axis=1)
  while rows.shape[0] > SUBLANES:
    half = rows.shape[0] // 2
    rows = rows[:half] + pltpu.roll(rows[half:], 2 * block - half, 1)
  return rows


def finished(sums: jax.Array) -> jax.Array:
  """Turns the sums of `gathered`, [heads, diagonals, 8, 2 block], into gradients of `windows`."""
  rows = [jnp.roll(sums[:, :, c], -c, axis=-1) for c in range(SUBLANES)]
  return sum(rows)[:, :, None]
