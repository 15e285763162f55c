"""Seconds from the command to a run's first step on a frozen stream: never compiled, and compiled before.

    python experiments/speed/first_step.py [--gin_file=experiments/speed/w2.gin] [--repeats 3]

Every measurement is `python -m research.train` as a user starts it, in a workdir of its own, stopped
when the row of its first step is there.
"""

import argparse
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def measure(gin_file: str, cache: pathlib.Path) -> float:
  """Seconds until metrics.jsonl has the row of step 1."""
  with tempfile.TemporaryDirectory() as workdir:
    command = [sys.executable, '-m', 'research.train', f'--gin_file={gin_file}']
    command += [f'--workdir={workdir}', '--gin.Run.log_every=1']
    rows = pathlib.Path(workdir, 'metrics.jsonl')
    start = time.monotonic()
    environment = os.environ | {'ISOFLOP_CACHE': str(cache)}
    with subprocess.Popen(
      command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as run:
      while not (rows.exists() and '"step": 1' in rows.read_text()):
        if run.poll() is not None:
          sys.exit(f'{" ".join(command)} failed:\n{run.stderr.read()}')
        time.sleep(0.02)
      seconds = time.monotonic() - start
      run.kill()
  return seconds


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--gin_file', default='experiments/speed/w2.gin')
  parser.add_argument('--repeats', type=int, default=3)
  flags = parser.parse_args()
  sys.path.insert(0, str(ROOT))
  from research.data.cache import default_cache

  with tempfile.TemporaryDirectory() as folder:
    cache = pathlib.Path(folder)
    # Frozen data are shared with the user's cache; compiled programs are not.
    for name in ('streams', 'corpora', 'vocabularies'):
      (default_cache() / name).mkdir(parents=True, exist_ok=True)
      (cache / name).symlink_to(default_cache() / name)
    measure(flags.gin_file, cache)  # freezes the stream where it is not there
    cold = []
    warm = []
    for _ in range(flags.repeats):
      shutil.rmtree(cache / 'xla', ignore_errors=True)
      cold.append(measure(flags.gin_file, cache))
      warm.append(measure(flags.gin_file, cache))
  for name, seconds in (('never compiled', cold), ('compiled before', warm)):
    print(f'{name}: {statistics.median(seconds):.1f} s to the first step (best {min(seconds):.1f})')


if __name__ == '__main__':
  main()
