"""The share of each host in a job: its rows of a batch, and its parts of arrays on the mesh."""

import jax
import numpy as np

from research.parallel.axes import axis_size, spec


def host_share() -> tuple[int, int]:
  """Returns (k, n): the devices of this process have the k-th of n equal parts of the rows of every batch.

  If they have all rows, or rows that are not contiguous (a mesh axis without examples spans the processes), the
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


def device_bytes(devices) -> int | None:
  """Returns the memory of a device of a job; None where it does not say. A process can ask its own alone."""
  own = [device for device in devices if device.process_index == jax.process_index()]
  return ((own or devices)[0].memory_stats() or {}).get('bytes_limit')


def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
  """Turns this process's `host_share` of a batch, arrays [batch, length], into global arrays on the mesh."""
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
  """Returns the shapes of `jax.eval_shape` with shardings on the mesh in use, for Orbax and jax.jit."""
  mesh = jax.sharding.get_mesh()  # eval_shape uses an abstract mesh, which they refuse

  def with_sharding(x):
    sharding = jax.NamedSharding(mesh, x.sharding.spec if x.sharding else jax.P())
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  return jax.tree.map(with_sharding, abstract)
