"""Matrices that are stored as [outputs, inputs], which a CPU multiplies faster with few rows.

Matrices with the same input are also stored as one, since a product of a few hundred outputs is too small for
all cores: see experiments/speed/README.md, "Decoding".
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.layers import Linear
from research.model.parameters import project
from research.model.weights import Weight
from research.parallel.axes import splits


class ByOutput(Weight):
  """A plain matrix whose output axes come first; see `model.kernels.few_rows`."""

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


class Joined(Weight):
  """A matrix that is some rows of a larger one, which has the outputs of all matrices with the same input.

  Each of these computes the whole product and takes its own part. The products are equal, and XLA keeps one.
  """

  def __init__(self, base: nnx.Param, start: int, outputs: tuple[int, ...]):
    """Names the rows.

    Args:
      base: [outputs of all, inputs...].
      start: the first row.
      outputs: the sizes of the output axes of this matrix.
    """
    self.base = base
    self.start = start
    self.outputs = outputs

  @property
  def stop(self) -> int:
    """The row after the last."""
    return self.start + math.prod(self.outputs)

  def __getitem__(self, index) -> jax.Array:
    mine = jnp.moveaxis(self.base[self.start : self.stop], 0, -1)
    return mine.reshape(*mine.shape[:-1], *self.outputs)[index]

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    inputs = self.base.ndim - 1
    to = (*to[: x.ndim - inputs], None)
    y = project(x, self.base[...], self.base.axes, to, contract=inputs, transposed=True)
    return y[..., self.start : self.stop].reshape(*y.shape[:-1], *self.outputs)


def turn_matrices(module: nnx.Module) -> None:
  """Replaces every plain matrix of the `Linear`s in a module by a `ByOutput`, or by a `Joined`.

  Call it outside of the step. The matrices of stacked layers have one more axis and stay as they are: see
  `stack.separate_layers`.
  """
  # A mesh splits heads and units, each over all devices: joined, some devices would have all of the queries.
  if not splits():
    for _, part in list(nnx.iter_modules(module)):
      _join([linear for linear in _same_input(part) if _is_plain(linear)])
  for _, linear in nnx.iter_modules(module):
    if isinstance(linear, Linear) and _is_plain(linear):
      linear.kernel = ByOutput(linear.kernel, len(linear.inputs))


def _is_plain(linear: Linear) -> bool:
  kernel = linear.kernel
  return isinstance(kernel, nnx.Param) and kernel.ndim == len(kernel.axes)


def _same_input(part: nnx.Module) -> Iterator[Linear]:
  """The linear layers of a part that it gives the same input: its `same_input` names them."""
  for name in getattr(part, 'same_input', ()):
    value = getattr(part, name)
    yield from [value] if isinstance(value, Linear) else value


def _join(linears: list[Linear]) -> None:
  """Makes the matrices of linear layers with the same input one, if there are several."""
  if len(linears) < 2:
    return
  turned = [ByOutput(linear.kernel, len(linear.inputs)).base for linear in linears]
  inputs = len(linears[0].inputs)
  rows = [base[...].reshape(-1, *base.shape[base.ndim - inputs :]) for base in turned]
  axes = (None, *linears[0].inputs)
  first = linears[0].kernel
  whole = nnx.Param(jnp.concatenate(rows), axes=axes, kind=first.kind, active=first.active)
  start = 0
  for linear, base in zip(linears, turned, strict=True):
    linear.kernel = Joined(whole, start, base.shape[: base.ndim - inputs])
    start = linear.kernel.stop
