"""The folder of a sweep: its plan, and a directory with the state of each run.

A sweep has no other state. So workers and readers share nothing but this folder, which may be in a bucket.
"""

import dataclasses
import json
import pathlib

from research.checkpoints.folders import saved_steps
from research.core import storage
from research.core.errors import UserError
from research.designs.plan import Planned, Size


class Folder:
  """The state of a sweep. Any number of workers on any hosts may share it."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._rows: dict[str, dict] = {}  # a cache: the row of a run that is over does not change

  def run(self, planned: Planned) -> pathlib.Path:
    """The directory of a run; it may not exist yet."""
    return self.path / 'runs' / planned.name

  def row(self, planned: Planned) -> dict | None:
    """The row of a run that finished or failed, with its role and budget; None while it is not over."""
    if planned.name not in self._rows:
      # One read and no test before it: in a bucket either is a request.
      try:
        row = json.loads((self.run(planned) / 'run.json').read_text())
      except FileNotFoundError:
        return None
      facts = {'run': planned.name, 'role': planned.role, 'budget': planned.budget}
      self._rows[planned.name] = {**facts, **row}
    return self._rows[planned.name]

  def fail(self, planned: Planned, reason: str) -> None:
    """Ends a run without a result; its row gives the `reason`."""
    self.run(planned).mkdir(parents=True, exist_ok=True)
    row = json.dumps({'status': 'failed', 'reason': reason})
    storage.write_atomic(self.run(planned) / 'run.json', row)

  def step(self, planned: Planned) -> int:
    """The step of a run's newest checkpoint; 0 without one."""
    return max(saved_steps(self.run(planned) / 'checkpoints'), default=0)

  def plan(self) -> list[Planned]:
    """The runs of this sweep, including those that test a registered forecast."""
    path = self.path / 'plan.json'
    if not path.exists():
      return []
    runs = []
    for run in json.loads(path.read_text()):
      size = Size(**run.pop('size'))
      settings = tuple(run.pop('settings', ()))
      runs.append(Planned(**run, size=size, settings=settings))
    return runs

  def register(self, runs: list[Planned]) -> None:
    """Adds runs to the plan.

    Raises:
      UserError: the plan has a run of the same name with other settings, or runs that cannot start from others
        in a bucket.
    """
    if storage.is_bucket(self.path) and any(run.method for run in runs):
      raise UserError(
        f'{self.path}: a run cannot start from a checkpoint in a bucket; choose a --workdir on a disk.'
      )
    old = {run.name: run for run in self.plan()}
    for run in runs:
      existing = old.setdefault(run.name, run)
      # A budget only labels a run: it changes nothing about its training.
      if run != dataclasses.replace(existing, budget=run.budget):
        raise UserError(
          f'{self.path} holds a sweep in which {run.name} is another run: choose another --workdir.'
        )
    plan = json.dumps([dataclasses.asdict(run) for run in old.values()], indent=1)
    storage.write_atomic(self.path / 'plan.json', plan)

  def rows(self, runs: list[Planned]) -> list[dict]:
    """The rows of those of `runs` that are over."""
    return [row for row in map(self.row, runs) if row]

  def curve(self, planned: Planned) -> list[dict]:
    """The rows of metrics of a run so far, in the order of its steps."""
    return storage.read_rows(self.run(planned) / 'metrics.jsonl')
