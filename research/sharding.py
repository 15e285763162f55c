"""Names of array axes, and where on the device mesh each name lives.

Every array of a model is declared by the names of its axes (`'batch'`, `'embed'`, `'mlp'`, ...). A `Mesh`
says how many devices each mesh axis has and which name is split over which mesh axis; nothing else in the
project mentions a mesh axis. The mesh is explicit: the type of every array says where it lives.
"""

import contextlib
import contextvars
import dataclasses
import math
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax import P

from research.errors import Invalid, did_you_mean

# Outermost first: neighbours in the last axes are neighbours in the slice, where links are short.
MESH_AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')
ARRAY_AXES = (
  'batch', 'length', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'vocab', 'expert', 'layers', 'state',
  'channels', 'sequence',
)  # fmt: skip
# Batches are split over every axis that has its own examples, and sequences over context. A parameter is split
# by 'embed' over the axes that would else hold copies of it (ZeRO-3; data does hold copies), and over tensor by
# the axis that is not contracted with the residual stream (Megatron); experts live on an axis of their own.
RULES = {
  'batch': ('data', 'fsdp', 'expert'),
  'length': 'context',
  'embed': ('fsdp', 'expert', 'context'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': 'tensor',
  'expert': 'expert',
  'layers': 'stage',
  # Of what carries a state along the sequence, which is whole there.
  'channels': ('tensor', 'context'),
  # The length of the residual stream, between parts. ('context', 'tensor') is Megatron's sequence parallelism
  # (arXiv:2205.05198): tensor devices then keep a part of each activation, not a copy.
  'sequence': 'context',
}
# Grouped queries leave few keys: where they are fewer than the devices, each device holds all of them.
_MAY_STAY_WHOLE = ('kv_heads',)

_rules = contextvars.ContextVar('rules', default=None)
_platform = contextvars.ContextVar('platform', default=None)
_pipeline = contextvars.ContextVar('pipeline', default=(1, None))


@dataclasses.dataclass(frozen=True)
class Mesh:
  """How many devices along each mesh axis, and which array axis is split over which of them.

  One size may be -1: as many as there are devices left. Sizes are of one slice; several slices, joined by a
  slower network (DCN), multiply `data` by `dcn_data` and `stage` by `dcn_stage`.

  Attributes:
    data: copies of the parameters, each with its own examples.
    fsdp: own examples; parameters and optimizer state are split (ZeRO-3) and gathered layer by layer.
    tensor: heads, MLP and vocabulary are split (Megatron).
    context: sequences are split.
    expert: experts are split, and so are the examples.
    stage: layers are split (a pipeline: `model/pipeline.py`).
    stage_rounds: how often a microbatch passes all the stages.
    stage_microbatches: of a batch in the pipeline, at least as many as stages, which is the default.
    dcn_data, dcn_stage: how many slices; dcn_data -1 is all that there are.
    rules: replace entries of `RULES`; None keeps an axis whole. Of a tuple of mesh axes an array takes those
      that its other axes leave free; a single one must be free.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  stage: int = 1
  stage_rounds: int = 1
  stage_microbatches: int | None = None
  dcn_data: int = -1
  dcn_stage: int = 1
  rules: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    for axis in (*MESH_AXES, 'dcn_data', 'dcn_stage'):
      size = getattr(self, axis)
      if not isinstance(size, int) or (size < 1 and (size != -1 or axis == 'dcn_stage')):
        raise Invalid(
          Mesh, axis, f'{size!r} is not a number of devices (a positive integer, or -1).'
        )
    if self.stage_rounds < 1:
      raise Invalid(Mesh, 'stage_rounds', f'{self.stage_rounds} must be 1 or more.')
    if [getattr(self, axis) for axis in MESH_AXES].count(-1) > 1:
      raise Invalid(Mesh, 'data', 'only one mesh axis may be -1 (all the devices that are left).')
    for name, axes in self.rules.items():
      if name not in ARRAY_AXES:
        raise Invalid(Mesh, 'rules', f'no array axis {name!r}.{did_you_mean(name, ARRAY_AXES)}')
      for axis in as_tuple(axes):
        if axis not in MESH_AXES:
          raise Invalid(Mesh, 'rules', f'no mesh axis {axis!r}.{did_you_mean(axis, MESH_AXES)}')

  @property
  def table(self) -> dict:
    """Which mesh axes every array axis is split over: name -> None, one, or several."""
    return {**RULES, **self.rules}

  def shape(self, devices: int, slices: int = 1) -> dict[str, int]:
    """The size of every mesh axis on this many devices, in all slices together."""
    within, across = self._within(devices // slices), self._across(slices)
    return {axis: size * across.get(axis, 1) for axis, size in within.items()}

  def _within(self, devices: int) -> dict[str, int]:
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: devices // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != devices:
      asked = ' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size != 1)
      largest = max(sizes, key=sizes.get)
      needs = f'a multiple of {known}' if -1 in sizes.values() else f'{known}'
      why = f'a mesh of {asked} needs {needs} devices and there are {devices} here; '
      raise Invalid(Mesh, largest, why + f'change Mesh.{largest} or set one axis to -1.')
    return filled

  def _across(self, slices: int) -> dict[str, int]:
    data = slices // self.dcn_stage if self.dcn_data == -1 else self.dcn_data
    if data * self.dcn_stage != slices:
      field = 'dcn_stage' if self.dcn_data == -1 else 'dcn_data'
      why = f'data {data} x stage {self.dcn_stage} over DCN are not the {slices} slices here; '
      raise Invalid(Mesh, field, why + 'their product must be, and dcn_data may be -1.')
    return {'data': data, 'stage': self.dcn_stage}

  def batch_shards(self, devices: int, slices: int = 1) -> int:
    """Over how many devices a batch is split: the batch size must be a multiple of it."""
    sizes = self.shape(devices, slices)
    return math.prod(sizes[axis] for axis in as_tuple(self.table['batch']))

  def arrange(self, devices) -> jax.sharding.Mesh:
    """The devices in this shape, neighbours in the network as neighbours in the mesh."""
    from jax.experimental import mesh_utils

    slices = count_slices(devices)
    sizes = self.shape(len(devices), slices)
    split = {
      'allow_split_physical_axes': True
    }  # an axis may take a part of a slice's side: 8 of 4x4x4
    if slices == 1:
      grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, **split)
    else:
      across = self._across(slices)
      grid = mesh_utils.create_hybrid_device_mesh(
        tuple(size // across.get(axis, 1) for axis, size in sizes.items()),
        tuple(across.get(axis, 1) for axis in sizes),
        devices,
        **split,
      )
    explicit = (jax.sharding.AxisType.Explicit,) * grid.ndim
    return jax.sharding.Mesh(grid, tuple(sizes), axis_types=explicit)

  @contextlib.contextmanager
  def use(self, devices=None):
    """Within this, `spec` and `shard` mean this mesh, over `devices` (all of them by default)."""
    devices = jax.devices() if devices is None else devices
    mesh = self.arrange(devices)
    token, platform = _rules.set(self.table), _platform.set(devices[0].platform)
    pipeline = _pipeline.set((self.stage_rounds, self.stage_microbatches))
    try:
      with jax.set_mesh(mesh):
        yield mesh
    finally:
      _rules.reset(token)
      _platform.reset(platform)
      _pipeline.reset(pipeline)


def platform() -> str:
  """'cpu', 'gpu' or 'tpu': what the devices in use are."""
  return _platform.get() or jax.default_backend()


def cores() -> int:
  """Those of the CPU that this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def threads() -> int:
  """How many of them jax divides a product over: all, unless it is told otherwise."""
  return int(os.environ.get('PJRT_NPROC') or cores())


def count_slices(devices) -> int:
  """How many slices (of TPUs, joined by DCN) these devices are; 1 where there is no such thing."""
  return len({getattr(device, 'slice_index', None) for device in devices})


def describe(mesh: jax.sharding.Mesh) -> str:
  """'data 2 x fsdp 4': the axes that split anything."""
  return ' x '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'of one device'


def default_mesh(state_bytes: int, device_bytes: int | None) -> Mesh:
  """The mesh of a run that names none: data parallel where the state is small, FSDP where it is not.

  Copies of the state cost one all-reduce a step and FSDP three collectives a layer; so parameters and optimizer
  are copied while they take at most a quarter of a device's memory.

  Args:
    state_bytes: of parameters and optimizer state.
    device_bytes: memory of a device; None where it is the machine's own (CPU), which copies would only fill.
  """
  small = device_bytes is None or state_bytes <= device_bytes / 4
  return Mesh() if small else Mesh(data=1, fsdp=-1)


def as_tuple(axes) -> tuple:
  return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def pipeline_shape() -> tuple[int, int | None]:
  """How many rounds and microbatches the mesh in use asks of a pipeline."""
  return _pipeline.get()


def axis_size(name: str) -> int:
  """Over how many devices the mesh in use splits the array axis `name`."""
  rules, sizes = _rules.get() or {}, jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes.get(axis, 1) for axis in as_tuple(rules.get(name)))


