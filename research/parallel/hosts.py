"""What each host of a job does: its share of a batch, and arrays placed on the mesh."""

import jax
import numpy as np

from research.parallel.axes import axis_size, spec


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


def on_mesh(abstract):
  """Shapes as `jax.eval_shape` gives them, on the mesh in use: as Orbax restores and jax compiles."""
  mesh = jax.sharding.get_mesh()  # eval_shape's is an abstract one, which they refuse
  sharding = lambda x: jax.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), abstract
  )
