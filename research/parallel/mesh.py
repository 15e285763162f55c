"""The device mesh: the names of array axes, and the mesh axes that split them.

A model declares every array by the names of its axes (`'batch'`, `'embed'`, `'mlp'`, ...). A `Mesh` defines how
many devices each mesh axis has, and which array axis is split over which mesh axis. No other module of the
project names a mesh axis. The mesh is explicit: the sharding of every array is part of its type.
"""

import contextlib
import contextvars
import dataclasses
import math
import os

import jax

from research.core.errors import Invalid, did_you_mean

# Outermost first: neighbours along the last axes are neighbours in the slice and have the fastest links.
MESH_AXES = ('data', 'stage', 'fsdp_outer', 'fsdp', 'expert', 'context', 'tensor')
ARRAY_AXES = (
  'batch', 'length', 'embed', 'heads', 'kv_heads', 'head_dim', 'mlp', 'vocab', 'expert', 'layers', 'state',
  'channels', 'sequence',
)  # fmt: skip
# Batches are split over every mesh axis with examples of its own, and sequences over context. The 'embed' axis
# of a parameter is split over the mesh axes that would otherwise hold copies (ZeRO-3; data has copies). The
# axis that is not contracted with the residual stream is split over tensor (Megatron), and experts over expert.
# The vocabulary lies before and after a pipeline, so its stages share it: each looks up, and multiplies with, a
# part of it.
RULES = {
  'batch': ('data', 'fsdp_outer', 'fsdp', 'expert'),
  'length': 'context',
  'embed': ('fsdp', 'expert', 'context', 'fsdp_outer'),
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'mlp': 'tensor',
  'vocab': ('tensor', 'stage'),
  'expert': 'expert',
  'layers': 'stage',
  # The channels of parts that carry a state along the sequence: each device has the whole sequence.
  'channels': ('tensor', 'context'),
  # The length of the residual stream, between parts. ('context', 'tensor') is Megatron's sequence parallelism
  # (arXiv:2205.05198): then every tensor device has a part of each activation, and not a copy.
  'sequence': 'context',
}
# Grouped queries have few key heads. If there are fewer of them than devices, every device has all of them.
MAY_STAY_WHOLE = ('kv_heads',)
# Mesh axes that split an array axis only if they divide it. If the vocabulary does not suit them, every stage
# has a copy of it.
IF_DIVIDED = {'vocab': 'stage'}
# Gradients are added up over these mesh axes in a step of its own, after all others.
LAST = ('fsdp_outer',)

rules_in_use = contextvars.ContextVar('rules', default=None)
_platform = contextvars.ContextVar('platform', default=None)
_sum_dtype = contextvars.ContextVar('sum_dtype', default=None)
_pipeline = contextvars.ContextVar('pipeline', default=(1, None))


