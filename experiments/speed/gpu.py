"""What one GPU does: a step of a LLaMA of 1.2 billion parameters beside compiled PyTorch's, and populations.

    python experiments/speed/gpu.py [--repeats 3] [--part step] [--small]

It needs no hands, no data and no network: one call prints the whole table. Every measurement is a process of
its own, in turns. A step is the whole update (loss, gradients, clipping to norm 1, AdamW; float32 parameters,
bfloat16 activations), timed over a stretch of steps that the device works off without waiting for the host.
Needs jax with CUDA (the extra `cuda`) and, for the comparison, torch with CUDA. `--small` tries the script out
on a CPU.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PARTS = ('step', 'attention', 'population')
VARIANTS = {
  'step': ('isoflop', 'isoflop-scanned', 'isoflop-dots', 'isoflop-unfused', 'torch-compiled'),
  'attention': ('cudnn',),
  'population': ('together', 'alone'),
}
PEAK = (
  989.4e12  # dense bfloat16 of an H100 SXM or H200 (NVIDIA's data sheets); MFU is told against it
)
MEMBERS = 64
MESH = contextlib.ExitStack()  # in use until the process ends
SHAPE = {'vocab': 32000, 'embed': 2048, 'layers': 16, 'heads': 16, 'kv_heads': 8, 'mlp': 8192}
SMALL = {'vocab': 512, 'embed': 64, 'layers': 2, 'heads': 4, 'kv_heads': 2, 'mlp': 128}


def seconds_a_step(advance, wait, steps: int) -> float:
  """Of a stretch of steps after three that warm up."""
  for _ in range(3):
    last = advance()
  wait(last)
  began = time.perf_counter()
  for _ in range(steps):
    last = advance()
  wait(last)
  return (time.perf_counter() - began) / steps


def tokens_of(shape: tuple[int, int], vocab: int):
  """(inputs, targets), int32 [batch, length]: uniform tokens but 0 and 1."""
  import numpy as np

  random = np.random.default_rng(0)
  tokens = random.integers(2, vocab, (shape[0], shape[1] + 1), np.int32)
  return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def our_program(file: str, bindings: list[str], axis: str | None = None):
  """(run, program, its batch on the device), on one device.

  Args:
    axis: the only axis of the mesh, as a population has it; None is the run's own mesh.
  """
  sys.path.insert(0, str(ROOT))
  import jax
  import numpy as np

  from research.core import configs
  from research.parallel import hosts
  from research.training.program import make_program, mesh_of

  run = configs.load(file, bindings).build()
  devices = jax.devices()[:1]
  mesh = (
    jax.set_mesh(jax.make_mesh((1,), (axis,), devices=devices))
    if axis
    else mesh_of(run, devices).use()
  )
  MESH.enter_context(mesh)
  program = make_program(run)
  inputs, targets = tokens_of((run.batch_size, run.train.lengths['targets']), program.vocab)
  weights = np.ones_like(targets)
  batch = {'decoder_input_tokens': inputs, 'decoder_target_tokens': targets}
  return run, program, hosts.place(batch | {'decoder_loss_weights': weights})


def our_step(variant: str, flags) -> dict:
  """Our update: layers written out, or scanned; then all but products recomputed, or attention not fused."""
  bindings = (
    [] if variant == 'isoflop' else ['stack.Stack.scan = True', 'run.Run.logits_chunks = None']
  )
  bindings += ["stack.Stack.remat = 'dots'"] if variant == 'isoflop-dots' else []
  bindings += flags.gin
  if flags.small:
    bindings += [f'{k.upper()} = {v}' for k, v in SMALL.items()] + ['HEAD_DIM = 16']
    bindings += ['run.Run.batch_size = 2', "streams.Stream.lengths = {'targets': 64}"]
  run, program, batch = our_program('experiments/speed/llama1b.gin', bindings)
  import jax
  import numpy as np

  from research.model import counts
  from research.model.kernels import flash

  if variant == 'isoflop-unfused':
    flash.suits = lambda *_, **__: False
  began = time.monotonic()
  state = jax.jit(program.init)(jax.random.key(0))
  step = jax.jit(program.step, donate_argnums=0)
  rate = np.float32(1e-5)

  def advance():
    nonlocal state
    state, scalars = step(state, batch, rate)
    return scalars['loss']

  loss = float(advance())
  first = time.monotonic() - began
  seconds = seconds_a_step(advance, jax.block_until_ready, flags.steps)
  tokens = batch['decoder_target_tokens'].size
  return {
    'ms': 1e3 * seconds, 'tokens': tokens, 'first_step_s': first, 'loss': loss,
    'params': sum(p.size for p in jax.tree.leaves(state['params'])),
    'flops': tokens * counts.count(run.model, run.train.lengths).flops_attention_full,
    'gib': (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use', 0) / 2**30,
    'device': jax.devices()[0].device_kind, 'version': f'jax {jax.__version__}',
  }  # fmt: skip


def torch_step(flags) -> dict:
  import torch
  import torch_llama

  device = 'cpu' if flags.small else 'cuda'
  shape = SMALL if flags.small else SHAPE
  batch = (2, 64) if flags.small else (8, 2048)
  inputs, targets = (
    torch.from_numpy(x).long().to(device) for x in tokens_of(batch, shape['vocab'])
  )
  began = time.monotonic()
  step, params = torch_llama.step_function(shape, device)
  loss = float(step(inputs, targets))
  first = time.monotonic() - began
  seconds = seconds_a_step(lambda: step(inputs, targets), float, flags.steps)
  used = 0 if flags.small else torch.cuda.max_memory_allocated() / 2**30
  name = 'cpu' if flags.small else torch.cuda.get_device_name()
  return {
    'ms': 1e3 * seconds, 'tokens': targets.numel(), 'first_step_s': first, 'loss': loss, 'params': params,
    'gib': used, 'device': name, 'version': f'torch {torch.__version__}',
  }  # fmt: skip


def attention(flags) -> dict:
  """cuDNN's attention as we call it against the plain one (gpu_attention.py, which also tells times)."""
  sys.path.insert(0, str(ROOT))
  import gpu_attention

  rows = gpu_attention.compare(flags.small)
  errors = {name: row.get('error', float('nan')) for name, row in rows.items()}
  return {'errors': errors, 'ms': 0.0}


