"""Over-optimisation: what the gold reward does while best-of-n and reinforcement follow a proxy of it.

    python experiments/overoptimisation/study.py --workdir=runs/overoptimisation --prepare
    python experiments/overoptimisation/study.py --workdir=runs/overoptimisation --workers=2

The first command only writes and freezes text. Both run from the repository's
root. Started again, the study does only what is missing. --quick is a tiny version.
"""

import argparse
import csv
import json
import os
import pathlib
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import files  # noqa: E402
import laws_of_proxies  # noqa: E402
import study_runs  # noqa: E402

GIN = 'experiments/overoptimisation'
FULL = {
  'widths': (8, 16, 32, 64), 'pairs': (1000, 4000, 16_000), 'middle': 4000, 'texts': 20_000,
  'base_steps': 500, 'proxy_steps': 1000, 'policy_steps': 120, 'every': 5,
  'prompts': 16, 'samples': 1024,
}  # fmt: skip
QUICK = {
  'widths': (4, 8, 16), 'pairs': (64,), 'middle': 64, 'texts': 2_000,
  'base_steps': 20, 'proxy_steps': 10, 'policy_steps': 4, 'every': 1,
  'prompts': 2, 'samples': 64,
}  # fmt: skip


class Study:
  """The parts of the study and where they lie.

  Args:
    workdir: a folder for all of it.
    plan: FULL or QUICK.
    workers: processes that run at once.
  """

  def __init__(self, workdir: pathlib.Path, plan: dict, workers: int):
    self.workdir = workdir
    self.data = workdir / 'data'
    self.plan = plan
    self.workers = workers
    self.start = time.time()

  def bindings(self, **values) -> list[str]:
    """Flags that set macros or fields; a dot of a field is written as two underscores."""
    return [f'--gin.{name.replace("__", ".")}={value!r}' for name, value in values.items()]

  def text(self) -> list[str]:
    return self.bindings(
      TEXT=str(self.data / 'text.jsonl'), TEXT_VALIDATION=str(self.data / 'text_validation.jsonl')
    )

  def pairs(self, count: int) -> list[str]:
    return self.bindings(
      PAIRS=str(self.data / f'pairs_{count}.jsonl'),
      PAIRS_VALIDATION=str(self.data / 'pairs_validation.jsonl'),
    )

  def proxy(self, width: int, pairs: int) -> pathlib.Path:
    return self.workdir / f'proxy-{width}-{pairs}'

  def train(self, gin: str, workdir: pathlib.Path, flags: list[str]) -> tuple[pathlib.Path, list]:
    """(the file that a finished run has, its command)."""
    command = ['-m', 'research.train', f'--gin_file={GIN}/{gin}.gin', f'--workdir={workdir}']
    return workdir / 'run.json', command + flags

  def base(self) -> tuple:
    steps = self.plan['base_steps']
    schedule = self.bindings(Run__steps=steps, Run__eval_every=steps, Run__checkpoint_every=steps)
    return self.train('base', self.workdir / 'base', self.text() + schedule)

  def train_proxy(self, width: int, pairs: int) -> tuple:
    steps = self.plan['proxy_steps']
    heads = max(1, width // 16)
    shape = self.bindings(EMBED=width, HEADS=heads, HEAD_DIM=width // heads, MLP=3 * width)
    schedule = self.bindings(
      Run__steps=steps, Run__eval_every=steps // 2, Run__checkpoint_every=steps
    )
    return self.train('proxy', self.proxy(width, pairs), self.pairs(pairs) + shape + schedule)

  def sample(self) -> tuple:
    command = [
      str(HERE / 'best_of.py'), 'sample', f'--base={self.workdir / "base"}',
      f'--prompts={self.data / "prompts.jsonl"}', f'--out={self.workdir / "samples.json"}',
      f'--count={self.plan["prompts"]}', f'--samples={self.plan["samples"]}',
    ]  # fmt: skip
    return self.workdir / 'samples.json', command

  def best_of(self, width: int, pairs: int) -> tuple:
    out = self.workdir / f'best_of-{width}-{pairs}.json'
    command = [
      str(HERE / 'best_of.py'), 'score', f'--proxy={self.proxy(width, pairs)}',
      f'--samples={self.workdir / "samples.json"}', f'--out={out}',
    ]  # fmt: skip
    return out, command

  def train_policy(self, width: int, pairs: int) -> tuple:
    steps, every = self.plan['policy_steps'], self.plan['every']
    places = self.bindings(
      BASE=str(self.workdir / 'base'), PROXY=str(self.proxy(width, pairs)),
      PROMPTS=str(self.data / 'prompts.jsonl'),
    )  # fmt: skip
    schedule = self.bindings(
      Run__steps=steps, Run__eval_every=every, Run__checkpoint_every=min(40, steps)
    )
    flags = self.text() + places + schedule
    return self.train('policy', self.workdir / f'policy-{width}-{pairs}', flags)

  def run(self, what: str, jobs: list[tuple]) -> None:
    """Runs the commands whose files are missing, `workers` at once.

    Raises:
      SystemExit: one failed; its log says why.
    """
    missing = [(done, command) for done, command in jobs if not done.is_file()]
    self.say(f'{what}: {len(missing)} of {len(jobs)} to run')
    with ThreadPoolExecutor(self.workers) as pool:
      failed = [log for log in pool.map(self.run_one, missing) if log]
    if failed:
      sys.exit(f'{what}: failed, see {", ".join(failed)}')

  def run_one(self, job: tuple) -> str | None:
    """The log of a command that failed, or None."""
    done, command = job
    name = done.parent.name if done.name == 'run.json' else done.stem
    log = self.workdir / 'logs' / f'{name}.txt'
    log.parent.mkdir(parents=True, exist_ok=True)
    paths = [str(HERE), str(pathlib.Path.cwd()), os.environ.get('PYTHONPATH', '')]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(filter(None, paths))}
    start = time.time()
    with log.open('w') as file:
      code = subprocess.call(
        [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=environment
      )
    self.say(f'  {name}: {time.time() - start:.0f} s' + (f', exit {code}' if code else ''))
    return str(log) if code or not done.is_file() else None

  def say(self, text: str) -> None:
    print(f'[{time.time() - self.start:5.0f} s] {text}', flush=True)

  def prepare(self) -> None:
    """Writes the text and freezes every stream."""
    files.write(self.data, self.plan['pairs'], self.plan['texts'])
    freeze = ['-m', 'research.freeze']
    jobs = [self.base(), *(self.train_proxy(self.plan['widths'][0], p) for p in self.plan['pairs'])]
    for _, command in jobs:
      flags = [flag for flag in command[2:] if not flag.startswith('--workdir')]
      subprocess.run([sys.executable, *freeze, *flags], check=True)

  def points(self) -> list[dict]:
    """All measured points that are there: gold and proxy reward above the start, against KL."""
    return laws_of_proxies.points(self.workdir, self.plan)

  def main(self) -> None:
    files.write(self.data, self.plan['pairs'], self.plan['texts'])
    *smaller, largest = self.plan['widths']
    middle = self.plan['middle']
    cells = [(width, pairs) for width in smaller for pairs in self.plan['pairs']]
    others = [pairs for pairs in self.plan['pairs'] if pairs != middle]
    all_cells = cells + [(largest, pairs) for pairs in self.plan['pairs']]
    self.run('base', [self.base()])
    self.run('proxies', [self.train_proxy(*cell) for cell in reversed(all_cells)])
    self.run('samples', [self.sample()])
    self.run('best of n, smaller proxies', [self.best_of(*cell) for cell in cells])
    self.run('policies, smaller proxies', [self.train_policy(w, middle) for w in smaller])
    self.register(largest)
    self.run('best of n, largest proxy', [self.best_of(largest, p) for p in self.plan['pairs']])
    self.run('policy, largest proxy', [self.train_policy(largest, middle)])
    self.finish(largest)
    if others:
      self.run('policies, other data', [self.train_policy(smaller[-1], p) for p in others])
      self.finish(largest)

  def register(self, largest: int) -> None:
    """Writes the forecast, once, before the runs that test it."""
    if (self.workdir / 'forecast.json').is_file():
      return
    middle = self.plan['middle']
    forecast = laws_of_proxies.forecast(self.points(), self.proxy(largest, middle), middle)
    study_runs.register(self.workdir, {'largest': largest, 'forecast': forecast})

  def finish(self, largest: int) -> None:
    """Writes results.csv, laws.csv, outcome.json and the figure to the workdir."""
    points = self.points()
    fits = laws_of_proxies.fits(points)
    for name, rows in (('results', points), ('laws', fits)):
      with (self.workdir / f'{name}.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)
    registered = json.loads((self.workdir / 'forecast.json').read_text())['forecast']
    outcome = laws_of_proxies.outcome(registered, points, largest, self.plan['middle'])
    study_runs.write_json(self.workdir / 'outcome.json', outcome)
    laws_of_proxies.draw(points, fits, self.plan, self.workdir / 'overoptimisation.png')
    for row in outcome:
      self.say(', '.join(f'{name} {value}' for name, value in row.items()))


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True, metavar='DIR')
  parser.add_argument('--workers', type=int, default=1, help='processes that run at once')
  parser.add_argument('--prepare', action='store_true', help='write and freeze the text, no more')
  parser.add_argument('--quick', action='store_true', help='a tiny version')
  flags = parser.parse_args()
  study = Study(flags.workdir, QUICK if flags.quick else FULL, flags.workers)
  if flags.prepare:
    study.prepare()
  else:
    study.main()


if __name__ == '__main__':
  main()
