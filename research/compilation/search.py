"""Searches meshes, microbatches and rematerialisation policies for the fastest step that fits."""

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
  """Returns (mesh, microbatches, policy) of all candidates. The batch of the run is unchanged."""
  meshes = [Mesh(), Mesh(data=1, fsdp=-1)]
  meshes += [Mesh(data=1, fsdp=-1, tensor=n) for n in (2, 4, 8) if devices % n == 0]
  microbatches = [n for n in (1, 2, 4) if run.batch_size % n == 0]
  return list(itertools.product(meshes, microbatches, REMAT))


def search(run: Run, flags) -> list[dict]:
  """Returns a report of every candidate, or its error, the fastest first and those that do not fit last.

  Prints each as soon as it is compiled, since all of them together take minutes.
  """
  devices, _ = chips.devices_of(flags.topology, flags.slices)
  rows = []
  for mesh, microbatches, remat in candidates(run, len(devices)):
    binding = f"Stack.remat='{remat}'"
    row = {'mesh': mesh_text(mesh), 'microbatches': microbatches, 'remat': remat}
    try:
      candidate = configs.load(flags.gin_file, [*flags.gin, binding]).build()
      candidate = dataclasses.replace(candidate, mesh=mesh, microbatches=microbatches)
      row |= compile_run(candidate, flags.topology, flags.slices)
      row['mesh'] = mesh_text(mesh)
    except (UserError, ValueError) as error:
      row['error'] = str(error)
    print(show_row(row), file=sys.stderr, flush=True)
    rows.append(row)

  def step_seconds(row):
    return row.get('predicted_step_s', math.inf)

  return sorted(rows, key=step_seconds)


def mesh_text(mesh: Mesh) -> str:
  """Returns the axes of a mesh that split anything, as in 'fsdp * x tensor 2'; * means all other devices."""
  sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
  return (
    ' x '.join(f'{k} {"*" if v == -1 else v}' for k, v in sizes.items() if v != 1) or 'one device'
  )


def show_rows(rows: list[dict]) -> str:
  """Returns the reports of a search as a table."""
  head = f'{"mesh":22}{"parts":>6}  {"remat":8}{"GiB":>8}{"step s":>9}{"no overlap":>12}{"MFU":>7}'
  return '\n'.join([head, *map(show_row, rows)])


def show_row(row: dict) -> str:
  """Returns a line of the table."""
  head = f'{row["mesh"]:22}{row["microbatches"]:>6}  {row["remat"]:8}'
  if 'error' in row:
    return f'{head}{row["error"]}'
  line = f'{head}{row["memory"]["peak"] / GIB:>8.2f}'
  if 'mfu' not in row:  # a device whose peak rates are not known
    return line
  return f'{line}{row["predicted_step_s"]:>9.4f}{row["no_overlap_step_s"]:>12.4f}{row["mfu"]:>7.0%}'
