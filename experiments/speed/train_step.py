"""The train step against PyTorch's on a CPU: medians of steps, side by side.

    python experiments/speed/train_step.py [--workload W2] [--repeats 3]
    python experiments/speed/train_step.py --before=CHECKOUT    # ours now and in another version
    python experiments/speed/train_step.py --operations         # where ours spends its time

Every variant is a process of its own. They take single steps in turns, so that a busy machine slows all alike.
A step is the whole update: loss, gradients, clipping to norm 1, AdamW. Ours is the step of `research.train`.
PyTorch's needs torch and, for W3, transformers (docs/contributing.md).
"""

import argparse
import contextlib
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

PAUSE = 0.2  # seconds before a step: the threads of the others have stopped to spin
VARIANTS = ('isoflop', 'torch', 'torch-compiled')
BEFORE = 'isoflop-before'  # the step of another checkout, measured by its own copy of this script
WORKLOADS = {  # sequences in a batch, input length of an encoder (0: a decoder), target length, vocabulary
  'W1': (8, 0, 512, 32000),
  'W2': (32, 0, 128, 512),
  'W3': (8, 512, 114, 32128),
}


def synthetic(workload: str) -> tuple:
  """(inputs, targets), int32: uniform tokens but 0, which is padding, and 1, the end of a text."""
  import numpy as np

  batch, encoder, length, vocab = WORKLOADS[workload]
  random = np.random.default_rng(0)

  def draw(n: int):
    return random.integers(2, vocab, (batch, n), np.int32)

  if encoder:
    return draw(encoder), draw(length)
  tokens = draw(length + 1)
  return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def our_step(workload: str, bindings: list[str], packed: bool, mesh: contextlib.ExitStack):
  """(step, number of parameters, FLOPs per target token); the step works until `mesh` is closed."""
  import jax
  import numpy as np

  from research.core import configs
  from research.model import counts
  from research.parallel import dispatch, hosts
  from research.training import background_jit
  from research.training.program import make_program, mesh_of

  dispatch.run_one_program_at_once()
  run = configs.load(f'experiments/speed/{workload.lower()}.gin', bindings).build()
  inputs, targets = synthetic(workload)
  batch = {'decoder_target_tokens': targets, 'decoder_loss_weights': np.ones_like(targets)}
  if WORKLOADS[workload][1]:
    batch['encoder_input_tokens'] = inputs
    batch['decoder_input_tokens'] = np.pad(targets, ((0, 0), (1, 0)))[:, :-1]
  else:
    batch['decoder_input_tokens'] = inputs
  if packed:  # two documents in every row, as packing makes them
    half = targets.shape[1] // 2
    positions = np.broadcast_to(np.arange(targets.shape[1], dtype=np.int32), targets.shape)
    batch['decoder_segment_ids'] = positions // half + 1
    batch['decoder_positions'] = positions % half
  mesh.enter_context(mesh_of(run, jax.devices()).use())
  program = make_program(run)
  state = jax.jit(program.init)(jax.random.key(0))
  batch = hosts.place(batch)
  rate = np.float32(1e-5)
  step = background_jit.jit(program.step, state, batch, rate, donate_argnums=0)
  size = sum(p.size for p in jax.tree.leaves(state['params']))

  def advance():
    nonlocal state
    state, scalars = step(state, batch, rate)
    return jax.block_until_ready(scalars)['loss']

  flops = counts.count(run.model, run.train.lengths).flops_attention_full
  return advance, size, flops


def torch_step(workload: str, compiled: bool):
  """(step, number of parameters)."""
  import torch_models

  inputs, targets = (x.astype('int64') for x in synthetic(workload))
  step, size = torch_models.step_function(workload, compiled)
  return lambda: step(inputs, targets).detach(), size