def splits() -> bool:
  """Whether the mesh in use splits anything."""
  return any(axis_size(name) > 1 for name in _rules.get() or {})


def on_each(size: int, name: str) -> int:
  """How much of so large an array axis `name` one device has, at least 1."""
  return max(1, size // axis_size(name))


def spec(*names: str | None, shape: tuple[int, ...] | None = None) -> P:
  """`spec('batch', 'length', None)`: the PartitionSpec of an array with these axes under the mesh in use.

  With `shape`, an axis whose size the mesh does not divide stays whole; of two names that claim one mesh axis
  the first has it. For parameters `check` makes errors of both. Outside any mesh everything is whole.
  """
  rules = _rules.get() or {}
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
  rules, sizes = _rules.get() or {}, dict(jax.sharding.get_abstract_mesh().shape)
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
      if size % n and name not in _MAY_STAY_WHOLE:
        on = ' x '.join(f'{axis} {sizes[axis]}' for axis in axes)
        why = (
          f'{on} does not divide the {size} {name!r} of {path} [{shown}]; change Mesh.{axes[-1]} '
        )
        why += f'or that size, or keep it whole with Mesh.rules = {{{name!r}: None}}.'
        raise Invalid(Mesh, axes[-1], why)
      taken.update(dict.fromkeys(axes, name) if not size % n else {})


def shard(x: jax.Array, *names: str | None) -> jax.Array:
  """`x` moved to where the names of its axes say; its values are unchanged."""
  if _rules.get() is None:
    return x
  return jax.sharding.reshard(x, spec(*names, shape=x.shape))


def gather(x: jax.Array, *names: str | None) -> jax.Array:
  """A parameter whole on every device, but for the axes that `names` say: what FSDP does before its use.

  Its gradient is a reduce-scatter to where `x` lives: every device adds up its own examples' part, without a
  collective (its type says `unreduced`), and the sum is taken here, once for as many uses as there were. Where
  `x` is gathered already it comes back as it is.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if _rules.get() is None or jax.typeof(x).sharding.spec.reduced:
    return x
  if mesh.manual_axes:  # in a pipeline's stage, where jax knows no partial sums yet
    return shard(x, *names)
  here = [as_tuple(axes) for axes in axes_of(x)]
  to = [as_tuple(axes) for axes in spec(*names, shape=x.shape)]
  gathered = {i: here[i] for i in range(x.ndim) if here[i] != to[i]}
  if any(to[i] for i in gathered):
    return shard(x, *names)
  split = {axis for name in ('batch', 'length') for axis in as_tuple(_rules.get().get(name))}
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


def host_share() -> tuple[int, int]:
  """(k, n): this process needs the k-th of n equal parts of every batch's rows, which lie on its devices.

  Where its devices have rows from here and there, or all of them (a mesh axis that is not of the batch goes
  over the processes), that is the whole.
  """
  n = axis_size('batch')
  where = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec('batch'))
  indices = where.addressable_devices_indices_map((n,)).values()
  first, count = min(i[0].start or 0 for i in indices), len({i[0].start for i in indices})
  last = max(i[0].start or 0 for i in indices)
  one_piece = last - first + 1 == count and first % count == 0 and n % count == 0
  return (first // count, n // count) if one_piece else (0, 1)


def spec_of(x: jax.Array) -> P | None:
  """Where `x` lives, as an `out_sharding`; None outside any mesh."""
  sharding = jax.typeof(x).sharding
  return None if sharding.mesh.empty else sharding.spec


def axes_of(x: jax.Array) -> tuple:
  """What splits each axis of `x`, as in the entries of a PartitionSpec: one for every axis."""
  return (*jax.typeof(x).sharding.spec.partitions, *[None] * x.ndim)[: x.ndim]


def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's `host_share` of a batch of host arrays [batch, length], as global arrays on the mesh."""
  where = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec('batch', 'length'))
  part, parts = host_share()

  def one(x):
    first, shape = part * len(x), (parts * len(x), *x.shape[1:])

    def rows(index):
      start, stop, _ = index[0].indices(shape[0])
      return x[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, where, rows)

  return {key: one(x) for key, x in batch.items()}
