"""Products of training with a large table of vectors, such as a tied head, in the forms fastest on a CPU.

XLA gives the products of a train step to Eigen there (research/training/background_jit.py). These two are the
exceptions. The measurements are in experiments/speed/README.md, "Products by Eigen".
"""

import math

import jax
import jax.numpy as jnp

# A product of fewer weights or fewer rows is not worth a special form. With longer vectors it is slower.
WEIGHTS = 2**21
ROWS = 2048
VECTOR = 256


def is_large(x: jax.Array, inputs: int, kernel: jax.Array) -> bool:
  """Returns whether the product of x, whose last `inputs` axes are contracted, has a special form."""
  rows = math.prod(x.shape[: x.ndim - inputs])
  contracted = math.prod(x.shape[x.ndim - inputs :])
  is_narrow = min(contracted, kernel.size // contracted) <= VECTOR
  return is_narrow and kernel.size >= WEIGHTS and rows >= ROWS and rows % 2 == 0


def turned(kernel: jax.Array) -> jax.Array:
  """Returns a kernel [outputs, inputs] as [inputs, outputs], in a copy.

  Eigen's product with the copy takes a fifth less time than with the kernel; the copy takes little.
  Without the barrier XLA would put the kernel back.
  """
  return jax.lax.optimization_barrier(jnp.swapaxes(kernel, 0, 1))


def sum_of_products(a: jax.Array, b: jax.Array, lead: int, dtype) -> jax.Array:
  """Contracts the first `lead` axes of a and b, the smaller first.

  The product of each half of the rows is one of YNNPACK and not of Eigen, since XLA computes a product that is
  only added up together with the sum, and sums are YNNPACK's.

  Returns:
    [*axes of a, *axes of b] after the first `lead`.
  """
  first = a.reshape(2, -1, *a.shape[lead:])
  first = jax.lax.optimization_barrier(jnp.moveaxis(first, 1, -1))
  second = b.reshape(2, -1, *b.shape[lead:])
  halves = jax.lax.dot_general(
    first, second, (((first.ndim - 1,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32
  )
  return jnp.sum(halves, axis=0).astype(dtype)