def measure(variant: str, workload: str, bindings: list[str], packed: bool) -> None:
  """Takes a step for every line that it reads, and prints its wall and processor milliseconds.

  The first line that it prints says what the step is: start-up seconds, first loss, parameters, FLOPs.
  """
  start = time.monotonic()
  flops = None
  with contextlib.ExitStack() as mesh:
    if variant == 'isoflop':
      step, size, flops = our_step(workload, bindings, packed, mesh)
    else:
      step, size = torch_step(workload, compiled=variant == 'torch-compiled')
    loss = float(step())
    first = time.monotonic() - start
    for _ in range(4):
      step()
    about = {'first_step_s': first, 'loss': loss, 'params': size, 'flops': flops}
    print(json.dumps(about), flush=True)
    for _ in sys.stdin:
      start = time.perf_counter()
      used = processor_seconds()
      step()
      wall = time.perf_counter() - start
      print(json.dumps([1e3 * wall, 1e3 * (processor_seconds() - used)]), flush=True)


def print_operations(workload: str, flags: argparse.Namespace, folder: str) -> None:
  """Prints which operations our step spends its time on, and which take longer than their arrays.

  Args:
    workload: a name in WORKLOADS.
    flags: of the command.
    folder: where XLA writes programs (`operations.dump`).
  """
  import operations

  with contextlib.ExitStack() as mesh:
    step, _, _ = our_step(workload, flags.gin, flags.packed, mesh)
    step()
    step()
    traced = operations.traced(step)
    print(f'{workload}, a step:\n{operations.table(traced)}\n', flush=True)
    print(operations.slow(traced, folder), flush=True)


def processor_seconds() -> float:
  """Seconds of user and system time of this process."""
  return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])


def cpu_environment(root: pathlib.Path) -> dict[str, str]:
  """Returns the variables that the commands of the version at `root` set. PyTorch has its huge pages, too."""
  program = 'import json; from research.core import cli; print(json.dumps(cli.CPU_ENVIRONMENT))'
  command = [sys.executable, '-c', program]
  return json.loads(subprocess.run(command, cwd=root, capture_output=True, check=True).stdout)


