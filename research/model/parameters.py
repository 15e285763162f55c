"""Parameters with named axes and a kind, and the two products that are made with them.

The mesh shards a parameter by the names of its axes. Optimizers and counts read its kind, never its name.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid, UserError, did_you_mean
from research.parallel.axes import gather, shard, spec, spec_of
from research.parallel.mesh import as_tuple

Initializer = Callable[..., jax.Array]

# What a parameter does with a token. Weight decay and muP's rates follow from it:
#   matrix: multiplies its channels, so that each output is a sum over inputs (a convolution's taps too);
#   table: has a row for each token, position or distance, which is looked up;
#   vector: scales channels or adds to them one by one (norms, biases, decay rates), whatever its rank.
Kind = Literal['matrix', 'table', 'vector']


def normal(key, shape, dtype=jnp.float32, out_sharding=None, *, stddev: float = 0.02) -> jax.Array:
  """An initializer: normal with this standard deviation, whatever the shape (GPT-2, BERT)."""
  # Axes that are not split are drawn as one with the axis before them: the same numbers, but XLA compiles the
  # generator of a flat array several times faster than that of a deep one.
  split = out_sharding or (None,) * len(shape)
  sizes, axes = [], []
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
  rngs: nnx.Rngs, shape, axes, init: Initializer, *, kind: Kind, active: float = 1.0
) -> nnx.Param:
  """A float32 parameter, made where the names of its axes say.

  Args:
    shape: its sizes.
    axes: their names (None for an axis that is never split).
    init: makes the numbers.
    kind: 'matrix', 'table' or 'vector' (`Kind`).
    active: the fraction that one token visits; below 1 for the experts of a mixture.

  Returns:
    The parameter. It keeps `axes`, `kind` and `active` as metadata.
  """
  if kind not in get_args(Kind):
    raise UserError(f'no kind of parameter {kind!r}.{did_you_mean(kind, get_args(Kind))}')
  value = init(rngs.params(), shape, jnp.float32, out_sharding=spec(*axes, shape=shape))
  return nnx.Param(value, axes=tuple(axes), kind=kind, active=active)


def all_parameters(module: nnx.Module) -> Iterator[tuple[tuple, nnx.Param]]:
  """Path and parameter, of every parameter of a module."""
  yield from nnx.to_flat_state(nnx.state(module, nnx.Param))


def size(module: nnx.Module, kind: Kind | None = None) -> float:
  """How many parameters of this kind one token visits in a module (all kinds when None)."""
  return sum(
    math.prod(value.shape) * value.active
    for _, value in all_parameters(module)
    if kind is None or value.kind == kind
  )


def kinds(module: nnx.Module) -> dict:
  """The kind of every parameter, in dicts nested as those of the parameters."""
  tree: dict = {}
  for path, value in all_parameters(module):
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value.kind
  return tree


def named_axes(module: nnx.Module) -> dict[str, tuple[tuple[str | None, ...], tuple[int, ...]]]:
  """Path of every parameter -> (names of its axes, shape); a stack's first axis is 'layers'."""
  parameters = {}
  for path, value in all_parameters(module):
    stacked = len(value.shape) - len(value.axes)
    parameters['.'.join(map(str, path))] = ('layers',) * stacked + value.axes, value.shape
  return parameters


