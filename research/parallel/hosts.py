"""The part of each host in a job: its share of a batch, and its arrays on the mesh."""

import jax
import numpy as np

from research.parallel.axes import axis_size, spec


def host_share() -> tuple[int, int]:
  """(k, n): the devices of this process hold the k-th of n equal parts of the rows of every batch.

  Where they hold all rows, or scattered ones (because a mesh axis without examples spans the processes), the
  share is the whole batch: (0, 1).
  """
  n = axis_size('batch')
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec('batch'))
  indices = sharding.addressable_devices_indices_map((n,)).values()
  first = min(i[0].start or 0 for i in indices)
  last = max(i[0].start or 0 for i in indices)
  count = len({i[0].start for i in indices})
  one_piece = last - first + 1 == count and first % count == 0 and n % count == 0
  return (first // count, n // count) if one_piece else (0, 1)


def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """This process's `host_share` of a batch of host arrays [batch, length], as global arrays on the mesh."""
  sharding = jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec('batch', 'length'))
  part, parts = host_share()

  def place_array(x):
    first = part * len(x)
    shape = (parts * len(x), *x.shape[1:])

    def rows(index):
      start, stop, _ = index[0].indices(shape[0])
      return x[(slice(start - first, stop - first), *index[1:])]

    return jax.make_array_from_callback(shape, sharding, rows)

  return {key: place_array(x) for key, x in batch.items()}


def on_mesh(abstract):
  """The shapes that `jax.eval_shape` gave, with shardings on the mesh in use: what Orbax and jax.jit want."""
  mesh = jax.sharding.get_mesh()  # eval_shape uses an abstract mesh, which they refuse

  def with_sharding(x):
    sharding = jax.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, abstract)