class Measured:
  """A process that takes steps of a variant when it is asked to, and otherwise waits."""

  def __init__(self, variant: str, workload: str, flags: argparse.Namespace):
    script = pathlib.Path(__file__).resolve()
    if variant == BEFORE:
      variant = 'isoflop'
      script = flags.before.resolve() / script.relative_to(ROOT)
    command = [sys.executable, str(script), '--workload', workload]
    command += ['--measure', variant, *(f'--gin.{b}' for b in flags.gin)]
    command += ['--packed'] if flags.packed else []
    if flags.cores:
      command = ['taskset', '-c', flags.cores, *command]
    # In the root of its version: gin files are looked up from there first.
    root = script.parents[2]
    environment = {'JAX_PLATFORMS': 'cpu'} | os.environ | cpu_environment(root)
    self.process = subprocess.Popen(
      command, env=environment, cwd=root, text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    self.about = self.read()
    self.steps = []

  def read(self):
    line = self.process.stdout.readline()
    if not line:
      sys.exit(f'{" ".join(self.process.args)} failed')
    return json.loads(line)

  def step(self) -> None:
    time.sleep(PAUSE)
    self.process.stdin.write('step\n')
    self.process.stdin.flush()
    self.steps.append(self.read())

  def end(self) -> dict:
    """Ends the process; returns the medians of its steps."""
    self.process.stdin.close()
    self.process.wait()
    walls, processor = zip(*self.steps, strict=True)
    medians = {'ms': statistics.median(walls), 'cpu_ms': statistics.median(processor)}
    return {**self.about, **medians, 'best_ms': min(walls)}


def in_turns(variants: list[str], workload: str, flags: argparse.Namespace) -> dict[str, dict]:
  """A process of every variant; they take their steps in turns, so that a slow minute slows all alike."""
  processes = {variant: Measured(variant, workload, flags) for variant in variants}
  for i in range(flags.steps):
    # In alternating order, so that no variant always follows the same one.
    for variant in variants if i % 2 == 0 else variants[::-1]:
      processes[variant].step()
  return {variant: process.end() for variant, process in processes.items()}


def table(workload: str, results: dict[str, list[dict]]) -> str:
  """Medians over the repeats; a ratio above 1 means that ours is faster than the variant of that line."""
  sizes = {variant: rows[0]['params'] for variant, rows in results.items()}
  if len(set(sizes.values())) > 1:
    sys.exit(f'{workload}: these are not the same model, they have {sizes} parameters')
  if BEFORE in results and results[BEFORE][0]['loss'] != results['isoflop'][0]['loss']:
    sys.exit(f'{workload}: the first losses differ, so the two versions do not compute the same')
  batch, _, length, _ = WORKLOADS[workload]
  tokens = batch * length

  def median(variant: str, key: str) -> float:
    return statistics.median(row[key] for row in results[variant])

  flops = results['isoflop'][0]['flops'] * tokens
  lines = [
    f'{workload}: {tokens:,} target tokens and {flops / 1e9:.1f} GFLOP a step, '
    f'{results["isoflop"][0]["params"]:,} parameters',
    f'{"":15} {"ms/step":>8} {"best":>8} {"CPU ms":>8} {"tokens/s":>9} {"GFLOP/s":>8} '
    f'{"first step":>10} {"wall ratio":>10} {"CPU ratio":>9}  loss',
  ]
  for variant, rows in results.items():
    ms, cpu = median(variant, 'ms'), median(variant, 'cpu_ms')
    lines.append(
      f'{variant:15} {ms:8.1f} {median(variant, "best_ms"):8.1f} {cpu:8.1f} {tokens / ms * 1e3:9,.0f} '
      f'{flops / ms / 1e6:8.1f} {median(variant, "first_step_s"):8.1f} s '
      f'{ms / median("isoflop", "ms"):10.2f} {cpu / median("isoflop", "cpu_ms"):9.2f}  {rows[0]["loss"]:.3f}'
    )
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--workload', action='append', choices=WORKLOADS, help='default: all')
  parser.add_argument(
    '--variant',
    action='append',
    choices=VARIANTS,
    help='beside ours; default: all; with --before: none',
  )
  parser.add_argument('--before', type=pathlib.Path, help='a checkout of another version')
  parser.add_argument('--repeats', type=int, default=3, help='processes of each')
  parser.add_argument('--steps', type=int, default=20, help='timed, after 5')
  parser.add_argument('--cores', help="taskset's list, such as 0: everything on one core")
  parser.add_argument('--packed', action='store_true', help='ours with two documents in a row')
  parser.add_argument(
    '--operations', action='store_true', help="XLA's operations by the time they take"
  )
  parser.add_argument('--measure', choices=VARIANTS, help=argparse.SUPPRESS)
  arguments = [a for a in sys.argv[1:] if not a.startswith('--gin.')]
  flags = parser.parse_args(arguments)
  flags.gin = [a.removeprefix('--gin.') for a in sys.argv[1:] if a.startswith('--gin.')]
  if flags.measure:
    measure(flags.measure, flags.workload[0], flags.gin, flags.packed)
    return
  if flags.operations:
    if flags.before or flags.cores or flags.variant:
      parser.error(
        '--operations shows our step here alone: leave out --before, --cores and --variant.'
      )
    import operations

    with tempfile.TemporaryDirectory() as folder:
      operations.dump(folder, 'jit_step')
      for workload in flags.workload or WORKLOADS:
        print_operations(workload, flags, folder)
    return
  chosen = flags.variant or ([] if flags.before else VARIANTS)
  # The ratios of the table are to ours.
  variants = ['isoflop', *(variant for variant in chosen if variant != 'isoflop')]
  variants += [BEFORE] if flags.before else []
  for workload in flags.workload or WORKLOADS:
    results = {variant: [] for variant in variants}
    for _ in range(flags.repeats):
      for variant, result in in_turns(variants, workload, flags).items():
        results[variant].append(result)
    print(table(workload, results), flush=True)


if __name__ == '__main__':
  main()
