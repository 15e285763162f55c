"""Splits, gathers and checks the axes of arrays on the mesh in use."""

import functools
import math
from collections.abc import Iterable, Mapping

import jax
from jax import P

from research.core.errors import Invalid
from research.parallel.mesh import (
  IF_DIVIDED,
  LAST,
  MAY_STAY_WHOLE,
  Mesh,
  as_tuple,
  platform,
  rules_in_use,
  sum_dtype,
)


def axis_size(name: str) -> int:
  """Returns over how many devices the mesh in use splits the array axis `name`."""
  rules = rules_in_use.get() or {}
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in as_tuple(rules.get(name)))


def split_axes() -> list[str]:
  """Returns the names of the array axes that the mesh in use splits."""
  return [name for name in rules_in_use.get() or {} if axis_size(name) > 1]


def splits() -> bool:
  """Returns whether the mesh in use splits any array."""
  return bool(split_axes())


def on_one_cpu() -> bool:
  """Returns whether the device in use is a CPU, where XLA needs some help, and no array is split."""
  return platform() == 'cpu' and not splits()


def on_each(size: int, name: str) -> int:
  """Returns the size that one device has of an array axis `name` of this size, at least 1."""
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  axes = _claimed(name, size, rules_in_use.get() or {}, sizes)
  return max(1, size // math.prod(sizes[axis] for axis in axes))


def _claimed(name: str | None, size: int | None, rules: dict, sizes: dict) -> list[str]:
  """Returns the mesh axes of more than one device that the rules have for an array axis of this size."""
  axes = [axis for axis in as_tuple(rules.get(name)) if sizes.get(axis, 1) > 1]
  optional = IF_DIVIDED.get(name)
  if optional in axes and size is not None and size % math.prod(sizes[axis] for axis in axes):
    axes.remove(optional)
  return axes


def spec(*names: str | None, shape: tuple[int, ...] | None = None) -> P:
  """Returns the PartitionSpec of an array with these axes under the mesh in use: `spec('batch', 'length',
  None)`.

  With `shape`, an axis whose size the mesh does not divide stays whole. If two names claim the same mesh axis,
  the first gets it. For parameters both cases are errors of `check`. Outside any mesh every axis is whole.
  """
  rules = rules_in_use.get() or {}
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  taken = set()
  parts = []
  for i, name in enumerate(names):
    claimed = _claimed(name, None if shape is None else shape[i], rules, sizes)
    axes = tuple(axis for axis in claimed if axis not in taken)
    if shape is not None and shape[i] % math.prod(sizes[axis] for axis in axes):
      axes = ()
    taken.update(axes)
    parts.append(axes[0] if len(axes) == 1 else axes or None)
  return P(*parts)


def check(parameters: Mapping[str, tuple[tuple[str | None, ...], tuple[int, ...]]]) -> None:
  """Checks that the rules can put every parameter onto the mesh in use.

  Args:
    parameters: path -> (names of the axes, shape).

  Raises:
    Invalid: two axes of a parameter claim the same mesh axis, or the devices do not divide a size.
  """
  rules = rules_in_use.get() or {}
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  for path, (names, shape) in parameters.items():
    taken = {}
    shown = 'x'.join(
      f'{n} {name}' if name else str(n) for n, name in zip(shape, names, strict=True)
    )
    for name, size in zip(names, shape, strict=True):
      rule = rules.get(name)
      axes = _claimed(name, size, rules, sizes)
      clash = [axis for axis in axes if axis in taken]
      if clash and isinstance(rule, str):
        why = (
          f'{taken[rule]!r} and {name!r} of {path} [{shown}] both claim the mesh axis {rule!r}; '
        )
        raise Invalid(
          Mesh, 'rules', why + f'keep one whole, as in Mesh.rules = {{{name!r}: None}}.'
        )
      axes = [axis for axis in axes if axis not in taken]
      n = math.prod(sizes[axis] for axis in axes)
      if size % n and name not in MAY_STAY_WHOLE:
        on = ' x '.join(f'{axis} {sizes[axis]}' for axis in axes)
        why = (
          f'{on} does not divide the {size} {name!r} of {path} [{shown}]; change Mesh.{axes[-1]} '
        )
        why += f'or that size, or keep it whole with Mesh.rules = {{{name!r}: None}}.'
        raise Invalid(Mesh, axes[-1], why)
      taken.update(dict.fromkeys(axes, name) if not size % n else {})


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """Returns `x` resharded by the names of its axes."""
  if rules_in_use.get() is None:
    return x
  return jax.sharding.reshard(x, spec(*names, shape=x.shape))


def gather(x: jax.Array, *names: str | None) -> jax.Array:
  """Gathers a parameter to every device, except along `names`, as FSDP does before its use.

  The gradient is a reduce-scatter to the sharding of `x`. Every device first adds up the gradients of its own
  examples without a collective (their type is `unreduced`), so any number of uses costs one sum over devices. A
  parameter that is gathered already is returned unchanged.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if rules_in_use.get() is None or jax.typeof(x).sharding.spec.reduced:
    return x
  if mesh.manual_axes:  # within a stage of a pipeline jax does not support `unreduced` yet
    return shard(x, *names)
  source = [as_tuple(axes) for axes in axes_of(x)]
  target = [as_tuple(axes) for axes in spec(*names, shape=x.shape)]
  gathered = {i: source[i] for i in range(x.ndim) if source[i] != target[i]}
  if any(target[i] for i in gathered):
    return shard(x, *names)
  split = {axis for name in ('batch', 'length') for axis in as_tuple(rules_in_use.get().get(name))}
  split = {axis for axis in split if mesh.shape[axis] > 1 and axis not in mesh.manual_axes}
  over = {axis for axes in gathered.values() for axis in axes}
  copies = tuple(split - over - {axis for axes in target for axis in axes})
  if not over and not copies:
    return x

  def collect(x, steps):
    x = jax.lax.pcast(x, copies, to='reduced') if copies else x
    for i, axes in gathered.items():
      for step in steps(axes):
        x = jax.lax.all_gather(x, step, axis=i, tiled=True, to='reduced')
    return x

  in_specs = P(*(axes or None for axes in source))
  out_specs = P(*(axes or None for axes in target), reduced=over | set(copies))

  def mapped(steps, x):
    part = functools.partial(collect, steps=steps)
    return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs)(x)

  return gathered_by(mapped, x, over)


def gathered_by(collect, x: jax.Array, over: Iterable[str]) -> jax.Array:
  """Gathers a parameter by a linear function, and adds up its gradient as the mesh in use says.

  The gradient is added up in `Mesh.sum_dtype`, and over the mesh axes of `mesh.LAST` after all others. Over a
  whole slice at once, XLA for TPUs would make an all-reduce of the reduce-scatter. The gather is one step.

  Args:
    collect: `collect(steps, x)` gathers x over the mesh axes of each of `steps(axes)`, in turn.
    x: the parameter.
    over: the mesh axes that `collect` gathers over.
  """
  dtype = sum_dtype() or x.dtype
  if x.dtype == dtype and not set(over) & set(LAST):
    return collect(_at_once, x)

  @jax.custom_vjp
  def whole(x):
    return collect(_at_once, x)

  def forward(x):
    return whole(x), x

  def backward(x, gradient):
    # The function is linear: of this forward pass nothing is computed.
    add_up = jax.vjp(functools.partial(collect, _last_first), x.astype(dtype))[1]
    return (add_up(gradient.astype(dtype))[0].astype(x.dtype),)

  whole.defvjp(forward, backward)
  return whole(x)


def _at_once(axes: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
  return (axes,)


def _last_first(axes: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
  """Returns the steps of a gather whose reverse has the axes of `mesh.LAST` last."""
  last = tuple(axis for axis in axes if axis in LAST)
  others = tuple(axis for axis in axes if axis not in LAST)
  return tuple(step for step in (last, others) if step)


def per_device(f, *, in_specs, out_specs):
  """`jax.shard_map` over all mesh axes: every device runs `f` on its own parts, with explicit collectives.

  Inside another such function (a stage of a pipeline) it maps over the remaining axes.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = set(mesh.axis_names) - set(mesh.manual_axes)
  # Without jax's check of varying values: trip counts and branches may differ between devices.
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def spec_of(x: jax.Array) -> P | None:
  """Returns the sharding of `x`, for an `out_sharding`; None outside any mesh."""
  sharding = jax.typeof(x).sharding
  return None if sharding.mesh.empty else sharding.spec


def axes_of(x: jax.Array) -> tuple:
  """Returns the mesh axes that split each axis of `x`: an entry of a PartitionSpec for every axis."""
  return (*jax.typeof(x).sharding.spec.partitions, *[None] * x.ndim)[: x.ndim]
