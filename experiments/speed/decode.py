"""Decoding against transformers and llama.cpp on a CPU: tokens a second of a 135M-parameter LLaMA, float32.

    python experiments/speed/decode.py [--batch 1 --batch 8] [--variant isoflop] [--repeats 3]
    python experiments/speed/decode.py --operations --batch 8    # where ours spends its time
    python experiments/speed/decode.py --gpu    # a LLaMA of 1.1B parameters in bfloat16, against transformers

Every measurement is a process of its own, one at a time and in turns, so that a busy machine slows all alike.
Each reads `--batch` prompts of 16 random tokens and generates 64 tokens greedily for each. The weights are
random, of SmolLM2-135M's shape (decode.gin) or of llama1b.gin's. The time is of the whole call, host and prompt
included, the median of three calls after one that compiles.

`products` are the matrix products of a step alone, as XLA does them, and so a floor for `isoflop`. Each
generated token reads all the parameters once, so the table also says how many of their bytes a second that
is; `bandwidth` is what the machine's memory gives to a sum over an array of the same size. Needs torch and
transformers (docs/contributing.md); xllamacpp and gguf for llama.cpp, which is left out without them.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import operations

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from research.core import cli  # noqa: E402

PROMPT, NEW, ROOM = 16, 64, 128  # tokens
GPU = '--gpu' in sys.argv
VOCAB, EMBED, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, TIED = (
  (32000, 2048, 16, 16, 8, 128, 8192, False) if GPU else (49152, 576, 30, 9, 3, 64, 1536, True)
)
BYTES = 2 if GPU else 4  # of a parameter
CALLS = 3  # timed, after one that compiles


def prompts(batch: int) -> np.ndarray:
  """[batch, PROMPT], random tokens."""
  return np.random.default_rng(0).integers(3, VOCAB, (batch, PROMPT))


def isoflop(batch: int) -> Callable[[], int]:
  """`inference.engine` with a slot for each prompt."""
  import jax
  from flax import nnx

  from research.core import configs
  from research.inference.engine import Engine
  from research.inference.request import Request
  from research.parallel.mesh import Mesh

  name = 'llama1b' if GPU else 'decode'
  model = configs.load(str(ROOT / f'experiments/speed/{name}.gin'), root='MODEL').tree()

  def init(key):
    params = nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))
    return jax.tree.map(lambda x: x.astype('bfloat16'), params) if GPU else params

  with Mesh().use(jax.devices()[:1]):
    abstract = jax.eval_shape(lambda key: model(rngs=nnx.Rngs(params=key)), jax.random.key(0))
    params = jax.jit(init)(jax.random.key(0))
    engine = Engine(
      nnx.graphdef(abstract), params, slots=batch, room=ROOM, together=max(1, batch // 4)
    )
  requests = [Request(prompt=tuple(map(int, row)), max_tokens=NEW) for row in prompts(batch)]

  def call() -> int:
    with Mesh().use(jax.devices()[:1]):
      return sum(len(completion.tokens) for completion in engine.run(requests))

  return call


def products(batch: int) -> Callable[[], int]:
  """The matrix products of every step of `isoflop`, in order, with nothing between them."""
  import jax
  import jax.numpy as jnp

  from research.model.parameters import project
  from research.parallel.mesh import Mesh

  heads, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
  # As the engine keeps them: by output, and those with the same input as one (inference/by_output.py).
  shapes = {
    'queries, keys, values': (heads + 2 * keys, EMBED), 'output': (EMBED, heads),
    'gates': (2 * MLP, EMBED), 'down': (EMBED, MLP),
  }  # fmt: skip
  random = np.random.default_rng(0)

  def matrix(shape):
    return jnp.asarray(random.standard_normal(shape, np.float32) * 0.02)

  layers = [{name: matrix(shape) for name, shape in shapes.items()} for _ in range(LAYERS)]
  table = matrix((VOCAB, EMBED))

  def times(x, matrix):
    return project(x, matrix, (None, None), (None, None), transposed=True)

  @jax.jit
  def step(x, layers, table):
    for w in layers:
      # Keys and values are added to the queries only so that nothing is left out as unused.
      y = times(x, w['queries, keys, values'])
      x = times(y[:, :heads] + jnp.pad(y[:, heads:], ((0, 0), (0, heads - 2 * keys))), w['output'])
      y = times(x, w['gates'])
      x = times(y[:, :MLP] * y[:, MLP:], w['down'])
    return jnp.argmax(times(x, table), axis=-1)

  def call() -> int:
    x = jnp.ones((batch, EMBED))
    with Mesh().use(jax.devices()[:1]):
      for _ in range(NEW):
        step(x, layers, table).block_until_ready()
    return batch * NEW

  return call


def transformers(batch: int, cache: str, compiled: bool) -> Callable[[], int]:
  """`generate` of transformers' LlamaForCausalLM."""
  import torch
  from transformers import LlamaConfig, LlamaForCausalLM

  torch.manual_seed(0)
  config = LlamaConfig(
    vocab_size=VOCAB, hidden_size=EMBED, intermediate_size=MLP, num_hidden_layers=LAYERS,
    num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, tie_word_embeddings=TIED,
    max_position_embeddings=ROOM, eos_token_id=None, bos_token_id=None, pad_token_id=0,
  )  # fmt: skip
  model = LlamaForCausalLM(config).eval()
  ids = torch.from_numpy(prompts(batch))
  if GPU:
    model, ids = model.to('cuda', torch.bfloat16), ids.to('cuda')
  if compiled:
    model.forward = torch.compile(model.forward)
  more = {'cache_implementation': 'static', 'max_length': ROOM} if cache == 'static' else {}

  def call() -> int:
    more.pop('max_length', None)
    with torch.inference_mode():
      tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, **more
      )
    return batch * (tokens.shape[1] - PROMPT)

  return call


