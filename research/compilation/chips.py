"""Peak rates of accelerators, and TPU slices by name, which need not exist on this machine."""

import dataclasses
import os
import re

from research.core.errors import UserError, did_you_mean, first_line


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device's peak rates.

  Attributes:
    flops: FLOPs per second in bfloat16.
    hbm_bytes: bytes of memory.
    hbm_rate: bytes per second of the memory.
    ici_rate: bytes per second, in each direction, of a link to a neighbour.
    torus: links wrap around along a side of so many chips or more (see `wraps`).
    dcn_rate: bytes per second of a chip's share of its host's network.
  """

  flops: float
  hbm_bytes: float
  hbm_rate: float
  ici_rate: float
  torus: int
  dcn_rate: float


GIB = 2**30
# Rates: Austin et al. 2025, "How to Scale Your Model" (jax-ml.github.io/scaling-book), part 2, TPU specs and
# networking, read on 2026-11-22. Memory: Google Cloud's page of each generation. A device is a whole chip, in
# v4 (megacore) too. The torus of a training chip needs sides that are multiples of 4, that of v5e and v6e sides
# of 16.
CHIPS = {
  'v4': Chip(2.75e14, 32 * GIB, 1.2e12, 4.5e10, 4, 6.25e9),
  'v5e': Chip(1.97e14, 16 * GIB, 8.2e11, 4.5e10, 16, 3.125e9),
  'v5p': Chip(4.59e14, 95 * GIB, 2.8e12, 9e10, 4, 6.25e9),
  'v6e': Chip(9.2e14, 32 * GIB, 1.6e12, 9e10, 16, 12.5e9),
}
EXAMPLES = (
  'v4:4x4x4', 'v5e:2x4', 'v5e:4x4', 'v5e:16x16', 'v5p:2x2x4', 'v5p:4x4x4', 'v5p:8x8x8', 'v6e:4x4', 'v6e:16x16',
  'cpu:8', 'here',
)  # fmt: skip


def wraps(topology: str) -> tuple[bool, ...]:
  """Returns along which sides of a TPU slice the links wrap around, from the last chip to the first.

  In two dimensions they do so along a side of a full pod (16). In three they do so if every side is a multiple
  of 4.
  """
  kind, _, size = topology.partition(':')
  sides = [int(n) for n in size.split('x')]
  if len(sides) == 3:
    return (all(n % CHIPS[kind].torus == 0 for n in sides),) * 3
  return (*(n >= CHIPS[kind].torus for n in sides), False)


def prepare(topology: str) -> None:
  """Sets the environment variables that jax needs for this topology. Call it before jax is imported.

  Raises:
    UserError: there is no such kind of device.
  """
  kind, _, size = topology.partition(':')
  if topology == 'here':
    return
  if kind == 'cpu' and size.isdigit() and int(size) > 0:
    flags = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{flags} --xla_force_host_platform_device_count={size}'
    # More threads than cores: with fewer, collectives of all these devices can wait for each other without end.
    os.environ['PJRT_NPROC'] = str(max(16, 2 * int(size)))
  elif kind not in CHIPS or not re.fullmatch(r'\d+x\d+(x\d+)?', size):
    hint = did_you_mean(topology, EXAMPLES)
    hint = hint if hint.startswith(' Did') else ''
    raise UserError(
      f'--topology={topology} is not a slice.{hint} Write one like {", ".join(EXAMPLES)}: '
      'the chips along each side of the slice, and not their number as in v5e-256.'
    )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  # With these variables libtpu compiles without a TPU: it does not look for one.
  quiet = {
    'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-1', 'TPU_LOG_DIR': 'disabled',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # this process holds no TPU, so another one may compile too
  }  # fmt: skip
  os.environ.update(quiet if kind in CHIPS else {})


def devices_of(topology: str, slices: int = 1) -> tuple[list, Chip | None]:
  """Returns the devices of a topology (see `prepare`), and the rates of each; None if they are not known.

  Raises:
    UserError: libtpu is not installed, or has no such slice.
  """
  import jax

  kind = topology.partition(':')[0]
  if kind not in CHIPS:
    if slices > 1:
      raise UserError(f'--slices={slices}: only TPUs come in slices, and --topology={topology}.')
    return jax.devices(), None
  from jax.experimental import topologies

  try:
    import libtpu  # noqa: F401
  except ImportError:
    raise UserError(
      f'--topology={topology} needs libtpu, the compiler for TPUs, which runs on any Linux machine: '
      'uv sync --extra tpu, or pip install libtpu.'
    ) from None
  # Without `wrap` XLA takes the slice for a mesh and uses other algorithms (all-reduce in place of all-gather).
  options = {'wrap': wraps(topology), 'chips_per_host_bounds': (2, 2, 1)}
  options |= {'num_slices': slices} if slices > 1 else {}
  if kind == 'v4':
    options['chip_config_name'] = 'megacore'
  try:
    description = topologies.get_topology_desc(topology_name=topology, platform='tpu', **options)
  except Exception as error:  # an XLA runtime error without a type of its own
    why = first_line(error)
    near = [name for name in EXAMPLES if name.startswith(kind)]
    raise UserError(
      f'--topology={topology}: {why}. Slices that exist: {", ".join(near)}.'
    ) from None
  return description.devices, CHIPS[kind]
