"""FIXME: say what this module is."""

import dataclasses
import itertools
import math
import sys

from research.compilation import chips
from research.compilation.report import GIB, compile_run
from research.core import configs
from research.core.errors import UserError
from research.parallel.mesh import MESH_AXES, Mesh
from research.training.run import Run

REMAT = ('none', 'dots', 'full')


def candidates(run: Run, devices: int) -> list[tuple[Mesh, int, str]]:
  """Meshes, batches a device and policies worth trying; the batch of the run stays what it is."""
  meshes = [Mesh(), Mesh(data=1, fsdp=-1)]
  meshes += [Mesh(data=1, fsdp=-1, tensor=n) for n in (2, 4, 8) if devices % n == 0]
  parts = [n for n in (1, 2, 4) if run.batch_size % n == 0]
  return list(itertools.product(meshes, parts, REMAT))


def search(config, run: Run, flags) -> list[dict]:
  """A report, or an error, of every candidate; those that fit first, the fastest first."""
  devices, _ = chips.devices_of(flags.topology, flags.slices)
  rows = []
  for mesh, parts, remat in candidates(run, len(devices)):
    binding = f"Stack.remat='{remat}'"
    row = {'mesh': _short(mesh), 'microbatches': parts, 'remat': remat}
    try:
      one = configs.load(flags.gin_file, [*flags.gin, binding]).build()
      one = dataclasses.replace(one, mesh=mesh, microbatches=parts)
      row |= compile_run(one, flags.topology, flags.slices)
      row['mesh'] = _short(mesh)
    except (UserError, ValueError) as error:
      row['error'] = str(error)
    print(_row(row), file=sys.stderr, flush=True)
    rows.append(row)
  return sorted(rows, key=lambda row: row.get('predicted_step_s', math.inf))


def _short(mesh: Mesh) -> str:
  sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
  return ' x '.join(f'{k} {"*" if v == -1 else v}' for k, v in sizes.items() if v != 1) or 'one'


def _row(row: dict) -> str:
  head = f'{row["mesh"]:22}{row["microbatches"]:>6}  {row["remat"]:8}'
  if 'error' in row:
    return f'{head}{row["error"]}'
  step = (
    f'{row["predicted_step_s"]:>9.4f}{row["no_overlap_step_s"]:>12.4f}{row["mfu"]:>7.0%}'
    if 'mfu' in row
    else ''
  )
  return f'{head}{row["memory"]["peak"] / GIB:>8.2f}{step}'