@dataclasses.dataclass(frozen=True)
class Mesh:
  """The number of devices along each mesh axis, and the rules that split array axes over mesh axes.

  One size may be -1, which means all remaining devices. The sizes are those of one slice. Several slices,
  connected by a slower network (DCN), multiply `data` by `dcn_data` and `stage` by `dcn_stage`.

  Attributes:
    data: copies of the parameters, each with its own examples.
    fsdp: splits examples, and parameters and optimizer state (ZeRO-3), which are gathered layer by layer.
    fsdp_outer: splits as fsdp does; the product of both counts. Gradients are added up over `fsdp` first and
      over `fsdp_outer` after that. XLA for TPUs does not reduce-scatter over a whole slice with equal sides,
      but does over two rows of it and then over the others (experiments/tpu_fit/README.md).
    tensor: splits heads, MLPs and the vocabulary (Megatron).
    context: splits sequences.
    expert: splits experts, and examples.
    stage: splits layers (a pipeline: `model/pipeline.py`).
    stage_rounds: how often a microbatch passes through all stages.
    stage_microbatches: microbatches of a batch in the pipeline; None, the least, is as many as stages.
    dcn_data, dcn_stage: numbers of slices; dcn_data -1 is all of them.
    sum_dtype: 'float32' or 'bfloat16', the dtype in which gradients of matrices and tables are added up over
      devices; None is the dtype of activations.
    rules: replace entries of `RULES`; None keeps an axis whole. From a tuple of mesh axes an array takes those
      that its other axes do not use; a single mesh axis must not be used by another.
  """

  data: int = -1
  fsdp: int = 1
  fsdp_outer: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  stage: int = 1
  stage_rounds: int = 1
  stage_microbatches: int | None = None
  dcn_data: int = -1
  dcn_stage: int = 1
  sum_dtype: str | None = None
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
    if self.sum_dtype not in (None, 'float32', 'bfloat16'):
      raise Invalid(Mesh, 'sum_dtype', f"{self.sum_dtype!r} must be 'float32', 'bfloat16' or None.")
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
    """{array axis: the mesh axes that split it: None, a name, or a tuple}."""
    return {**RULES, **self.rules}

  def shape(self, devices: int, slices: int = 1) -> dict[str, int]:
    """Returns the size of every mesh axis for so many devices, over all slices."""
    within = self._within(devices // slices)
    across = self._across(slices)
    return {axis: size * across.get(axis, 1) for axis, size in within.items()}

  def _within(self, devices: int) -> dict[str, int]:
    sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
    stated = math.prod(size for size in sizes.values() if size != -1)
    filled = {axis: devices // stated if size == -1 else size for axis, size in sizes.items()}
    if math.prod(filled.values()) != devices:
      shape = ' x '.join(f'{axis} {size}' for axis, size in sizes.items() if size != 1)
      largest = max(sizes, key=sizes.get)
      rest = -1 in sizes.values()
      needs = f'a multiple of {stated}' if rest else f'{stated}'
      why = f'a mesh of {shape} needs {needs} devices and there are {devices} here; '
      other = '' if rest else ' or set one axis to -1'
      raise Invalid(Mesh, largest, why + f'change Mesh.{largest}{other}.')
    return filled

  def _across(self, slices: int) -> dict[str, int]:
    data = slices // self.dcn_stage if self.dcn_data == -1 else self.dcn_data
    if data * self.dcn_stage != slices:
      field = 'dcn_stage' if self.dcn_data == -1 else 'dcn_data'
      why = f'data {data} x stage {self.dcn_stage} over DCN are not the {slices} slices here; '
      raise Invalid(Mesh, field, why + 'their product must be, and dcn_data may be -1.')
    return {'data': data, 'stage': self.dcn_stage}

  def batch_shards(self, devices: int, slices: int = 1) -> int:
    """Returns over how many devices a batch is split; the batch size must be a multiple of it."""
    sizes = self.shape(devices, slices)
    return math.prod(sizes[axis] for axis in as_tuple(self.table['batch']))

  def arrange(self, devices) -> jax.sharding.Mesh:
    """Returns a jax mesh of this shape. Neighbours in the mesh are neighbours in the network."""
    from jax.experimental import mesh_utils

    slices = count_slices(devices)
    sizes = self.shape(len(devices), slices)
    # A mesh axis may take part of a side of the slice: 8 devices of 4x4x4.
    split = {'allow_split_physical_axes': True}
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
    """Makes `spec` and `shard` use this mesh over `devices` (all by default) within the block."""
    devices = jax.devices() if devices is None else devices
    mesh = self.arrange(devices)
    rules = rules_in_use.set(self.table)
    platform = _platform.set(devices[0].platform)
    sum_dtype = _sum_dtype.set(self.sum_dtype)
    pipeline = _pipeline.set((self.stage_rounds, self.stage_microbatches))
    try:
      with jax.set_mesh(mesh):
        yield mesh
    finally:
      rules_in_use.reset(rules)
      _platform.reset(platform)
      _pipeline.reset(pipeline)
      _sum_dtype.reset(sum_dtype)


def platform() -> str:
  """Returns the kind of the devices in use: 'cpu', 'gpu' or 'tpu'."""
  return _platform.get() or jax.default_backend()


def cores() -> int:
  """Returns how many CPU cores this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def threads() -> int:
  """Returns how many cores jax uses for a product: all of them, unless PJRT_NPROC is set."""
  return int(os.environ.get('PJRT_NPROC') or cores())


def count_slices(devices) -> int:
  """Returns how many TPU slices (connected by DCN) these devices belong to; 1 for other devices."""
  return len({getattr(device, 'slice_index', None) for device in devices})


def describe(mesh: jax.sharding.Mesh) -> str:
  """Returns the mesh axes with more than one device, as in 'data 2 x fsdp 4'."""
  return ' x '.join(f'{axis} {n}' for axis, n in mesh.shape.items() if n > 1) or 'of one device'


def default_mesh(state_bytes: int, device_bytes: int | None) -> Mesh:
  """Returns the mesh of a run that names none: data parallelism for a small state, FSDP for a large one.

  Data parallelism costs one all-reduce per step, FSDP three collectives per layer. So every device has a copy
  of the state as long as that needs at most a quarter of its memory.

  Args:
    state_bytes: the size of parameters and optimizer state.
    device_bytes: the memory of a device; None for CPUs, which share the machine's memory.
  """
  small = device_bytes is None or state_bytes <= device_bytes / 4
  return Mesh() if small else Mesh(data=1, fsdp=-1)


def as_tuple(axes) -> tuple:
  """Returns an entry of a PartitionSpec (None, a name, or a tuple) as a tuple."""
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)


def pipeline_shape() -> tuple[int, int | None]:
  """Returns (rounds, microbatches) of a pipeline on the mesh in use; microbatches may be None."""
  return _pipeline.get()


def sum_dtype() -> str | None:
  """Returns `Mesh.sum_dtype` of the mesh in use."""
  return _sum_dtype.get()
