"""The public sweeps of the league, as (source, sweep) -> Observations. The repository holds none of them."""

import collections
import pathlib

import numpy as np

from research.scaling import rows as table
from research.scaling import tables

ROOT = pathlib.Path(__file__).resolve().parents[2]
OWN = ('quickstart', 'isoflop_decoder', 'isoflop_encoder_decoder', 'kaplan')


def load(folder: pathlib.Path) -> dict[tuple[str, str], table.Observations]:
  """Every sweep whose file is in the folder of public data, and this project's own."""
  sweeps = {}
  for source in (_porian, _chinchilla, _kyo, _misfitting, _olmo, _clark, _gadre):
    sweeps |= {(source.__name__[1:], name): seen for name, seen in source(folder).items()}
  sweeps |= {('own', name): seen for name, seen in _own().items()}
  return {key: seen for key, seen in sweeps.items() if len(seen) >= 12}


def _rows(path: pathlib.Path) -> list[dict]:
  return tables.read_table(path) if path.is_file() else []


def _grouped(rows: list[dict], names: tuple[str, ...]) -> dict[str, list[dict]]:
  groups = collections.defaultdict(list)
  for row in rows:
    groups[' '.join(str(row[name]) for name in names)].append(row)
  return groups


def _porian(folder):
  """Porian et al. 2024, fifteen isoFLOP sweeps."""
  groups = _grouped(
    _rows(folder / 'porian_isoflops.csv'), ('dataset', 'hparams', 'warmup', 'decay', 'count')
  )
  return {name: table.observe(rows) for name, rows in groups.items()}


def _chinchilla(folder):
  """Figure 4 of Hoffmann et al. 2022 as read off by Besiroglu et al. 2024, without the five highest losses."""
  rows = _rows(folder / 'chinchilla_fig4.csv')
  if not rows:
    return {}
  seen = table.observe(rows)
  return {'figure 4': seen.take(np.sort(np.argsort(seen.loss)[:-5]))}


def _kyo(folder):
  """The replication data of kyo-takano/chinchilla: the same figure, read off on its own."""
  rows = _rows(folder / 'kyo_chinchilla.csv')
  return {'figure 4': table.observe(rows)} if rows else {}


def _misfitting(folder):
  """Li et al. 2025, the misfitting study: the best learning rate of each N and D."""
  rows = _rows(folder / 'misfitting_best.csv')
  return {'best': table.observe(rows)} if rows else {}


def _olmo(folder):
  """The OLMo ladder (Bhagia et al. 2024), final checkpoints."""
  rows = _rows(folder / 'olmo_ladder_final.csv')
  return {'ladder': table.observe(rows)} if rows else {}


def _clark(folder):
  """The dense checkpoints of Clark et al. 2022."""
  rows = _rows(folder / 'clark_dense.csv')
  return {'dense': table.observe(rows)} if rows else {}


def _gadre(folder):
  """Gadre et al. 2024, one sweep for each training set, loss on OpenLM's validation set."""
  groups = _grouped(_rows(folder / 'gadre_runs.csv'), ('dataset_name',))
  columns = table.Columns(loss='loss_openlm')
  return {name: table.observe(rows, columns) for name, rows in groups.items()}


def _own():
  sweeps = {}
  for name in OWN:
    path = ROOT / 'experiments' / name / 'results.csv'
    if path.is_file():
      sweeps[name] = table.observe(tables.read_table(path))
  return sweeps
