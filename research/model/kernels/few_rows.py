"""The product of few rows with a kernel [outputs, inputs], in the form that XLA computes fastest on a CPU.

The measurements are in experiments/speed/README.md, "Decoding".
"""

import math

import jax
import jax.numpy as jnp

# For so many rows or fewer (the tokens of a decoding step), kernel times columns is the faster form.
FEW_ROWS = 32
# XLA gives a product of so few weights with one column to a single core. A batch of PARTS products it spreads
# over all cores.
ONE_CORE = 2**19
PARTS = 4
# Fewer weights are read before a second core has begun.
SMALLEST = 2**17


def few_rows(x: jax.Array, kernel: jax.Array, inputs: int, to: jax.P | None, dtype) -> jax.Array:
  """Multiplies rows with a kernel, as kernel times columns.

  XLA on a CPU copies the second operand of every product to another layout. Here that is the small operand. The
  barriers keep XLA from swapping the operands back.

  Args:
    x: [rows..., inputs...].
    kernel: [outputs..., inputs...], on a mesh that splits nothing.
    inputs: how many axes are inputs.
    to: the sharding of the result, or None.
    dtype: that of the result.

  Returns:
    [rows..., outputs...].
  """
  lead = x.ndim - inputs
  rank = kernel.ndim - inputs  # how many axes are outputs
  columns = jax.lax.optimization_barrier(jnp.moveaxis(x, range(lead), range(-lead, 0)))
  if _on_one_core(kernel, columns, rank):
    y = _in_parts(kernel, columns, rank, dtype).reshape(*kernel.shape[:rank], *x.shape[:lead])
  else:
    if to is not None:
      to = jax.P(*to[lead:], *to[:lead])
    contract = (tuple(range(rank, kernel.ndim)), tuple(range(inputs)))
    y = jax.lax.dot_general(
      kernel, columns, (contract, ((), ())), preferred_element_type=dtype, out_sharding=to
    )
    y = jax.lax.optimization_barrier(y)
  return jnp.moveaxis(y, range(rank), range(-rank, 0))


def _on_one_core(kernel: jax.Array, columns: jax.Array, rank: int) -> bool:
  """Returns whether XLA would use one core for a product that several could divide."""
  outputs = math.prod(kernel.shape[:rank])
  one_column = columns.size * outputs == kernel.size
  return one_column and SMALLEST <= kernel.size < ONE_CORE and outputs % PARTS == 0


def _in_parts(kernel: jax.Array, column: jax.Array, rank: int, dtype) -> jax.Array:
  """Returns the product with one column as a batch of products, [PARTS, outputs / PARTS]."""
  outputs = math.prod(kernel.shape[:rank])
  parts = kernel.reshape(PARTS, outputs // PARTS, column.size)
  column = jnp.broadcast_to(column.reshape(1, column.size), (PARTS, column.size))
  column = jax.lax.optimization_barrier(column)
  y = jax.lax.dot_general(parts, column, (((2,), (1,)), ((0,), (0,))), preferred_element_type=dtype)
  return jax.lax.optimization_barrier(y)
