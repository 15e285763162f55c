"""What jax reports of a TPU program's memory beside what XLA allots, for a chain of checkpointed products.

    uv run --extra tpu python experiments/tpu_fit/heap.py [--layers 8 57 58 60]

The input of every layer is 256 MiB. What is allotted is read from XLA's dump of its buffer assignment; a v5e
has 15.75 GiB for arguments and temporaries.
"""

import argparse
import os
import pathlib
import re
import tempfile

from research.compilation import chips
from research.core.errors import first_line

GIB = 2**30
DUMP = tempfile.TemporaryDirectory()
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_dump_to={DUMP.name}'
chips.prepare('v5e:2x2')  # before jax is imported

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402


def loss(weights, x):
  def layer(x, w):
    return jnp.tanh(x @ w) + x, None

  y, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
  return jnp.mean(y.astype(jnp.float32) ** 2)


def update(weights, x):
  return jax.tree.map(jnp.subtract, weights, jax.grad(loss)(weights, x))


def allotted() -> float:
  """Bytes of arguments and temporaries in the newest buffer assignment of the dump."""
  files = pathlib.Path(DUMP.name).glob('*jit_update*memory-usage-report.txt')
  newest = max(files, key=lambda file: file.stat().st_mtime)
  return float(re.search(r'color=0\)\nTotal bytes: (\d+)', newest.read_text())[1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--layers', type=int, nargs='+', default=[8, 57, 58, 60])
  devices, _ = chips.devices_of('v5e:2x2')
  mesh = jax.make_mesh((4,), ('data',), devices=devices)

  def array(shape, spec):
    sharding = jax.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

  print('GiB a device: layers, allotted, arguments + temp_size, peak')
  for layers in parser.parse_args().layers:
    arguments = (
      array((layers, 1024, 1024), jax.P(None, 'data')),
      array((2**19, 1024), jax.P('data')),
    )
    try:
      compiled = jax.jit(update, donate_argnums=0).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
      print(f'{layers:4}  {first_line(error)}')
      continue
    stats = compiled.memory_analysis()
    total = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    sizes = (allotted(), total, stats.peak_memory_in_bytes)
    print(f'{layers:4}  ' + ''.join(f'{size / GIB:8.2f}' for size in sizes))


if __name__ == '__main__':
  main()
