"""Parameters with named axes and a kind, and the two operations that use them: a product and a look-up.

The mesh shards a parameter by the names of its axes. Optimizers and counts read its kind, never its name.
"""

import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid, UserError, did_you_mean
from research.model.kernels.few_rows import FEW_ROWS, few_rows
from research.model.kernels.large_table import is_large, sum_of_products, turned
from research.parallel.axes import gather, gathered_by, on_one_cpu, shard, spec, spec_of
from research.parallel.mesh import as_tuple

Initializer = Callable[..., jax.Array]

# How a parameter is used. Weight decay and the learning rates of muP depend on it:
#   matrix: multiplies channels, so that each output is a sum over inputs (the taps of a convolution too);
#   table: has a row to look up for each token, position or distance;
#   vector: scales or shifts single channels (norms, biases, decay rates), whatever its rank.
Kind = Literal['matrix', 'table', 'vector']


def normal(key, shape, dtype=jnp.float32, out_sharding=None, *, stddev: float = 0.02) -> jax.Array:
  """An initializer: draws from a normal distribution with this standard deviation (GPT-2, BERT)."""
  # An axis that is not split is merged with the axis before it for the drawing. The numbers are the same, but
  # XLA compiles the generator of a flat array several times faster.
  split = out_sharding or (None,) * len(shape)
  sizes = []
  axes = []
  for size, axis in zip(shape, split, strict=True):
    if axis is None and sizes:
      sizes[-1] *= size
    else:
      sizes.append(size)
      axes.append(axis)
  flat = None if out_sharding is None else jax.P(*axes)
  x = nnx.initializers.normal(stddev)(key, tuple(sizes), dtype, out_sharding=flat)
  return x.reshape(shape, out_sharding=out_sharding)


def param(
  rngs: nnx.Rngs,
  shape,
  axes,
  init: Initializer,
  *,
  kind: Kind,
  active: float = 1.0,
  dtype=jnp.float32,
  holds: int = 1,
) -> nnx.Param:
  """Makes a parameter, sharded by the names of its axes, with `axes`, `kind`, `active` and `holds` as metadata.

  Args:
    rngs: the source of the initializer's key.
    shape: the size of every axis.
    axes: the names of the axes (None for an axis that is never split).
    init: the initializer.
    kind: 'matrix', 'table' or 'vector' (`Kind`).
    active: the fraction that one token uses; below 1 for the experts of a mixture.
    dtype: float32 for a parameter that learns; the storage dtype of a quantised matrix.
    holds: how many numbers of the model one element stores: 2 if a byte packs two numbers of 4 bits, 0 for the
      scales of a quantised matrix, which are not numbers of the model. Counts multiply by it.

  Raises:
    UserError: there is no such kind.
  """
  if kind not in get_args(Kind):
    raise UserError(f'there is no kind of parameter {kind!r}.{did_you_mean(kind, get_args(Kind))}')
  if _shapes_only.get():
    init = nnx.initializers.zeros
  value = init(rngs.params(), shape, dtype, out_sharding=spec(*axes, shape=shape))
  return nnx.Param(value, axes=tuple(axes), kind=kind, active=active, holds=holds)


# True while `abstract_model` makes a model.
_shapes_only = contextvars.ContextVar('shapes_only', default=False)


def abstract_model(model: Callable[..., nnx.Module]) -> nnx.Module:
  """Returns `model(rngs=...)` with shapes in place of arrays, on the mesh in use; nothing is allocated."""

  def make():
    # The key is made in here: on a mesh of devices that are not there, not even a key can be computed.
    return model(rngs=nnx.Rngs(params=jax.random.key(0)))

  # Random numbers take half of the time to trace a model, and the plan of a sweep traces each of its sizes.
  token = _shapes_only.set(True)
  try:
    return jax.eval_shape(make)
  finally:
    _shapes_only.reset(token)


def all_parameters(module: nnx.Module) -> Iterator[tuple[tuple, nnx.Param]]:
  """Yields (path, parameter) for every parameter of a module."""
  yield from nnx.to_flat_state(nnx.state(module, nnx.Param))


