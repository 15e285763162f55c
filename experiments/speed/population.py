"""Eight learning rates of W2: as eight runs one by one, each on every core, and as one population on them.

    python experiments/speed/population.py [--steps 25] [--repeats 3]

Everything counts: processes, imports, compilation, training, evaluation, checkpoints. Each variant starts with
no compiled program on disk (the runs one by one find those of the runs before them) and has the same cores; the
variants take turns. Wall time is what a person waits, processor time what a busy machine cannot spoil.
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
RATES = [1e-4 * 2**i for i in range(8)]
TOGETHER = """
import json, pathlib, sys
from research.core import configs
from research.training import population
population.share_cores(8)
bindings, rates = map(json.loads, sys.argv[2:4])
made = [configs.load(sys.argv[1], [*bindings, f'LEARNING_RATE={rate}']) for rate in rates]
folders = [pathlib.Path(sys.argv[4]) / str(rate) for rate in rates]
population.train_population([c.build() for c in made], folders, [c.text for c in made])
"""


def started(command: list[str], environment: dict) -> None:
  """A process, which must end well."""
  done = subprocess.run(
    [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  if done.returncode:
    sys.exit(f'{command} failed:\n{done.stderr}')


def alone(bindings: list[str], workdir: pathlib.Path, environment: dict) -> None:
  for rate in RATES:
    flags = [f'--gin.{b}' for b in [*bindings, f'LEARNING_RATE={rate}']]
    file = '--gin_file=experiments/speed/w2.gin'
    command = ['-m', 'research.train', file, f'--workdir={workdir / str(rate)}', *flags]
    started(command, environment)


def together(bindings: list[str], workdir: pathlib.Path, environment: dict) -> None:
  file = 'experiments/speed/w2.gin'
  arguments = [file, json.dumps(bindings), json.dumps(RATES), str(workdir)]
  started(['-c', TOGETHER, *arguments], environment)


def measure(variant, bindings: list[str], cache: pathlib.Path) -> dict:
  environment = {
    **os.environ,
    'ISOFLOP_CACHE': str(cache),
    'PYTHONPATH': str(ROOT),
    'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1',
  }
  shutil.rmtree(cache / 'xla', ignore_errors=True)
  used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
  with tempfile.TemporaryDirectory() as workdir:
    began, before = time.monotonic(), used()
    variant(bindings, pathlib.Path(workdir), environment)
    took = {'wall': time.monotonic() - began, 'processor': used() - before}
    row = lambda rate: json.loads((pathlib.Path(workdir) / str(rate) / 'run.json').read_text())
    losses = [row(rate)['loss'] for rate in RATES]
  return {**took, 'losses': losses}


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
      started([*freeze, f'--workdir={workdir}/0', *(f'--gin.{b}' for b in once)], environment)
    results = {'alone': [], 'together': []}
    for _ in range(flags.repeats):
      for name, variant in (('alone', alone), ('together', together)):
        results[name].append(measure(variant, bindings, cache))
        print(name, json.dumps(results[name][-1]), flush=True)
  median = lambda name, key: statistics.median(r[key] for r in results[name])
  for name, runs in results.items():
    wall, processor = median(name, 'wall'), median(name, 'processor')
    print(
      f'{name:9} wall {wall:6.1f} s, processor {processor:6.1f} s (medians of {len(runs)}, {flags.steps} steps)'
    )
  for key in ('wall', 'processor'):
    print(f'{key}: {median("alone", key) / median("together", key):.2f}x less together')
  pairs = zip(results['alone'][0]['losses'], results['together'][0]['losses'], strict=True)
  print(f'largest relative difference of a loss: {max(abs(a / b - 1) for a, b in pairs):.1e}')


if __name__ == '__main__':
  main()
