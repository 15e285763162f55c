"""FIXME: say what this module is."""

import dataclasses
import json
import pathlib

from research.checkpoints.folders import saved_steps
from research.core import storage
from research.core.errors import UserError
from research.designs.plan import Planned, Size


class Folder:
  """The state of a sweep: its run directories. Any number of workers, started anyhow, may share it."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    self._rows: dict[str, dict] = {}  # of runs that are over: rows do not change

  def run(self, planned: Planned) -> pathlib.Path:
    return self.path / 'runs' / planned.name

  def row(self, planned: Planned) -> dict | None:
    """The finished (or failed) run's row with what the sweep knows of it; None while there is none."""
    if planned.name not in self._rows:
      try:
        row = json.loads((self.run(planned) / 'run.json').read_text())
      except FileNotFoundError:
        return None
      facts = {'run': planned.name, 'role': planned.role, 'budget': planned.budget}
      self._rows[planned.name] = {**facts, **row}
    return self._rows[planned.name]

  def fail(self, planned: Planned, reason: str) -> None:
    """The run is over, with no result."""
    self.run(planned).mkdir(parents=True, exist_ok=True)
    row = json.dumps({'status': 'failed', 'reason': reason})
    storage.write_atomic(self.run(planned) / 'run.json', row)

  def step(self, planned: Planned) -> int:
    """How far a run is by its checkpoints."""
    return max(saved_steps(self.run(planned) / 'checkpoints'), default=0)

  def plan(self) -> list[Planned]:
    """The runs that this sweep was started with, the forecast's among them once it is registered."""
    path = self.path / 'plan.json'
    if not path.exists():
      return []
    runs = json.loads(path.read_text())
    parse = lambda run: {
      'size': Size(**run['size']),
      'settings': tuple(run.get('settings', ())),
    }
    return [Planned(**run | parse(run)) for run in runs]

  def register(self, runs: list[Planned]) -> None:
    """Adds runs to the plan.

    Raises:
      UserError: a run of that name is there with other settings.
    """
    old = {run.name: run for run in self.plan()}
    for run in runs:
      there = old.setdefault(run.name, run)
      if run != dataclasses.replace(there, budget=run.budget):  # a label, and no setting
        raise UserError(
          f'{self.path} holds a sweep in which {run.name} is another run; choose another --workdir.'
        )
    plan = json.dumps([dataclasses.asdict(run) for run in old.values()], indent=1)
    storage.write_atomic(self.path / 'plan.json', plan)

  def rows(self, runs: list[Planned]) -> list[dict]:
    return [row for row in map(self.row, runs) if row]

  def curve(self, planned: Planned) -> list[dict]:
    return storage.read_rows(self.run(planned) / 'metrics.jsonl')