def size(module: nnx.Module, kind: Kind | None = None) -> float:
  """Returns how many parameters of a kind (None: of any kind) one token uses in a module."""
  return sum(
    number_of(value) * value.active
    for _, value in all_parameters(module)
    if kind is None or value.kind == kind
  )


def number_of(parameter: nnx.Param) -> int:
  """Returns how many numbers of the model a parameter stores, whatever its dtype and packing."""
  return math.prod(parameter.shape) * parameter.holds


def stored_bytes(module: nnx.Module) -> int:
  """Returns the bytes of all parameters of a module as they are stored."""
  return sum(math.prod(x.shape) * x.dtype.itemsize for _, x in all_parameters(module))


def kinds(module: nnx.Module) -> dict:
  """Returns the kind of every parameter, nested as the parameters are."""
  tree: dict = {}
  for path, value in all_parameters(module):
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value.kind
  return tree


def named_axes(module: nnx.Module) -> dict[str, tuple[tuple[str | None, ...], tuple[int, ...]]]:
  """Returns {path: (names of the axes, shape)} of every parameter. In a stack the first axis is 'layers'."""
  parameters = {}
  for path, value in all_parameters(module):
    # `jax.vmap` over a stack's constructor adds an axis to the value and not to the metadata.
    stacked = len(value.shape) - len(value.axes)
    parameters['.'.join(map(str, path))] = ('layers',) * stacked + value.axes, value.shape
  return parameters


def check_sizes(owner: type, **sizes: int | None) -> None:
  """Raises `Invalid` for a size that is neither a positive integer nor None."""
  for field, size in sizes.items():
    if size is not None and (not isinstance(size, int) or size < 1):
      raise Invalid(owner, field, f'{size!r} is not a size; it must be a positive integer.')


