"""A sweep whose workers are killed, stopped, starved of disk, and whose checkpoints are spoilt, ends well."""

import collections
import contextlib
import json
import os
import pathlib
import random
import resource
import signal
import sys
import threading
import time

import pytest

from research.core import configs
from research.sweeps import control, folder
from research.sweeps.launchers import job
from research.sweeps.sweep import make_folder, make_plan, open_data

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SWEEP = """
from __gin__ import dynamic_registration
from research.sweeps import sweep
from research.designs import plan
from research.designs import grids
include 'tests/gin/workers.gin'
sweep.Sweep:
  design = @grids.KaplanGrid()
  retries = 1000
  lease = 8.0
  bindings = ("FILES='{files}'", 'Run.checkpoint_every=100')
grids.KaplanGrid:
  params = (8e3, 16e3)
  tokens = (2e5, 4e5, 6e5)
  ladder = @plan.Ladder()
  learning_rate = @learning_rate/plan.Rule()
  batch_size = @batch_size/plan.Rule()
plan.Ladder.widths = (8, 32, 8)
"""
KILLS = 30


def children() -> list[int]:
  """The workers that this process has started and that still run."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      name, _, rest = path.read_text().rpartition(')')
      command = (path.parent / 'cmdline').read_text()
    except OSError:
      continue
    if int(rest.split()[1]) == os.getpid() and rest.split()[0] != 'Z' and '--worker' in command:
      found.append(int(name.split()[0]))
  return found


class Sweeping(threading.Thread):
  """A sweep by local workers, as the command does it."""

  def __init__(self, file: pathlib.Path, workdir: pathlib.Path):
    super().__init__(daemon=True)
    self.sweep = configs.load(str(file), root='SWEEP').build()
    _, self.runs, base = make_plan(self.sweep)
    self.folder = folder.Folder(workdir)
    make_folder(self.folder, file.read_text())
    self.folder.register(self.runs)
    open_data(self.sweep, self.runs, base)
    arguments = (f'--gin_file={file}', f'--workdir={workdir}', '--worker')
    self.job = job.Job(
      arguments=arguments, workdir=workdir, todo=self.todo,
      hung=lambda: control.hung(self.sweep, self.runs, self.folder),
    )  # fmt: skip

  def todo(self) -> int:
    return sum(self.folder.row(run) is None for run in self.runs)

  def run(self):
    self.sweep.launcher.run(self.job)

  def rows(self) -> list[dict]:
    return [{k: v for k, v in row.items() if k != 'seconds'} for row in self.folder.rows(self.runs)]


def spoil_newest_checkpoint(sweeping: Sweeping, chance: random.Random) -> bool:
  """Flips a byte of the newest checkpoint of a run that is not over and has two."""
  for run in chance.sample(sweeping.runs, len(sweeping.runs)):
    saved = sorted(
      (p for p in (sweeping.folder.run(run) / 'checkpoints').glob('*') if p.name.isdigit()),
      key=lambda p: int(p.name),
    )
    if sweeping.folder.row(run) is None and len(saved) > 1:
      files = [p for p in (saved[-1] / 'state').rglob('*') if p.is_file()]
      path = max(files, key=lambda p: p.stat().st_size)
      data = bytearray(path.read_bytes())
      data[len(data) // 2] ^= 0x10
      path.write_bytes(bytes(data))
      return True
  return False


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='counts its children in /proc')
def test_every_row_once_and_as_if_nothing_had_happened(
  text_file, tmp_path, user_environment, monkeypatch
):
  for name in set(os.environ) - set(user_environment):
    monkeypatch.delenv(name)
  file = tmp_path / 'sweep.gin'
  file.write_text(SWEEP.format(files=text_file))
  quiet = Sweeping(file, tmp_path / 'quiet')
  quiet.run()
  chance, counts, rounds = random.Random(0), collections.Counter(), 0
  while counts['kill'] < KILLS or not (counts['stop'] and counts['starve'] and counts['spoil']):
    rounds += 1
    chaos = Sweeping(file, tmp_path / f'chaos{rounds}')
    torment(chaos, chance, counts)
    assert not chaos.is_alive()
    assert chaos.rows() == quiet.rows()
    assert len({row['run'] for row in chaos.rows()}) == len(chaos.runs)
    for run in chaos.runs:  # and every curve whole: no gap and no double
      curves = [
        [row['step'] for row in s.folder.curve(run) if 'loss' in row] for s in (quiet, chaos)
      ]
      assert curves[0] == curves[1]
  print(json.dumps({**counts, 'sweeps': rounds}))


def torment(chaos: Sweeping, chance: random.Random, counts: collections.Counter) -> None:
  """One sweep to its end, with everything done to its workers that is still to be done."""
  chaos.start()
  starved, unlimited = [], (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
  while counts['kill'] < KILLS and chaos.is_alive():
    time.sleep(chance.uniform(0.5, 6.0))
    kinds = {'kill': 10, 'stop': 2 * (counts['stop'] < 2), 'starve': 2, 'spoil': 4}
    (what,) = chance.choices(list(kinds), list(kinds.values()))
    alive = children()
    if not alive:
      continue
    pid = chance.choice(alive)
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
      if what in ('kill', 'stop'):  # a worker that stops costs the time of its lease
        os.kill(pid, signal.SIGKILL if what == 'kill' else signal.SIGSTOP)
      elif what == 'starve':  # no file may grow beyond this: to its writer a disk that is full
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        starved.append(pid)
      elif not spoil_newest_checkpoint(chaos, chance):
        continue
      counts[what] += 1
    for other in [p for p in starved if p != pid]:  # there is room again
      starved.remove(other)
      with contextlib.suppress(ProcessLookupError):
        resource.prlimit(other, resource.RLIMIT_FSIZE, unlimited)
  for pid in starved:
    with contextlib.suppress(ProcessLookupError):
      resource.prlimit(pid, resource.RLIMIT_FSIZE, unlimited)
  chaos.join(timeout=600)