def check_sizes(owner: type, **sizes: int | None) -> None:
  """Raise `Invalid` for a size that is not a positive integer (None is allowed: not given)."""
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
  """x times a kernel over the last `contract` axes of x, which are the first of the kernel ([inputs, outputs]).

  FSDP: the kernel is gathered over 'embed' for its use, forward and backward; what 'tensor' splits stays split.

  Args:
    x: [..., inputs].
    kernel: a parameter; it is cast to the dtype of x.
    axes: the names of the kernel's axes.
    to: the names of the result's axes.
    transposed: the kernel is [outputs, inputs], as a table of token vectors is for its logits.
    dtype: of the result; that of x by default.
  """
  n = kernel.ndim - contract if transposed else contract
  order = tuple(range(n)), tuple(range(n, kernel.ndim))
  ins, outs = order[::-1] if transposed else order
  # What lay between parts comes as this product wants it: with 'length', and not 'sequence', of its own.
  x = shard(x, *to[: x.ndim - contract], *(_whole(axes)[i] for i in ins))
  # One key head (multi-query) stays whole where 'tensor' would split it.
  shape = (*x.shape[: x.ndim - contract], *(kernel.shape[i] for i in outs))
  return _project(ins, outs, _whole(axes), spec(*to, shape=shape), dtype or x.dtype, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _project(ins, outs, whole, to, dtype, x, kernel):
  lead = x.ndim - len(ins)
  kernel = gather(kernel.astype(x.dtype), *whole)
  contract = (tuple(range(lead, x.ndim)), ins)
  return _dot(x, kernel, contract, to, dtype)


def _project_forward(ins, outs, whole, to, dtype, x, kernel):
  return _project(ins, outs, whole, to, dtype, x, kernel), (x, kernel)


def _project_backward(ins, outs, whole, to, dtype, residuals, dy):
  x, kernel = residuals
  lead, dy = x.ndim - len(ins), dy.astype(x.dtype)
  gathered, back = jax.vjp(lambda kernel: gather(kernel.astype(x.dtype), *whole), kernel)
  dx = _dot(dy, gathered, (tuple(range(lead, dy.ndim)), outs), spec_of(x), x.dtype)
  # A CPU writes the operand that comes first anew, in transposed order: let that be the smaller one. Its small
  # result is turned afterwards, behind a barrier: XLA would turn the large operands instead.
  size = lambda axes: math.prod(kernel.shape[i] for i in axes)
  pair, order = ((x, dy), ins + outs) if size(ins) <= size(outs) else ((dy, x), outs + ins)
  where = spec_of(gathered)
  if (
    where is not None
  ):  # FSDP: every device has the part of its own examples, and `back` adds them up
    where = jax.P(*(where.partitions[i] for i in order), unreduced=where.reduced)
  dkernel = _dot(*pair, (tuple(range(lead)),) * 2, where, x.dtype)
  if order != tuple(sorted(order)):
    dkernel = jax.lax.optimization_barrier(dkernel)
    dkernel = jnp.transpose(dkernel, np.argsort(order))
  return dx, back(dkernel)[0]


_project.defvjp(_project_forward, _project_backward)


def look_up(table: jax.Array, rows: str | None, index: jax.Array) -> jax.Array:
  """Rows [batch, length, embed] of a table [rows, embed], made where 'batch' and 'sequence' live.

  Every device gathers 'embed' for its own tokens; where the mesh splits the rows (a vocabulary over 'tensor'),
  it looks up those it has, and the sum over the devices has them all. An index past the end is the last row.
  """
  home, where = spec(rows, 'embed', shape=table.shape), spec('batch', 'length')
  if not any((*home, *where)):
    return table.at[index].get(mode='clip')
  split, over, use = as_tuple(home[0]), as_tuple(home[1]), as_tuple(where[0]) + as_tuple(where[1])

  def local(table, index):
    table = jax.lax.pcast(table, tuple(set(use) - {*over, *split}), to='varying')
    if over:
      table = jax.lax.all_gather(table, over, axis=1, tiled=True)
    if not split:
      return table.at[index].get(mode='clip')
    index = index - jax.lax.axis_index(split) * table.shape[0]
    found = table.at[jnp.where(index < 0, table.shape[0], index)].get(mode='fill', fill_value=0)
    return jax.lax.psum(found, split)

  index = shard(jnp.minimum(index, table.shape[0] - 1), 'batch', 'length')
  here = jax.P(*where, None)
  x = jax.shard_map(local, in_specs=(home, where), out_specs=here)(table, index)
  return shard(x, 'batch', 'sequence', None)


def _whole(axes: Sequence[str | None]) -> tuple[str | None, ...]:
  return tuple(None if axis == 'embed' else axis for axis in axes)


def _dot(a, b, contract, to, dtype):
  return jax.lax.dot_general(
    a, b, (contract, ((), ())), preferred_element_type=dtype, out_sharding=to
  )
