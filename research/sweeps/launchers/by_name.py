"""FIXME: say what this module is."""

from research.core.errors import UserError, did_you_mean
from research.sweeps.launchers.cloud import Gcloud, SkyPilot, Xpk
from research.sweeps.launchers.job import Launcher
from research.sweeps.launchers.local import Local
from research.sweeps.launchers.slurm import Slurm

NAMED = {'local': Local, 'slurm': Slurm, 'gcloud': Gcloud, 'xpk': Xpk, 'skypilot': SkyPilot}


def named(name: str) -> Launcher:
  """The launcher of that name with its defaults."""
  if name not in NAMED:
    raise UserError(f'--launcher={name}: no such launcher.{did_you_mean(name, NAMED)}')
  return NAMED[name]()
