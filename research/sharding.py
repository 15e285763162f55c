"""Names of array axes, and where on the device mesh each name lives.

Every array of a model is declared by the names of its axes (`'batch'`, `'embed'`, `'mlp'`, ...). A `Mesh`
says how many devices each mesh axis has and which name is split over which mesh axis; nothing else in the
project mentions a mesh axis. The mesh is explicit: the type of every array says where it lives.
"""

import contextlib
import contextvars
import dataclasses
import math

import jax
import numpy as np
from jax import P

from research.errors import Invalid, did_you_mean

MESH_AXES = ('data', 'fsdp', 'tensor')
ARRAY_AXES = (
  'batch', 'length', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'vocab', 'expert', 'layers', 'state',
)  # fmt: skip
# Batches are split over data and fsdp together; parameters over fsdp by 'embed' (ZeRO-3) and over tensor by
# the axis that is not contracted with the residual stream (Megatron).
RULES = {
  'batch': ('data', 'fsdp'),
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'expert': 'tensor',
}

_rules = contextvars.ContextVar('rules', default=None)


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How many devices along each mesh axis, and which array axis is split over which of them.

  One size may be -1: as many as there are devices left. `rules` replace entries of `RULES`; None unsplits.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  rules: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for axis in MESH_AXES:
      size = getattr(self, axis)
      if not isinstance(size, int) or (size < 1 and size != -1):
        raise Invalid(
          Mesh, axis, f'{size!r} is not a number of devices (a positive integer, or -1).'
        )
    if [getattr(self, axis) for axis in MESH_AXES].count(-1) > 1:
      raise Invalid(Mesh, 'data', 'only one mesh axis may be -1 (all the devices that are left).')
    for name, axes in self.rules.items():
      if name not in ARRAY_AXES:
        raise Invalid(Mesh, 'rules', f'no array axis {name!r}.{did_you_mean(name, ARRAY_AXES)}')
      for axis in _as_tuple(axes):
        if axis not in MESH_AXES:
          raise Invalid(Mesh, 'rules', f'no mesh axis {axis!r}.{did_you_mean(axis, MESH_AXES)}')

  def shape(self, devices: int) -> dict[str, int]:
    """The size of every mesh axis on this many devices."""
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    sizes = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
      asked = ' x '.join(f'{axis} {getattr(self, axis)}' for axis in MESH_AXES)
      largest = max(MESH_AXES, key=lambda axis: getattr(self, axis))
      needs = f'a multiple of {known}' if -1 in vars(self).values() else f'{known}'
      why = f'a mesh of {asked} needs {needs} devices and this machine has {devices}; '
      raise Invalid(Mesh, largest, why + f'change Mesh.{largest} or set one axis to -1.')
    return sizes

  def batch_shards(self, devices: int) -> int:
    """Over how many devices a batch is split: the batch size must be a multiple of it."""
    sizes = self.shape(devices)
    return math.prod(sizes[axis] for axis in _as_tuple({**RULES, **self.rules}['batch']))

  @contextlib.contextmanager
  def use(self, devices=None):
    """Within this, `spec` and `shard` mean this mesh, over `devices` (all of them by default)."""
    devices = jax.devices() if devices is None else devices
    sizes = self.shape(len(devices))
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), devices=devices)
    token = _rules.set({**RULES, **self.rules})
    try:
      with jax.set_mesh(mesh):
        yield mesh
    finally:
      _rules.reset(token)


def _as_tuple(axes) -> tuple:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def spec(*names: str | None, shape: tuple[int, ...] | None = None) -> P:
  """`spec('batch', 'length', None)`: the PartitionSpec of an array with these axes under the mesh in use.

  With `shape` (for parameters), an axis whose size the mesh does not divide stays whole, and of two names
  that claim one mesh axis the first has it. Outside any mesh everything is whole.
  """
  rules = _rules.get() or {}
  sizes = dict(jax.sharding.get_abstract_mesh().shape)
  taken, parts = set(), []
  for i, name in enumerate(names):
    axes = tuple(
      axis for axis in _as_tuple(rules.get(name)) if sizes.get(axis, 1) > 1 and axis not in taken
    )
    if shape is not None and shape[i] % math.prod(sizes[axis] for axis in axes):
      axes = ()
    taken.update(axes)
    parts.append(axes[0] if len(axes) == 1 else axes or None)
  return P(*parts)


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """`x` moved to where the names of its axes say; its values are unchanged."""
  if _rules.get() is None:
    return x
  return jax.sharding.reshard(x, spec(*names, shape=x.shape))


def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's share of a batch of host arrays [batch, length], as global arrays on the mesh."""
  mesh = jax.sharding.get_mesh()
  return {
    key: jax.make_array_from_process_local_data(
      jax.sharding.NamedSharding(mesh, spec('batch', *[None] * (x.ndim - 1))), x
    )
    for key, x in batch.items()
  }
