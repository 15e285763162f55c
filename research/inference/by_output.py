"""Matrices that are stored as [outputs, inputs], which a CPU multiplies faster with few rows."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.layers import Linear
from research.model.parameters import project
from research.model.weights import Weight


class ByOutput(Weight):
  """A plain matrix whose output axes come first; see `parameters.FEW_ROWS`."""

  def __init__(self, kernel: nnx.Param, inputs: int):
    """Transposes a kernel.

    Args:
      kernel: [inputs..., outputs...].
      inputs: how many axes are inputs.
    """
    self.axes = kernel.axes
    self.inputs = inputs
    order = *range(inputs, kernel.ndim), *range(inputs)
    axes = tuple(kernel.axes[i] for i in order)
    transposed = jnp.transpose(kernel[...], order)
    self.base = nnx.Param(transposed, axes=axes, kind=kernel.kind, active=kernel.active)

  def __getitem__(self, index) -> jax.Array:
    outputs = self.base.ndim - self.inputs
    order = *range(outputs, self.base.ndim), *range(outputs)
    return jnp.transpose(self.base[...], order)[index]

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    return project(x, self.base[...], self.base.axes, to, contract=self.inputs, transposed=True)


def turn_matrices(module: nnx.Module) -> None:
  """Replaces every plain matrix of the `Linear`s in a module by a `ByOutput`. Call it outside of the step.

  The matrices of stacked layers have one more axis and stay as they are: see `stack.separate_layers`.
  """
  for _, linear in nnx.iter_modules(module):
    if not isinstance(linear, Linear) or not isinstance(linear.kernel, nnx.Param):
      continue
    if linear.kernel.ndim == len(linear.kernel.axes):
      linear.kernel = ByOutput(linear.kernel, len(linear.inputs))
