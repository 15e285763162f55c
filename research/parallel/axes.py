"""Arrays and the axes of the mesh in use: how they are split, gathered and checked."""

import math
from collections.abc import Mapping

import jax
from jax import P

from research.core.errors import Invalid
from research.parallel.mesh import MAY_STAY_WHOLE, Mesh, as_tuple, rules_in_use


def axis_size(name: str) -> int:
  """Over how many devices the mesh in use splits the array axis `name`."""
  rules, sizes = rules_in_use.get() or {}, jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in as_tuple(rules.get(name)))


def split_axes() -> list[str]:
  """The names of the array axes that the mesh in use splits."""
  return [name for name in rules_in_use.get() or {} if axis_size(name) > 1]


def splits() -> bool:
  """Whether the mesh in use splits anything."""
  return bool(split_axes())


def on_each(size: int, name: str) -> int:
  """How much of so large an array axis `name` one device has, at least 1."""
  return max(1, size // axis_size(name))


def spec(*names: str | None, shape: tuple[int, ...] | None = None) -> P:
  """`spec('batch', 'length', None)`: the PartitionSpec of an array with these axes under the mesh in use.

  With `shape`, an axis whose size the mesh does not divide stays whole; of two names that claim one mesh axis
  the first has it. For parameters `check` makes errors of both. Outside any mesh everything is whole.
  """
  rules = rules_in_use.get() or {}
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  taken, parts = set(), []
  for i, name in enumerate(names):
    axes = tuple(
      axis for axis in as_tuple(rules.get(name)) if sizes.get(axis, 1) > 1 and axis not in taken
    )
    if shape is not None and shape[i] % math.prod(sizes[axis] for axis in axes):
      axes = ()
    taken.update(axes)
    parts.append(axes[0] if len(axes) == 1 else axes or None)
  return P(*parts)


def check(parameters: Mapping[str, tuple[tuple[str | None, ...], tuple[int, ...]]]) -> None:
  """Raises Invalid where a parameter does not go onto the mesh in use as the rules say.

  Args:
    parameters: path -> (names of the axes, shape).

  Raises:
    Invalid: of `Mesh`: two axes of one parameter claim one mesh axis, or a size is not a multiple of the
      devices it is split over.
  """
  rules, sizes = rules_in_use.get() or {}, dict(jax.sharding.get_abstract_mesh().shape)
  for path, (names, shape) in parameters.items():
    taken = {}
    shown = 'x'.join(
      f'{n} {name}' if name else str(n) for n, name in zip(shape, names, strict=True)
    )
    for name, size in zip(names, shape, strict=True):
      rule = rules.get(name)
      axes = [axis for axis in as_tuple(rule) if sizes.get(axis, 1) > 1]
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
  """`x` moved to where the names of its axes say; its values are unchanged."""
  if rules_in_use.get() is None:
    return x
  return jax.sharding.reshard(x, spec(*names, shape=x.shape))


def gather(x: jax.Array, *names: str | None) -> jax.Array:
  """A parameter whole on every device, but for the axes that `names` say: what FSDP does before its use.

  Its gradient is a reduce-scatter to where `x` lives: every device adds up its own examples' part, without a
  collective (its type says `unreduced`), and the sum is taken here, once for as many uses as there were. Where
  `x` is gathered already it comes back as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if rules_in_use.get() is None or jax.typeof(x).sharding.spec.reduced:
    return x
  if mesh.manual_axes:  # in a pipeline's stage, where jax knows no partial sums yet
    return shard(x, *names)
  here = [as_tuple(axes) for axes in axes_of(x)]
  to = [as_tuple(axes) for axes in spec(*names, shape=x.shape)]
  gathered = {i: here[i] for i in range(x.ndim) if here[i] != to[i]}
  if any(to[i] for i in gathered):
    return shard(x, *names)
  split = {axis for name in ('batch', 'length') for axis in as_tuple(rules_in_use.get().get(name))}
  split = {axis for axis in split if mesh.shape[axis] > 1 and axis not in mesh.manual_axes}
  over = {axis for axes in gathered.values() for axis in axes}
  copies = tuple(split - over - {axis for axes in to for axis in axes})
  if not over and not copies:
    return x

  def collect(x):
    x = jax.lax.pcast(x, copies, to='reduced') if copies else x
    for i, axes in gathered.items():
      x = jax.lax.all_gather(x, axes, axis=i, tiled=True, to='reduced')
    return x

  out = P(*(axes or None for axes in to), reduced=over | set(copies))
  return jax.shard_map(collect, in_specs=P(*(axes or None for axes in here)), out_specs=out)(x)


def per_device(f, *, in_specs, out_specs):
  """`f` as every device runs it on its own parts, with collectives of its own; `jax.shard_map` over all axes.

  Inside another such function (a pipeline's stage) it is over the axes that are left.
  """
  mesh = jax.sharding.get_abstract_mesh()
  left = set(mesh.axis_names) - set(mesh.manual_axes)
  # Trip counts and branches may differ between devices, which the check for varying values does not know.
  return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=left, check_vma=False)


def spec_of(x: jax.Array) -> P | None:
  """Where `x` lives, as an `out_sharding`; None outside any mesh."""
  sharding = jax.typeof(x).sharding
  return None if sharding.mesh.empty else sharding.spec


def axes_of(x: jax.Array) -> tuple:
  """What splits each axis of `x`, as in the entries of a PartitionSpec: one for every axis."""
  return (*jax.typeof(x).sharding.spec.partitions, *[None] * x.ndim)[: x.ndim]
