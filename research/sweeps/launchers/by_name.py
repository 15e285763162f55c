"""The launcher that --launcher names: one of this project, or any class that Python can import."""

import dataclasses
import importlib

from research.core.errors import UserError, did_you_mean
from research.sweeps.launchers.cloud import Gcloud, SkyPilot, Xpk
from research.sweeps.launchers.gke import Gke
from research.sweeps.launchers.job import Launcher
from research.sweeps.launchers.local import Local
from research.sweeps.launchers.ray import Ray
from research.sweeps.launchers.slurm import Slurm

NAMED = {
  'local': Local,
  'slurm': Slurm,
  'ray': Ray,
  'gcloud': Gcloud,
  'gke': Gke,
  'xpk': Xpk,
  'skypilot': SkyPilot,
}


def chosen(flags, of_sweep: Launcher) -> Launcher:
  """The launcher of --launcher, or else of the sweep, with the cluster of --address.

  Raises:
    UserError: there is no such launcher, it is none, or it takes no address.
  """
  launcher = named(flags.launcher) if flags.launcher else of_sweep
  return with_address(launcher, flags.address) if flags.address else launcher


def named(name: str) -> Launcher:
  """The launcher of that name, with its defaults.

  Args:
    name: a key of `NAMED`, or `module.Class` of a launcher that lives anywhere Python can import.

  Raises:
    UserError: there is no such launcher, or it is none.
  """
  if name in NAMED:
    return NAMED[name]()
  if '.' not in name:
    raise UserError(
      f'--launcher={name}: no such launcher.{did_you_mean(name, NAMED)} '
      'For one of your own write module.Class.'
    )
  module_name, _, class_name = name.rpartition('.')
  try:
    module = importlib.import_module(module_name)
  except ModuleNotFoundError as error:
    # Only if it is this module, or a package around it, that is missing: not something that it imports.
    if not f'{module_name}.'.startswith(f'{error.name}.'):
      raise
    raise UserError(
      f'--launcher={name}: Python finds no module {error.name!r}; add its folder to PYTHONPATH.'
    ) from None
  public = [member for member in vars(module) if not member.startswith('_')]
  if class_name not in public:
    raise UserError(
      f'--launcher={name}: {module_name} has no {class_name}.{did_you_mean(class_name, public)}'
    )
  try:
    launcher = getattr(module, class_name)()
  except TypeError as error:
    raise UserError(
      f'--launcher={name}: {error}. Bind it in a gin file instead: sweep.Sweep.launcher = @...()'
    ) from None
  if not callable(getattr(launcher, 'run', None)):
    raise UserError(
      f'--launcher={name}: {class_name} has no method run(job), so it is no launcher.'
    )
  return launcher


def with_address(launcher: Launcher, address: str) -> Launcher:
  """The launcher with the cluster of --address.

  Raises:
    UserError: it takes no address.
  """
  fields = getattr(launcher, '__dataclass_fields__', {})
  if 'address' not in fields:
    raise UserError(
      f'--address={address}: {type(launcher).__name__} has no address; give --launcher=ray with it.'
    )
  return dataclasses.replace(launcher, address=address)
