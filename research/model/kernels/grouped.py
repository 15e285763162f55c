"""Matrix products of consecutive groups of rows, each group with its own matrix."""

import functools

import jax
import jax.numpy as jnp

from research.model.kernels.tiled import LANES
from research.parallel.mesh import platform

TILE = 2048  # bytes along each side of a tile of a matrix: 1,024 numbers of bfloat16
# Bytes of fast memory for the tiles of a step. With what the compiler adds they come to 14.8 MiB at most on v4
# and v5e, which have 16 for a kernel.
FAST_MEMORY = 13.5 * 2**20


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(x: jax.Array, w: jax.Array, sizes: jax.Array, block: int) -> jax.Array:
  """Returns y[r] = x[r] w[g] for every row r of group g. Rows after the last group are unspecified.

  On TPUs this is megablox, jax's own Pallas kernels, where they serve (`_suits_megablox`). On other
  accelerators it is `jax.lax.ragged_dot`. On a CPU that would multiply every row with every matrix, so there a
  loop goes over the blocks of every group, and the cost is proportional to the rows.

  Args:
    x: [rows, inputs]; rows is a multiple of block.
    w: [groups, inputs, outputs].
    sizes: [groups] integers, each a multiple of block, their sum at most rows.
    block: rows per step of the loop, static.
  """
  return jax.lax.platform_dependent(
    x, w, sizes,
    cpu=functools.partial(_blocks, block=block, transpose=False),
    default=functools.partial(_accelerated, block=block),
  )  # fmt: skip


def _accelerated(x, w, sizes, *, block):
  if _suits_megablox(x, w, block):
    return _megablox(x, w, sizes, block, transpose=False)
  return _ragged(x, w, sizes)


def _ragged(x, w, sizes):
  if w.shape[0] > 1:
    return jax.lax.ragged_dot(x, w, sizes)
  # XLA's TPU backend fails to lower a ragged_dot of a single group (one expert per device).
  mine = jnp.arange(x.shape[0])[:, None] < sizes[0]
  return jnp.where(mine, x, 0) @ w[0]


def _forward(x, w, sizes, block):
  return grouped_matmul(x, w, sizes, block), (x, w, sizes)


def _backward(block, residuals, dy):
  def cpu(x, w, sizes, dy):
    return _blocks(dy, w, sizes, block=block, transpose=True), _outer(x, dy, sizes, block)

  def default(x, w, sizes, dy):
    if _suits_megablox(x, w, block):
      dx = _megablox(dy, w, sizes, block, transpose=True)
      # It leaves the rows after the last group as they were in memory: perhaps no numbers.
      dx = jnp.where(jnp.arange(dx.shape[0])[:, None] < jnp.sum(sizes), dx, 0)
      return dx, _megablox_outer(x, dy, sizes, w.dtype, block)
    return jax.vjp(lambda x, w: _ragged(x, w, sizes), x, w)[1](dy)

  dx, dw = jax.lax.platform_dependent(*residuals, dy, cpu=cpu, default=default)
  return dx, dw, None


grouped_matmul.defvjp(_forward, _backward)


def _suits_megablox(x, w, block) -> bool:
  """Returns whether megablox multiplies on the devices in use.

  Its tiles of rows are our blocks, so that no tile belongs to two groups, which it would compute twice. Smaller
  blocks than LANES, of few rows, would leave most of a TPU's matrix unit idle.
  """
  known = x.dtype == w.dtype and x.dtype in (jnp.bfloat16, jnp.float32)
  return platform() == 'tpu' and w.shape[0] > 1 and block % LANES == 0 and known


def _tile(size: int, limit: int) -> int:
  """Returns the tile of an axis: all of it, or the multiple of LANES at most `limit` that pads least."""
  tiles = -(-size // limit)
  return size if tiles == 1 else -(-size // (tiles * LANES)) * LANES


def _tiles(block: int, inputs: int, outputs: int, dtype) -> tuple[int, int, int]:
  """Returns megablox's tiles of rows, inputs and outputs for a product with rows."""
  number = jnp.dtype(dtype).itemsize
  # A tile with all inputs stays where it is from one block of a group to the next: matrices are read once.
  tile = _tile(outputs, TILE // number // 2)
  # Two of everything, one of which is on its way, and the sum in float32.
  memory = 2 * number * (block * inputs + inputs * tile + block * tile) + 4 * block * tile
  if memory <= FAST_MEMORY:
    return block, inputs, tile
  return block, _tile(inputs, TILE // number), _tile(outputs, TILE // number)


def _megablox(x, w, sizes, block, *, transpose):
  """`grouped_matmul` by megablox; `transpose` multiplies with the transposed matrices."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

  inputs, outputs = (w.shape[2], w.shape[1]) if transpose else w.shape[1:]
  # Without any row the kernel's grid would have no step. Rows after the last group may be anything.
  sizes = jnp.asarray(sizes, jnp.int32)
  sizes = sizes.at[0].add(jnp.where(jnp.sum(sizes) == 0, block, 0))
  tiles = _tiles(block, inputs, outputs, x.dtype)
  return gmm(x, w, sizes, x.dtype, tiles, transpose_rhs=transpose)


def _megablox_outer(x, dy, sizes, dtype, block):
  """`_outer` by megablox."""
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  side = TILE // x.dtype.itemsize
  tiles = (block, _tile(x.shape[1], side), _tile(dy.shape[1], side))
  return tgmm(x.T, dy, jnp.asarray(sizes, jnp.int32), dtype, tiles)


def _bounds(sizes, block):
  """Returns the first block of every group, and the block after its last one."""
  end = jnp.cumsum(sizes) // block
  return end - sizes // block, end


def _rows(x, i, block):
  return jax.lax.dynamic_slice_in_dim(x, i * block, block)


def _dot(a, b, contract):
  """Returns the product of a and b in float32, contracted over axis contract[0] of a and contract[1] of b."""
  numbers = (((contract[0],), (contract[1],)), ((), ()))
  return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _blocks(x, w, sizes, *, block, transpose):
  """`grouped_matmul` by a loop over blocks; `transpose` multiplies with the transposed matrices."""
  first, last = _bounds(sizes, block)

  def group(g, y):
    matrix = w[g]

    def step(i, y):
      rows = _dot(_rows(x, i, block), matrix, (1, 1 if transpose else 0)).astype(y.dtype)
      return jax.lax.dynamic_update_slice_in_dim(y, rows, i * block, 0)

    return jax.lax.fori_loop(first[g], last[g], step, y)

  y = jnp.zeros((x.shape[0], w.shape[1 if transpose else 2]), x.dtype)
  return jax.lax.fori_loop(0, w.shape[0], group, y)


def _outer(x, dy, sizes, block):
  """Returns x^T dy over the rows of every group, [groups, inputs, outputs]."""
  first, last = _bounds(sizes, block)

  def group(g, dw):
    def step(i, total):
      return total + _dot(_rows(x, i, block), _rows(dy, i, block), (0, 0))

    total = jnp.zeros(dw.shape[1:], jnp.float32)
    total = jax.lax.fori_loop(first[g], last[g], step, total)
    return dw.at[g].set(total.astype(dw.dtype))

  dw = jnp.zeros((sizes.shape[0], x.shape[1], dy.shape[1]), x.dtype)
  return jax.lax.fori_loop(0, sizes.shape[0], group, dw)
