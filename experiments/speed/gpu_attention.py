"""cuDNN's attention as we call it against the plain one: errors of output and gradients, and milliseconds.

    python experiments/speed/gpu_attention.py [--small]

It needs no hands, no data and no network. `--small` tries the script out on a CPU, where jax's own product
takes the place of cuDNN's. The error is the largest of the output and of the gradients, relative to the largest
value of each, against the plain product in float32. Times are those of both in bfloat16, forward and backward.
"""

import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SCALE = 64**-0.5


def cases_of(length: int) -> dict[str, dict]:
  """Name: what differs from plain causal attention."""
  import jax
  import jax.numpy as jnp

  segments = jnp.broadcast_to(jnp.arange(length) // (length // 3) + 1, (2, length))
  prefix = jnp.arange(length)[None] < jnp.array([[length // 2], [length // 5]])
  bias = jax.random.normal(jax.random.key(9), (8, 2 * length - 1))
  return {
    'causal': {},
    'packed': {'segments': segments},
    'window': {'window': length // 4},
    'both': {'segments': segments, 'window': length // 4},
    'encoder': {'causal': False},
    'prefix': {'prefix': prefix},
    'bias': {'bias': bias},
    'bias, encoder': {'bias': bias, 'causal': False},
    'bias, packed': {'bias': bias, 'segments': segments},
  }


def functions(case: dict, implementation: str):
  """Returns cuDNN's attention and the plain one, of (q, k, v) or (q, k, v, bias)."""
  from research.model.attention import visible
  from research.model.kernels import flash
  from research.model.kernels.dot_product import dot_product_attention
  from research.model.kernels.tiled import Sight
  from research.model.positions import by_place

  segments, prefix = case.get('segments'), case.get('prefix')
  knobs = {'causal': case.get('causal', True), 'window': case.get('window')}

  def fused(q, k, v, bias=None):
    sight = Sight(segments, segments, prefix, bias)
    return flash._cudnn(q, k, v, sight, scale=SCALE, implementation=implementation, **knobs)

  def plain(q, k, v, bias=None):
    length = q.shape[1]
    mask = visible(segments, segments, (length, length), prefix=prefix, **knobs)
    bias = None if bias is None else by_place(bias, length)[None]
    return dot_product_attention(q, k, v, mask=mask, bias=bias, scale=SCALE)

  return fused, plain


def compare(small: bool) -> dict[str, dict]:
  """Returns {case: {'error': ..., 'fused_ms': ..., 'plain_ms': ...}}; {'failed': ...} where cuDNN refuses."""
  import jax
  import jax.numpy as jnp

  from research.parallel.mesh import Mesh

  length = 64 if small else 2048
  shapes = [(2, length, heads, 64) for heads in (8, 4, 4, 8)]
  draw = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
  *arrays, dy = (x.astype(jnp.bfloat16) for x in draw)

  def with_gradients(f):
    def both(*xs):
      y, back = jax.vjp(f, *xs)
      return y, *back(dy.astype(y.dtype))

    return jax.jit(both)

  def milliseconds(f, xs):
    jax.block_until_ready(f(*xs))
    began = time.perf_counter()
    for _ in range(20):
      y = f(*xs)
    jax.block_until_ready(y)
    return 1e3 * (time.perf_counter() - began) / 20

  rows = {}
  with Mesh(data=1).use(jax.devices()[:1]):
    for name, case in cases_of(length).items():
      functions_of_case = functions(case, 'xla' if small else 'cudnn')
      fused, plain = (with_gradients(f) for f in functions_of_case)
      xs = [*arrays, *([case['bias']] if 'bias' in case else [])]
      with jax.default_matmul_precision('highest'):
        right = with_gradients(functions_of_case[1])(*(x.astype(jnp.float32) for x in xs))
      try:
        ours = fused(*xs)
      except Exception as error:  # cuDNN's refusals have no type of their own
        rows[name] = {'failed': str(error).splitlines()[0][:200]}
        continue
      worst = [
        float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(right, ours, strict=True)
      ]
      rows[name] = {
        'error': max(worst), 'fused_ms': milliseconds(fused, xs), 'plain_ms': milliseconds(plain, xs)
      }  # fmt: skip
  return rows


def main() -> None:
  sys.path.insert(0, str(ROOT))
  print('| attention | largest error | cuDNN, ms | plain, ms |\n|---|---|---|---|')
  for name, row in compare('--small' in sys.argv[1:]).items():
    if 'failed' in row:
      print(f'| {name} | {row["failed"]} | | |')
    else:
      print(f'| {name} | {row["error"]:.4f} | {row["fused_ms"]:.2f} | {row["plain_ms"]:.2f} |')


if __name__ == '__main__':
  main()