def population(variant: str, flags) -> dict:
  """W2's runs at 64 learning rates: milliseconds that one step of all of them takes."""
  members = 4 if flags.small else MEMBERS
  _, program, batch = our_program('experiments/speed/w2.gin', [], axis='member')
  import jax
  import jax.numpy as jnp

  from research.training.over_members import over_members

  rates = jnp.geomspace(1e-4, 1e-2, members)
  if variant == 'alone':
    state = jax.jit(program.init)(jax.random.key(0))
    step = jax.jit(program.step, donate_argnums=0)
    arguments = (batch, rates[0])
  else:
    state = jax.jit(jax.vmap(program.init))(jax.random.split(jax.random.key(0), members))
    update = over_members(
      lambda own, shared: program.step(own['state'], shared['batch'], own['rate'])
    )

    def all_of_them(state, rates, active, batch):
      return update({'state': state, 'rate': rates, 'active': active}, {'batch': batch})

    step = jax.jit(all_of_them, donate_argnums=0)
    by_member = jax.NamedSharding(jax.sharding.get_mesh(), jax.P('member'))
    state, rates, active = jax.device_put((state, rates, jnp.ones(members, bool)), by_member)
    arguments = (rates, active, batch)

  def advance():
    nonlocal state
    state, scalars = step(state, *arguments)
    return scalars['loss']

  seconds = seconds_a_step(advance, jax.block_until_ready, flags.steps)
  return {'ms': 1e3 * seconds * (members if variant == 'alone' else 1), 'members': members}


def measure(part: str, variant: str, flags) -> dict:
  if part == 'attention':
    return attention(flags)
  if part == 'population':
    return population(variant, flags)
  return torch_step(flags) if variant.startswith('torch') else our_step(variant, flags)


def in_process(part: str, variant: str, flags) -> dict:
  """`measure` in a fresh process; `{'error': ...}` where it fails, and the others go on."""
  command = [
    sys.executable,
    __file__,
    '--part',
    part,
    '--measure',
    variant,
    '--steps',
    str(flags.steps),
  ]
  command += ['--small'] if flags.small else []
  command += [f'--gin.{binding}' for binding in flags.gin]
  environment = {**os.environ, 'XLA_PYTHON_CLIENT_MEM_FRACTION': '.95'}
  done = subprocess.run(
    command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
  )
  if done.returncode:
    lines = [
      line for line in done.stderr.splitlines() if re.match(r'\w*(\.\w+)*(Error|Exception)\b', line)
    ]
    return {'error': (lines or [done.stderr[-300:]])[-1][:300]}
  return json.loads(done.stdout.splitlines()[-1])


def told(part: str, results: dict[str, list[dict]]) -> str:
  """The table of a part: medians over the repeats."""
  lines = []
  flops = next((row['flops'] for rows in results.values() for row in rows if 'flops' in row), None)
  for variant, rows in results.items():
    failed = [row['error'] for row in rows if 'error' in row]
    if failed:
      lines.append(f'{variant:16} failed: {failed[0]}')
      continue
    ms = statistics.median(row['ms'] for row in rows)
    row = rows[0]
    if part == 'attention':
      errors = ', '.join(f'{name} {value:.4f}' for name, value in row['errors'].items())
      lines.append(f'{variant:16} largest error: {errors}')
    elif part == 'population':
      rate = 1e3 * row['members'] / ms
      lines.append(
        f'{variant:16} {ms:9.2f} ms a step of {row["members"]} members, {rate:10,.0f} steps/s'
      )
    else:
      mfu = flops / ms * 1e3 / PEAK if flops else float('nan')
      lines.append(
        f'{variant:16} {ms:9.1f} ms {row["tokens"] / ms * 1e3:9,.0f} tokens/s  MFU {mfu:6.1%}'
        f'  {row["gib"]:5.1f} GiB'
        f'  first step {row["first_step_s"]:5.1f} s  {row["params"]:,} parameters  loss {row["loss"]:.3f}'
        f'  {row["device"]}, {row["version"]}'
      )
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--part', action='append', choices=PARTS, help='default: all')
  parser.add_argument('--variant', action='append', help='of one part; default: all')
  parser.add_argument('--repeats', type=int, default=3, help='processes of each')
  parser.add_argument('--steps', type=int, default=20, help='timed, after 4')
  parser.add_argument(
    '--small', action='store_true', help='tiny shapes on a CPU, to try the script'
  )
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  flags = parser.parse_args([a for a in sys.argv[1:] if not a.startswith('--gin.')])
  flags.gin = [a.removeprefix('--gin.') for a in sys.argv[1:] if a.startswith('--gin.')]
  if flags.measure:
    print(json.dumps(measure(flags.part[0], flags.measure, flags)))
    return
  for part in flags.part or PARTS:
    results = {v: [] for v in VARIANTS[part] if v in (flags.variant or VARIANTS[part])}
    for _ in range(1 if part == 'attention' else flags.repeats):
      for variant, rows in results.items():
        rows.append(in_process(part, variant, flags))
        print(part, variant, rows[-1], file=sys.stderr, flush=True)
    print(f'{part}:\n{told(part, results)}', flush=True)


if __name__ == '__main__':
  main()
