"""Compiles grouped products of experts for a v5p by three kernels, and prints their FLOPs and bytes.

    PYTHONPATH=$PWD:$PWD/.libtpu python experiments/tpu_fit/grouped.py

Forward and backward of 18,432 rows through 8 experts on one device. Needs libtpu and no TPU.
"""

from research.compilation import chips, traffic

chips.prepare('v5p:2x2x1')  # before jax is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax.experimental.pallas.ops.tpu.megablox import gmm  # noqa: E402

from research.model.kernels import grouped  # noqa: E402
from research.parallel.mesh import Mesh  # noqa: E402

ROWS, EMBED, MLP, EXPERTS = 18432, 4096, 14336, 8


def megablox(x, w, sizes):
  return gmm(x, w, sizes, jnp.bfloat16, (512, 1024, 1024))


def grouped_matmul(x, w, sizes):
  """What experts of a model run, with the blocks that they have for so many rows."""
  return grouped.grouped_matmul(x, w, sizes, 256)


def step(kernel):
  """Returns a function of (x, w, sizes, dy): the product and both gradients, whole on every device."""

  def both(x, w, sizes, dy):
    y, back = jax.vjp(lambda x, w: kernel(x, w, sizes), x, w)
    return y, back(dy)

  return jax.jit(jax.shard_map(both, in_specs=jax.P(), out_specs=jax.P(), check_vma=False))


def main() -> None:
  devices, _ = chips.devices_of('v5p:2x2x1', 1)
  shapes = ((ROWS, EMBED), (EXPERTS, EMBED, MLP), (EXPERTS,), (ROWS, MLP))
  dtypes = (jnp.bfloat16, jnp.bfloat16, jnp.int32, jnp.bfloat16)
  pairs = zip(shapes, dtypes, strict=True)
  print(f'necessary: {6 * ROWS * EMBED * MLP:.3e} FLOPs')
  with Mesh().use(devices) as mesh:
    where = jax.sharding.NamedSharding(mesh, jax.P())
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for shape, dtype in pairs]
    for kernel in (jax.lax.ragged_dot, megablox, grouped_matmul):
      compiled = step(kernel).lower(*arrays).compile()
      flops = compiled.cost_analysis()['flops']
      moved = traffic.moved_bytes(compiled.as_text()) / 2**30
      print(f'{kernel.__name__}: {flops:.3e} FLOPs, {moved:.2f} GiB moved', flush=True)


if __name__ == '__main__':
  main()