def write_gguf(path: str) -> None:
  """A random model of this shape in llama.cpp's format, with a vocabulary of made-up words."""
  import gguf

  writer, random = gguf.GGUFWriter(path, 'llama'), np.random.default_rng(0)
  writer.add_context_length(ROOM)
  writer.add_embedding_length(EMBED)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(MLP)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_rope_dimension_count(HEAD_DIM)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)
  writer.add_tokenizer_model('llama')
  writer.add_token_list([f'w{i}' for i in range(VOCAB)])
  writer.add_token_scores([0.0] * VOCAB)
  writer.add_token_types([gguf.TokenType.NORMAL] * VOCAB)

  def add(name: str, *shape: int) -> None:
    # Norms' scales are ones.
    ones = len(shape) == 1
    x = np.ones(shape, np.float32) if ones else random.standard_normal(shape, np.float32) * 0.02
    writer.add_tensor(f'{name}.weight', x)

  add('token_embd', VOCAB, EMBED)
  add('output_norm', EMBED)
  for layer in range(LAYERS):
    at = f'blk.{layer}'
    add(f'{at}.attn_norm', EMBED)
    add(f'{at}.attn_q', HEADS * HEAD_DIM, EMBED)
    add(f'{at}.attn_k', KV_HEADS * HEAD_DIM, EMBED)
    add(f'{at}.attn_v', KV_HEADS * HEAD_DIM, EMBED)
    add(f'{at}.attn_output', EMBED, HEADS * HEAD_DIM)
    add(f'{at}.ffn_norm', EMBED)
    add(f'{at}.ffn_gate', MLP, EMBED)
    add(f'{at}.ffn_up', MLP, EMBED)
    add(f'{at}.ffn_down', EMBED, MLP)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


def llama_cpp(batch: int) -> Callable[[], int]:
  """llama.cpp's server within this process, with a slot for each prompt; keys and values in float32 too."""
  import xllamacpp

  path = str(pathlib.Path(tempfile.mkdtemp()) / 'model.gguf')
  write_gguf(path)
  parameters = xllamacpp.CommonParams()
  parameters.model.path = path
  parameters.n_ctx, parameters.n_parallel = ROOM * batch, batch
  parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = os.cpu_count()
  parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  server = xllamacpp.Server(parameters)
  pool = ThreadPoolExecutor(batch)

  def ask(prompt: list[int]) -> int:
    answer = server.handle_completions({
      'prompt': prompt, 'max_tokens': NEW, 'temperature': 0, 'ignore_eos': True, 'cache_prompt': False,
    })  # fmt: skip
    return answer['usage']['completion_tokens']

  return lambda: sum(pool.map(ask, prompts(batch).tolist()))


VARIANTS: dict[str, Callable[[int], Callable[[], int]]] = {
  'isoflop': isoflop,
  'products': products,
  'transformers': lambda batch: transformers(batch, 'dynamic', False),
  'transformers-static': lambda batch: transformers(batch, 'static', False),
  'transformers-compiled': lambda batch: transformers(batch, 'static', True),
  'llama.cpp': llama_cpp,
}

# On a GPU `generate` compiles the step of a static cache by itself.
GPU_VARIANTS = ('isoflop', 'transformers', 'transformers-static')


def bandwidth() -> float:
  """Bytes a second that all cores read together, the best of several sums over 512 MiB; on a GPU over 4 GiB."""
  import torch

  x, best = torch.ones(2**30 if GPU else 2**27, device='cuda' if GPU else 'cpu'), np.inf
  for _ in range(10):
    start = time.perf_counter()
    float(x.sum())
    best = min(best, time.perf_counter() - start)
  return x.numel() * 4 / best


