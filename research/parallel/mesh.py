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

import jax

from research.core.errors import Invalid, did_you_mean

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
MAY_STAY_WHOLE = ('kv_heads',)

rules_in_use = contextvars.ContextVar('rules', default=None)
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
    token, platform = rules_in_use.set(self.table), _platform.set(devices[0].platform)
    pipeline = _pipeline.set((self.stage_rounds, self.stage_microbatches))
    try:
      with jax.set_mesh(mesh):
        yield mesh
    finally:
      rules_in_use.reset(token)
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
