"""What a sweep is: a gin file of one run, a design that varies it, and the law that its results are fitted to.

Everything here happens before any compute is spent: sizes are counted, every kind of run is built once, and
the data are frozen, so that a mistake is an error now and not hours later.
"""

import dataclasses

from research.core import configs, storage
from research.core.errors import Invalid, UserError
from research.core.text import si
from research.data import cache
from research.designs.base import Design
from research.designs.isoflop import IsoFlop
from research.designs.plan import Planned, Size
from research.model import counts
from research.scaling import held, laws
from research.sweeps.folder import Folder
from research.sweeps.launchers import local
from research.sweeps.launchers.job import Launcher
from research.training.experience import Experience
from research.training.run import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What a sweep is.

  Attributes:
    run: the gin file of one run; every run of the sweep is a variation of it. It must take the macros EMBED,
      LAYERS and LEARNING_RATE, and is given what it takes of HEADS, HEAD_DIM and MLP.
    design: which runs to do.
    law: what approach 3 fits to their rows: a law of N and D, `research.scaling.laws` or your own.
    forecast: the budget of the run that tests the law, as a multiple of the design's largest; None for no
      such run.
    forecast_seeds: from how many seeds that run is done; the mean of their losses is the outcome. With as many
      workers it takes no longer.
    population: how many runs of one shape are trained at once (training/population.py); 1 trains each alone.
    retries: how often a run that failed is tried again, before its row says that it failed and why.
    lease: seconds after which a worker that does not renew its lease loses its run.
    patience: seconds without progress after which a worker counts as hung. Compiling shows no progress, so let
      it be longer than any compilation.
    launcher: what starts the workers.
    prior: parameters of `law` from which --plan simulates what the design would find; None for Chinchilla's
      published exponents with the optimum at the middle of the design.
    noise: the standard deviation of ln loss between seeds, for the same simulation.
    fixed: parameters of the law that are known, such as {'E': 0.8} from earlier sweeps of the same data and
      vocabulary. The irreducible loss is what a small sweep determines least.
    bindings: more gin bindings for every run, as on a command line.
    question: what the sweep asks, for its report.
  """

  run: str
  design: Design
  law: laws.Law = dataclasses.field(default_factory=laws.Chinchilla)
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
    self._check_law()
    least = {'forecast_seeds': 1, 'population': 1, 'retries': 0, 'lease': 1, 'patience': 1}
    for field, minimum in least.items():
      if not getattr(self, field) >= minimum:
        raise Invalid(Sweep, field, f'{getattr(self, field)!r} must be at least {minimum}.')

  def _check_law(self):
    if not isinstance(self.law, laws.Law):
      why = f'{self.law!r} is no law: bind an instance, as in @laws.Chinchilla().'
      raise Invalid(Sweep, 'law', why)
    # Whether the design asks for a law or not: it would be an error after all runs are done.
    if set(self.law.inputs) != {'params', 'tokens'}:
      why = f'{self.law.name} is a law of {", ".join(self.law.inputs)}; a sweep fits one of params and tokens.'
      raise Invalid(Sweep, 'law', why)
    names = list(self.law.parameters)
    for field in ('fixed', 'prior'):
      values = getattr(self, field) or {}
      if unknown := sorted(set(values) - set(names)):
        why = f'{self.law.name} has no {unknown[0]!r}; it has {", ".join(names)}.'
        raise Invalid(Sweep, field, why)
    for name, value in (self.fixed or {}).items():
      if why := held.why_not(self.law, name, value):
        raise Invalid(Sweep, 'fixed', why)
    if self.prior and (missing := [name for name in names if name not in self.prior]):
      raise Invalid(Sweep, 'prior', f'{self.law.name} also needs {", ".join(missing)}.')

  def config(self, planned: Planned, parent: str = 'a run of this sweep') -> configs.Config:
    """The gin configuration of one run of the sweep.

    Args:
      parent: the folder of the run that a run with a method starts from. It is read when the run starts.
    """
    files = [self.run]
    bindings = [*self.bindings, *planned.bindings()]
    if planned.method:
      files.append(planned.method)
      bindings.append(f'BASE={parent!r}')
    return configs.load(files, bindings)


def make_plan(sweep: Sweep) -> tuple[list[Size], list[Planned], Run]:
  """The counted sizes of the ladder, the runs of the fit, and the run that all are variations of.

  Raises:
    UserError: the ladder cannot set the size of that run, or some run is no valid one.
  """
  base = configs.load(sweep.run, sweep.bindings)
  run = base.build()
  if isinstance(run.train, Experience):
    why = 'a sweep is of runs that read a stream; start runs of reinforcement with research.train.'
    raise Invalid(Run, 'train', why)
  taken = {name for name, macro in base.macros.items() if macro.used}
  for name in ('EMBED', 'LAYERS'):
    if name not in taken:
      raise UserError(
        f'{sweep.run}: nothing in it takes the macro {name}, and a ladder makes sizes by EMBED and '
        f'LAYERS; write %{name} where its model is made.'
      )

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
  # Runs that differ only in seed or learning rate are valid or invalid together, so one of them is built.
  kinds = {(r.size.name, r.batch_size, r.steps, r.method, r.settings): r for r in runs}
  for planned in kinds.values():
    sweep.config(planned).build()
  return rungs, runs, run


def open_data(sweep: Sweep, runs: list[Planned], base: Run) -> dict[tuple[str, ...], object]:
  """Freezes every stream of the sweep, so that its workers need not.

  Returns:
    {settings of runs: their training stream}; of () it is the base run's.
  """
  built = {
    run.settings: sweep.config(run).build() for run in {r.settings: r for r in runs}.values()
  }
  built[()] = base
  streams = {repr(s): s for run in built.values() for s in (run.train, run.validation)}
  opened = dict(zip(streams, cache.open_streams(list(streams.values())), strict=True))
  return {settings: opened[repr(run.train)] for settings, run in built.items()}


def check_fresh(runs: list[Planned], streams: dict, length: int) -> None:
  """Checks that no run sees a token twice, because the law is of fresh data.

  Args:
    streams: as `open_data` gives them.
    length: tokens of a row.

  Raises:
    UserError: the training stream of a run has fewer tokens.
  """
  longest = {run.settings: run for run in sorted(runs, key=lambda run: run.tokens)}
  for settings, run in longest.items():
    available = len(streams.get(settings, streams[()])) * length
    if run.tokens > available:
      raise UserError(
        f'{run.name} needs {si(run.tokens)} tokens and its training stream has {si(available)}: raise '
        f'train/Stream.examples to {-(-run.tokens // length)}, or use a larger corpus.'
      )


def make_folder(folder: Folder, text: str) -> None:
  """Makes the sweep's folder, with its gin file in it: `text`."""
  storage.make(folder.path)
  storage.write_atomic(folder.path / 'sweep.gin', text)