def measure(variant: str, batch: int) -> dict:
  """One process's figures."""
  if variant == 'bandwidth':
    return {'bytes_per_s': bandwidth()}
  began = time.monotonic()
  call = VARIANTS[variant](batch)
  call()
  first = time.monotonic() - began
  rates = []
  for _ in range(CALLS):
    start = time.perf_counter()
    rates.append(call() / (time.perf_counter() - start))
  return {'tokens_per_s': statistics.median(rates), 'best': max(rates), 'first_s': first}


def in_process(variant: str, batch: int) -> dict | None:
  """`measure` in a fresh process, with the huge pages that the commands ask for; None if that fails."""
  command = [sys.executable, __file__, '--measure', variant, '--batch', str(batch)]
  command += ['--gpu'] if GPU else []
  environment = {'JAX_PLATFORMS': 'cuda' if GPU else 'cpu'} | os.environ
  environment |= cli.CPU_ENVIRONMENT
  done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if done.returncode:
    why = (done.stderr.strip().splitlines() or ['no message'])[-1]
    print(f'{variant} at batch {batch} does not work here: {why}', file=sys.stderr, flush=True)
    return None
  return json.loads(done.stdout.splitlines()[-1])


def table(batch: int, results: dict[str, list[dict]], peak: float) -> str:
  """Medians over the repeats."""
  size = BYTES * (
    VOCAB * EMBED + LAYERS * (2 * EMBED * (HEADS + KV_HEADS) * HEAD_DIM + 3 * EMBED * MLP)
  )
  theirs = [rows for name, rows in results.items() if name.startswith('transformers')]

  def median(rows: list[dict]) -> float:
    return statistics.median(row['tokens_per_s'] for row in rows)

  reference = max(map(median, theirs), default=float('nan'))
  lines = [
    f'batch {batch}, {size / 1e6:.0f} MB of parameters; memory {peak / 1e9:.1f} GB/s, so at most '
    f'{batch * peak / size:.0f} tokens/s',
    f'{"":22} {"tokens/s":>9} {"best":>7} {"ms/step":>8} {"GB/s":>6} {"first call":>10} '
    f'{"by transformers":>16}',
  ]
  for name, rows in results.items():
    rate, best = median(rows), max(row['best'] for row in rows)
    first = statistics.median(row['first_s'] for row in rows)
    lines.append(
      f'{name:22} {rate:9.1f} {best:7.1f} {1e3 * batch / rate:8.1f} {rate / batch * size / 1e9:6.1f} '
      f'{first:8.1f} s {rate / reference:16.2f}'
    )
  return '\n'.join(lines)


def main() -> None:
  # No short forms: GPU is read from the flag as it is written.
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0], allow_abbrev=False)
  parser.add_argument('--batch', action='append', type=int, help='default: 1, 8 and 64')
  parser.add_argument('--variant', action='append', choices=VARIANTS, help='default: all')
  parser.add_argument('--repeats', type=int, default=3, help='processes of each')
  parser.add_argument(
    '--operations', action='store_true', help="XLA's operations by the time they take"
  )
  parser.add_argument('--gpu', action='store_true', help='the larger model, on a GPU')
  parser.add_argument('--measure', choices=[*VARIANTS, 'bandwidth'], help=argparse.SUPPRESS)
  flags = parser.parse_args()
  apart = set(flags.variant or ()) - set(GPU_VARIANTS)
  if GPU and apart:
    parser.error(
      f'{", ".join(sorted(apart))}: for CPUs alone. With --gpu choose of {", ".join(GPU_VARIANTS)}.'
    )
  if flags.measure:
    print(json.dumps(measure(flags.measure, flags.batch[0])))
    return
  if flags.operations:
    if flags.variant:
      parser.error('--operations shows ours alone: leave out --variant.')
    for batch in flags.batch or (1, 8, 64):
      call = isoflop(batch)
      call()
      print(
        f'batch {batch}, a call of {NEW} tokens each:\n{operations.table(operations.traced(call, 1), 1)}',
        flush=True,
      )
    return
  peak = in_process('bandwidth', 1)['bytes_per_s']
  for batch in flags.batch or (1, 8, 64):
    results: dict[str, list[dict]] = {}
    for _ in range(flags.repeats):
      for variant in flags.variant or (GPU_VARIANTS if GPU else VARIANTS):
        result = in_process(variant, batch)
        if result:
          results.setdefault(variant, []).append(result)
    print(table(batch, results, peak), flush=True)


if __name__ == '__main__':
  main()
