"""Eight learning rates of W2: eight runs one after the other, each on every core, against one population.

    python experiments/speed/population.py [--steps 25] [--repeats 3]

Everything counts: processes, imports, compilation, training, evaluation, checkpoints. Each variant starts
without compiled programs on disk (of the eight runs, each finds those of the runs before it) and has the same
cores; the variants take turns. Wall time is what a person waits for; other load on the machine hardly changes
processor time.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from research.core import cli  # noqa: E402

RATES = [1e-4 * 2**i for i in range(8)]
TOGETHER = """
import json, pathlib, sys
from research.core import configs
from research.training import alike, population
alike.share_cores(8)
bindings, rates = map(json.loads, sys.argv[2:4])
configurations = [configs.load(sys.argv[1], [*bindings, f'LEARNING_RATE={rate}']) for rate in rates]
folders = [pathlib.Path(sys.argv[4]) / str(rate) for rate in rates]
runs = [each.build() for each in configurations]
population.train_population(runs, folders, [each.text for each in configurations])
"""


def run_python(command: list[str], environment: dict) -> None:
  """Runs Python to its end; a failure ends the benchmark."""
  process = subprocess.run(
    [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  if process.returncode:
    sys.exit(f'{command} failed:\n{process.stderr}')


def alone(bindings: list[str], workdir: pathlib.Path, environment: dict) -> None:
  for rate in RATES:
    flags = [f'--gin.{b}' for b in [*bindings, f'LEARNING_RATE={rate}']]
    file = '--gin_file=experiments/speed/w2.gin'
    command = ['-m', 'research.train', file, f'--workdir={workdir / str(rate)}', *flags]
    run_python(command, environment)


def together(bindings: list[str], workdir: pathlib.Path, environment: dict) -> None:
  file = 'experiments/speed/w2.gin'
  arguments = [file, json.dumps(bindings), json.dumps(RATES), str(workdir)]
  run_python(['-c', TOGETHER, *arguments], environment)


def measure(variant, bindings: list[str], cache: pathlib.Path) -> dict:
  """The wall and processor seconds of a variant, and its losses."""
  environment = os.environ | {'ISOFLOP_CACHE': str(cache), 'PYTHONPATH': str(ROOT)}
  environment |= cli.CPU_ENVIRONMENT
  shutil.rmtree(cache / 'xla', ignore_errors=True)
  with tempfile.TemporaryDirectory() as workdir:
    start = time.monotonic()
    used = processor_seconds()
    variant(bindings, pathlib.Path(workdir), environment)
    wall = time.monotonic() - start
    processor = processor_seconds() - used
    rows = [pathlib.Path(workdir) / str(rate) / 'run.json' for rate in RATES]
    losses = [json.loads(row.read_text())['loss'] for row in rows]
  return {'wall': wall, 'processor': processor, 'losses': losses}


def processor_seconds() -> float:
  """Seconds of user and system time of all child processes that have ended."""
  return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--steps', type=int, default=25)
  parser.add_argument('--repeats', type=int, default=3)
  parser.add_argument('--cache', help='a data cache; by default one that is made and thrown away')
  flags = parser.parse_args()
  bindings = [f'Run.steps={flags.steps}', 'Stream.examples=512', 'Stream.split="train"']
  with tempfile.TemporaryDirectory() as temporary:
    cache = pathlib.Path(flags.cache or temporary)
    environment = {**os.environ, 'ISOFLOP_CACHE': str(cache), 'PYTHONPATH': str(ROOT)}
    once = [*bindings, 'LEARNING_RATE=1e-4', 'Run.steps=1']
    freeze = ['-m', 'research.train', '--gin_file=experiments/speed/w2.gin']
    with tempfile.TemporaryDirectory() as workdir:  # freezes the text
      run_python([*freeze, f'--workdir={workdir}/0', *(f'--gin.{b}' for b in once)], environment)
    results = {'alone': [], 'together': []}
    for _ in range(flags.repeats):
      for name, variant in (('alone', alone), ('together', together)):
        results[name].append(measure(variant, bindings, cache))
        print(name, json.dumps(results[name][-1]), flush=True)
  medians = {
    name: {key: statistics.median(run[key] for run in runs) for key in ('wall', 'processor')}
    for name, runs in results.items()
  }
  for name, seconds in medians.items():
    print(
      f'{name:9} wall {seconds["wall"]:6.1f} s, processor {seconds["processor"]:6.1f} s '
      f'(medians of {flags.repeats}, {flags.steps} steps)'
    )
  for key in ('wall', 'processor'):
    print(f'{key}: {medians["alone"][key] / medians["together"][key]:.2f}x less together')
  pairs = zip(results['alone'][0]['losses'], results['together'][0]['losses'], strict=True)
  print(f'largest relative difference of a loss: {max(abs(a / b - 1) for a, b in pairs):.1e}')


if __name__ == '__main__':
  main()
