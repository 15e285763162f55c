"""The buffer of rows of a mixture of experts: which choice has which row, and gathers into it and back.

A choice is one of the `active` experts of a token. `experts` describes the buffer.
"""

import math

import jax
import jax.numpy as jnp

from research.model.kernels.grouped import grouped_matmul


def weigh(y: jax.Array, weights: jax.Array) -> jax.Array:
  """Returns the weighted sum over each token's choices, [tokens, embed], of rows [tokens x choices, embed]."""
  weights = weights.reshape(-1, weights.shape[-1])
  y = y.reshape(*weights.shape, -1)
  return jnp.einsum('nke,nk->ne', y, weights.astype(y.dtype))


@jax.custom_vjp
def permute(x: jax.Array, index: jax.Array, inverse: jax.Array) -> jax.Array:
  """Returns x[index], and 0 for an index past the end. `inverse` makes the gradient a gather too."""
  return x.at[index].get(mode='fill', fill_value=0)


def _permute_forward(x, index, inverse):
  return permute(x, index, inverse), inverse


def _permute_backward(inverse, dy):
  return dy.at[inverse].get(mode='fill', fill_value=0), None, None


permute.defvjp(_permute_forward, _permute_backward)


def rank_in_group(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Returns each element's rank within its group, in order, and the sizes of the groups."""
  flat = group.reshape(-1)
  place = jnp.argsort(jnp.argsort(flat, stable=True))
  sizes = jnp.bincount(flat, length=groups + 1)
  return (place - (jnp.cumsum(sizes) - sizes)[flat]).reshape(group.shape), sizes[:groups]


def dropless_rows(index: jax.Array, experts: int):
  """Lays out a buffer in which every expert's rows start at a block.

  Returns:
    The row of every choice, the number of rows, and the product of the buffer with the experts' matrices.
  """
  rank, sizes = rank_in_group(index, experts)
  # About four blocks per expert: padding is at most an eighth, and the blocks are large enough to be fast.
  block = min(256, max(8, 2 ** math.ceil(math.log2(index.size / experts / 4 + 1))))
  sizes = -(-sizes // block) * block
  rows = (-(-index.size // block) + experts) * block
  start = jnp.append(jnp.cumsum(sizes) - sizes, rows)
  row = jnp.where(index < experts, start[index] + rank, rows)

  def matmul(x, w):
    return grouped_matmul(x, w, sizes, block)

  return row, rows, matmul


def capacity_rows(
  index: jax.Array, experts: int, all_experts: int, factor: float, places: int | None
):
  """As `dropless_rows`, with room in every expert for `factor` equal shares of a sequence, or for `places`."""
  batch, length, active = index.shape
  share = math.ceil(factor * length * active / all_experts)
  capacity = min(share if places is None else places, length)
  rows = experts * batch * capacity
  group = jnp.where(
    index < experts, index * batch + jnp.arange(batch)[:, None, None], experts * batch
  )
  rank, _ = rank_in_group(group, experts * batch)
  row = jnp.where((group < experts * batch) & (rank < capacity), group * capacity + rank, rows)

  def matmul(x, w):
    y = jnp.einsum('xre,xem->xrm', x.reshape(w.shape[0], -1, x.shape[-1]), w)
    return y.reshape(rows, -1)

  return row, rows, matmul
