"""FIXME: say what this module is."""

import dataclasses
import sys

from research.core import configs, storage
from research.core.errors import Invalid, UserError
from research.core.text import si
from research.designs import plan
from research.designs.base import Design
from research.designs.isoflop import IsoFlop
from research.sweeps.folder import Folder
from research.sweeps.launchers import local
from research.sweeps.launchers.job import Launcher


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What a sweep is.

  Attributes:
    run: gin file of the run that every run of the sweep is a variation of; it must take the macros EMBED,
      LAYERS and LEARNING_RATE, and is given what it takes of HEADS, HEAD_DIM and MLP.
    design: which runs.
    forecast: the budget of the run that tests the law, as a multiple of the design's largest; None for none.
    forecast_seeds: that run is done from so many seeds, and their mean is the outcome: with as many workers it
      takes no longer.
    population: so many runs of one shape are trained at once (training/population.py); 1 for each alone.
    retries: a run that failed is tried so many times more; then it is reported as failed, with its reason.
    lease: seconds after which a worker that is not heard of has lost its run.
    patience: seconds without any progress (compiling is none) after which a worker counts as hung.
    launcher: what starts the workers.
    prior, noise: a law and the scatter of ln loss between seeds, on which --plan tries what the design would
      find; None for Chinchilla's, with its optimum at the middle of the design.
    fixed: parameters of the law that are known, such as {'E': 0.8} by earlier sweeps of the same data and
      vocabulary: the irreducible loss is what a small sweep can tell least.
    bindings: more gin bindings for every run, as on a command line.
    question: what the sweep asks, for its report.
  """

  run: str
  design: Design
  forecast: float | None = 3.0
  forecast_seeds: int = 1
  population: int = 8
  retries: int = 2
  lease: float = 60.0
  patience: float = 1800.0
  launcher: Launcher = dataclasses.field(default_factory=local.Local)
  prior: dict | None = None
  noise: float = 0.01
  fixed: dict | None = None
  bindings: tuple[str, ...] = ()
  question: str = 'What is the compute-optimal size of this model?'

  def __post_init__(self):
    if self.forecast is not None and not self.forecast > 1:
      raise Invalid(
        Sweep, 'forecast', f'{self.forecast!r} must be above 1: a multiple of the largest budget.'
      )
    if self.forecast is not None and not isinstance(self.design, IsoFlop):
      name = type(self.design).__name__
      raise Invalid(
        Sweep, 'forecast', f'only an IsoFlop design has a forecast run; set it to None for {name}.'
      )
    if self.fixed:
      from research.scaling import laws

      names = list(laws.Chinchilla.parameters)
      if unknown := sorted(set(self.fixed) - set(names)):
        why = f'Chinchilla has no {unknown[0]!r}; it has {", ".join(names)}.'
        raise Invalid(Sweep, 'fixed', why)
    for field, least in (
      ('forecast_seeds', 1),
      ('population', 1),
      ('retries', 0),
      ('lease', 1),
      ('patience', 1),
    ):
      if not getattr(self, field) >= least:
        raise Invalid(Sweep, field, f'{getattr(self, field)!r} must be at least {least}.')

  def config(self, planned: plan.Planned) -> configs.Config:
    return configs.load(self.run, [*self.bindings, *planned.bindings()])


def make_plan(sweep: Sweep) -> tuple[list[plan.Size], list[plan.Planned], configs.Config]:
  """The ladder counted, the runs of the fit, and the base run; everything checked before any compute."""
  base = configs.load(sweep.run, sweep.bindings)
  run = base.build()
  taken = {name for name, macro in base.macros.items() if macro.used}
  for name in ('EMBED', 'LAYERS'):
    if name not in taken:
      raise UserError(
        f'{sweep.run}: nothing in it takes the macro {name}, and a ladder makes sizes by EMBED and LAYERS; '
        f'write %{name} where its model is made.'
      )
  from research.model import counts

  def count(macros: dict) -> counts.Counts:
    sizes = [f'{k}={v}' for k, v in macros.items() if k in taken]
    config = configs.load(sweep.run, [*sweep.bindings, *sizes])
    sized = config.build()
    with config.explains():
      return counts.count(sized.model, sized.train.lengths)

  rungs = [
    dataclasses.replace(size, macros={k: v for k, v in size.macros.items() if k in taken})
    for size in sweep.design.rungs(count)
  ]
  runs = sweep.design.plan(rungs, run.target_length)
  # Runs that differ in their numbers alone are right or wrong together.
  for planned in {(r.size.name, r.batch_size, r.steps, r.settings): r for r in runs}.values():
    sweep.config(planned).build()
  return rungs, runs, run


def check_data(run, frozen, tokens: int, what: str) -> None:
  """More tokens than the stream has would repeat them, and the law is of fresh ones."""
  have = len(frozen) * run.target_length
  if tokens > have:
    raise UserError(
      f'{what} needs {si(tokens)} tokens and the training stream has {si(have)}: raise '
      f'train/Stream.examples to {-(-tokens // run.target_length)}, or use a larger corpus.'
    )


def open_data(sweep: Sweep, runs: list[plan.Planned], base):
  """The base run's training stream; every stream of the sweep is frozen here, once, and not by its workers."""
  from research.data import cache

  say = lambda text: print(text, file=sys.stderr, flush=True)
  streams = {repr(stream): stream for stream in (base.train, base.validation)}
  for settings in dict.fromkeys(run.settings for run in runs):
    run = configs.load(sweep.run, [*sweep.bindings, *settings]).build()
    streams |= {repr(stream): stream for stream in (run.train, run.validation)}
  return cache.open_streams(list(streams.values()), log=say)[0]


def make_folder(folder: Folder, text: str) -> None:
  storage.make(folder.path)
  storage.write_atomic(folder.path / 'sweep.gin', text)