def project(
  x: jax.Array,
  kernel: jax.Array,
  axes: Sequence[str | None],
  to: Sequence[str | None],
  contract: int = 1,
  *,
  transposed: bool = False,
  dtype=None,
) -> jax.Array:
  """Multiplies x with a kernel: contracts the last `contract` axes of x with the first axes of the kernel.

  FSDP gathers the kernel over 'embed' for the product, forward and backward. It stays split over 'tensor'.

  Args:
    x: [..., inputs].
    kernel: a parameter [inputs, outputs]; it is cast to the dtype of x.
    axes: names of the axes of the kernel.
    to: names of the axes of the result.
    contract: how many axes are inputs.
    transposed: the kernel is [outputs, inputs], such as the table of token vectors of a tied head.
    dtype: the dtype of the result; None for that of x.

  Returns:
    [..., outputs].
  """
  n = kernel.ndim - contract if transposed else contract
  order = tuple(range(n)), tuple(range(n, kernel.ndim))
  ins, outs = order[::-1] if transposed else order
  # Between parts the length is split as 'sequence'; within a part, and so in this product, as 'length'.
  x = shard(x, *to[: x.ndim - contract], *(_whole(axes)[i] for i in ins))
  # `spec` needs the shape: a single key head (multi-query) stays whole although 'tensor' splits heads.
  shape = (*x.shape[: x.ndim - contract], *(kernel.shape[i] for i in outs))
  return _project(ins, outs, _whole(axes), spec(*to, shape=shape), dtype or x.dtype, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _project(ins, outs, whole, to, dtype, x, kernel):
  lead = x.ndim - len(ins)
  kernel = gather(kernel.astype(x.dtype), *whole)
  few = math.prod(x.shape[:lead]) <= FEW_ROWS
  by_output = outs[0] == 0 and on_one_cpu()
  if by_output and few:
    return few_rows(x, kernel, len(ins), to, dtype)
  if by_output:
    # With one axis of inputs XLA reads the kernel as it lies. With several it turns it in every call.
    x = x.reshape(*x.shape[:lead], -1)
    kernel = kernel.reshape(*kernel.shape[: len(outs)], -1)
    ins = (len(outs),)
  contract = (tuple(range(lead, x.ndim)), ins)
  return _dot(x, kernel, contract, to, dtype)


def _project_forward(ins, outs, whole, to, dtype, x, kernel):
  if on_one_cpu() and (ins, outs) == ((1,), (0,)) and is_large(x, 1, kernel):
    return _project(outs, ins, whole[::-1], to, dtype, x, turned(kernel)), (x, kernel)
  return _project(ins, outs, whole, to, dtype, x, kernel), (x, kernel)


def _project_backward(ins, outs, whole, to, dtype, residuals, dy):
  x, kernel = residuals
  lead = x.ndim - len(ins)
  dy = dy.astype(x.dtype)
  large = on_one_cpu() and is_large(x, len(ins), kernel)
  if large:
    dy = jax.lax.optimization_barrier(dy)  # or XLA computes it twice, in the shape of each product
  gathered, back = jax.vjp(lambda kernel: gather(kernel.astype(x.dtype), *whole), kernel)
  dx = _dot(dy, gathered, (tuple(range(lead, dy.ndim)), outs), spec_of(x), x.dtype)
  # A CPU transposes the first operand of this product, so the smaller one comes first. The gradient is
  # transposed after the product and behind a barrier, or XLA would transpose the large operands instead.
  inputs = math.prod(kernel.shape[i] for i in ins)
  outputs = math.prod(kernel.shape[i] for i in outs)
  pair, order = ((x, dy), ins + outs) if inputs <= outputs else ((dy, x), outs + ins)
  sharding = spec_of(gathered)
  if sharding is not None:
    # FSDP: every device has the gradient of its own examples, and `back` adds them up.
    sharding = jax.P(*(sharding.partitions[i] for i in order), unreduced=sharding.reduced)
  if large:
    dkernel = sum_of_products(*pair, lead, x.dtype)
  else:
    dkernel = _dot(*pair, (tuple(range(lead)),) * 2, sharding, x.dtype)
  if order != tuple(sorted(order)):
    dkernel = jax.lax.optimization_barrier(dkernel)
    dkernel = jnp.transpose(dkernel, np.argsort(order))
  return dx, back(dkernel)[0]


_project.defvjp(_project_forward, _project_backward)


def look_up(table: jax.Array, rows: str | None, index: jax.Array) -> jax.Array:
  """Looks up rows of a table. Every device gathers 'embed' and looks up its own tokens.

  If the mesh splits the rows (a vocabulary over 'tensor'), a device looks up the rows that it has, and a sum
  over the devices completes the result.

  Args:
    table: [rows, embed].
    rows: the name of its first axis.
    index: [batch, length] integers. An index past the end means the last row.

  Returns:
    [batch, length, embed], sharded by 'batch' and 'sequence'.
  """
  table_spec = spec(rows, 'embed', shape=table.shape)
  index_spec = spec('batch', 'length')
  if not any((*table_spec, *index_spec)):
    return table.at[index].get(mode='clip')
  row_axes = as_tuple(table_spec[0])
  embed_axes = as_tuple(table_spec[1])
  token_axes = as_tuple(index_spec[0]) + as_tuple(index_spec[1])

  def collect(steps, table):
    for step in steps(embed_axes):
      table = jax.lax.all_gather(table, step, axis=1, tiled=True)
    return table

  def local(table, index):
    table = jax.lax.pcast(table, tuple(set(token_axes) - {*embed_axes, *row_axes}), to='varying')
    if embed_axes:
      table = gathered_by(collect, table, embed_axes)
    if not row_axes:
      return table.at[index].get(mode='clip')
    index = index - jax.lax.axis_index(row_axes) * table.shape[0]
    # A negative index would count from the end. Moved past the end it gives 0, as the rows of later devices do.
    index = jnp.where(index < 0, table.shape[0], index)
    vectors = table.at[index].get(mode='fill', fill_value=0)
    return jax.lax.psum(vectors, row_axes)

  index = shard(jnp.minimum(index, table.shape[0] - 1), 'batch', 'length')
  in_specs = (table_spec, index_spec)
  x = jax.shard_map(local, in_specs=in_specs, out_specs=jax.P(*index_spec, None))(table, index)
  return shard(x, 'batch', 'sequence', None)


def _whole(axes: Sequence[str | None]) -> tuple[str | None, ...]:
  """Returns the axes without 'embed', over which FSDP gathers."""
  return tuple(None if axis == 'embed' else axis for axis in axes)


def _dot(a, b, contract, to, dtype):
  return jax.lax.dot_general(
    a, b, (contract, ((), ())), preferred_element_type=dtype, out_sharding=to
  )
