"""What a mixture of experts and a Mamba cost on a CPU, in processor time (less spoilt by a busy machine).

  python experiments/speed/parts.py moe      # top-2-of-8 beside a dense model of the same active size
  python experiments/speed/parts.py mamba    # tokens per second and memory against length

A step is loss and gradients of all parameters, float32; the best of several.
"""

import argparse
import os
import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from research.core import configs  # noqa: E402
from research.model import counts  # noqa: E402
from research.parallel.mesh import Mesh  # noqa: E402


def step_of(preset: str, bindings: list[str], batch: int, length: int):
  """(the compiled step, its parameters, its batch, how many parameters are active)."""
  model = configs.load(f'gin/models/{preset}.gin', bindings, root='MODEL').tree()
  module = counts.abstract(model)
  graphdef = nnx.graphdef(module)
  params = jax.jit(lambda key: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key)))))(
    jax.random.key(0)
  )
  tokens = np.random.default_rng(0).integers(1, 256, (batch, length)).astype(np.int32)

  def loss(params, tokens):
    logits, penalties = nnx.merge(graphdef, params)({'decoder_input_tokens': tokens})
    target = jnp.sum(jnp.where(jax.nn.one_hot(tokens, logits.shape[-1], dtype=bool), logits, 0), -1)
    return jnp.mean(jax.nn.logsumexp(logits, -1) - target) + sum(penalties.values())

  step = jax.jit(jax.value_and_grad(loss)).lower(params, tokens).compile()
  active = counts.count(model, {'targets': length}).params_active
  return step, params, tokens, active


def seconds(step, *args, repeats: int = 5) -> float:
  """Processor seconds of a step, the best of `repeats`."""
  times = []
  for _ in range(repeats):
    start = time.process_time()
    jax.block_until_ready(step(*args))
    times.append(time.process_time() - start)
  return min(times)


def moe() -> None:
  sizes = ['VOCAB=512', 'EMBED=256', 'LAYERS=2', 'HEADS=4', 'KV_HEADS=4', 'HEAD_DIM=64']
  experts = step_of('mixtral/8x7b', [*sizes, 'MLP=512', 'EXPERTS=8', 'ACTIVE=2'], 8, 256)
  dense = step_of('llama/7b', [*sizes, 'MLP=1024'], 8, 256)
  experts_ms = 1e3 * seconds(*experts[:3])
  dense_ms = 1e3 * seconds(*dense[:3])
  print(
    f'top-2 of 8: {experts[3]:,} active parameters, {experts_ms:.0f} ms of CPU a step of 2,048 tokens'
  )
  print(f'dense:      {dense[3]:,} parameters, {dense_ms:.0f} ms of CPU a step')
  print(f'ratio {experts_ms / dense_ms:.2f}')


def mamba() -> None:
  sizes = ['VOCAB=512', 'EMBED=64', 'LAYERS=2']
  for length in (256, 1024, 4096):
    step, params, tokens, _ = step_of('mamba/130m', sizes, 2, length)
    temporaries = step.memory_analysis().temp_size_in_bytes
    rate = tokens.size / seconds(step, params, tokens, repeats=3)
    print(
      f'length {length}: {rate:,.0f} tokens per CPU second, {temporaries / 2**20:.1f} MiB of temporaries'
    )


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('part', choices=('moe', 'mamba'))
  with Mesh().use(jax.devices()[:1]):
    {'moe': moe, 'mamba': mamba}[parser.parse_args().part]()
