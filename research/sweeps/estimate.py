"""The cost of a sweep and the precision of its law, estimated before any compute is spent."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping

import jax
import numpy as np

from research.core import configs
from research.core.errors import UserError
from research.core.text import clock
from research.designs.plan import Planned
from research.parallel import hosts
from research.scaling import NoForecast, fit_results, held, laws
from research.scaling.rows import CONVENTIONS
from research.sweeps import findings, fleet
from research.sweeps.sweep import Sweep
from research.training.program import keep_compiled, make_program, mesh_of
from research.training.run import Run

# Chinchilla's exponents as Besiroglu et al. 2024 (arXiv:2404.10102) fit them again. Of the law's
# parameters they change least from one model and data set to another.
ALPHA, BETA = 0.348, 0.366


@dataclasses.dataclass(frozen=True)
class Speed:
  """The time of a step: `overhead` seconds + its FLOPs / `flops_per_second`, on `chips` of `hardware`."""

  overhead: float
  flops_per_second: float
  chips: int
  hardware: str

  def seconds(self, run: Planned) -> float:
    """Seconds that a planned run trains, without start-up and compilation."""
    steps = run.steps - run.fork
    return steps * self.overhead + run.cost / self.flops_per_second

  def __str__(self) -> str:
    speed = f'{self.flops_per_second:.3g} FLOP/s and {1e3 * self.overhead:.2g} ms a step'
    return f'{speed} on {self.chips} x {self.hardware}'


def measured(sweep: Sweep, runs: list[Planned]) -> Speed:
  """Times a step of the smallest and of the largest run on this machine, on random tokens."""

  def step_flops(run: Planned) -> float:
    return run.flops / run.steps

  # A run with a method would read its parent's checkpoint, which is not there yet.
  runs = [run for run in runs if not run.method]
  ends = min(runs, key=step_flops), max(runs, key=step_flops)
  flops = np.array([step_flops(run) for run in ends])
  seconds = np.array([step_seconds(sweep.config(run).build()) for run in ends])
  device = jax.devices()[0]
  chips, hardware = jax.device_count(), device.device_kind
  # Two sizes that are too alike, or timings that are noise, do not determine a line.
  if flops[1] < 1.5 * flops[0] or seconds[1] <= seconds[0]:
    return Speed(0.0, float(flops[1] / seconds[1]), chips, hardware)
  rate = float((flops[1] - flops[0]) / (seconds[1] - seconds[0]))
  overhead = float(seconds[0] - flops[0] / rate)
  if overhead < 0:  # the larger run is the less efficient one, which this line cannot describe
    return Speed(0.0, float(flops[1] / seconds[1]), chips, hardware)
  return Speed(overhead, rate, chips, hardware)


def step_seconds(run: Run, repeats: int = 5) -> float:
  """Median wall time of a run's compiled train step on this machine, the first call left out."""
  random = np.random.default_rng(0)
  length = run.target_length
  keep_compiled()
  with mesh_of(run, jax.devices()).use():
    program = make_program(run)

    def draw(length: int) -> np.ndarray:
      return random.integers(2, 64, (run.batch_size, length), np.int32)

    # Values do not change the time of a step; lengths and dtypes must be those of training.
    batch = {
      'decoder_target_tokens': draw(length),
      'decoder_input_tokens': draw(length),
      'decoder_loss_weights': np.ones((run.batch_size, length), np.int32),
    }
    if 'inputs' in run.train.lengths and len(run.train.lengths) > 1:
      batch['encoder_input_tokens'] = draw(run.train.lengths['inputs'])
    if 'decoder_segment_ids' in run.loss.reads:
      batch['decoder_segment_ids'] = np.ones((run.batch_size, length), np.int32)
    for key, (shape, dtype) in run.beside_tokens.items():
      batch[key] = np.zeros((run.batch_size, *shape), dtype)
    batch = hosts.place(batch)
    rate = np.float32(1e-4)
    state = jax.jit(program.init)(jax.random.key(0))
    fixed = program.fixed()
    step = jax.jit(program.step, donate_argnums=0)
    walls = []
    # One more than counts, since the first call compiles.
    for _ in range(repeats + 1):
      began = time.perf_counter()
      state, scalars = step(state, batch, rate, fixed)
      jax.block_until_ready(scalars)
      walls.append(time.perf_counter() - began)
  return float(np.median(walls[1:]))


def compiled(path: str) -> Speed:
  """The speed that `research.compile` predicted in its JSON file.

  Raises:
    UserError: there is no such file, or it holds no prediction.
  """
  try:
    report = json.loads(pathlib.Path(path).read_text())
    seconds, flops = report['predicted_step_s'], report['model_flops']
    chips, hardware = report['devices'], report['topology']
  except OSError as error:
    raise UserError(f'--compiled={path} cannot be read ({error.strerror}).') from None
  except (ValueError, KeyError) as error:
    raise UserError(
      f'--compiled={path} is not what python -m research.compile writes ({error}).'
    ) from None
  return Speed(0.0, flops / seconds, chips, hardware)


def usual_law(runs: list[Planned], known: Mapping[str, float] | None = None) -> dict[str, float]:
  """Chinchilla's law with its published exponents, and with the optimum at the centre of these runs.

  The centre is the geometric mean of N and of D. The loss there is 2.5 nats, of which 1.5 are irreducible.

  Args:
    known: parameters of Chinchilla that have these values in place of the usual ones.
  """
  known = dict(known or {})
  alpha = known.get('alpha', ALPHA)
  beta = known.get('beta', BETA)
  n = math.exp(np.mean([math.log(run.size.params) for run in runs]))
  d = math.exp(np.mean([math.log(run.tokens) for run in runs]))
  by_size = beta / (alpha + beta)  # so that alpha A / N^alpha = beta B / D^beta
  law = {'A': by_size * n**alpha, 'B': (1 - by_size) * d**beta, 'E': 1.5}
  return {**law, 'alpha': alpha, 'beta': beta, **known}


def simulated_rows(
  runs: list[Planned], flops: str, law: laws.Law, parameters: Mapping, noise: float, seed: int
) -> list[dict]:
  """The rows of runs whose losses follow a law with log-normal noise.

  Args:
    flops: the FLOP convention of the rows.
    parameters: of the law.
    noise: standard deviation of ln loss between seeds.
  """
  random = np.random.default_rng(seed)
  rows = []
  for run in runs:
    n, d = run.size.params, run.tokens
    loss = float(law(parameters, params=n, tokens=d)) * math.exp(noise * random.standard_normal())
    facts = {'run': run.name, 'role': run.role, 'budget': run.budget, 'status': 'finished'}
    rows.append({**facts, CONVENTIONS[flops]: n, 'tokens': d, flops: run.flops, 'loss': loss})
  return rows


def informative(sweep: Sweep, runs: list[Planned], draws: int = 3) -> str:
  """The exponents that a fit of the runs would give, by simulation: a line for each.

  The losses follow `Sweep.law` with the parameters `Sweep.prior`, or without a prior `usual_law` with
  the parameters that `Sweep.fixed` knows. `Sweep.law` is then fitted to them just as it will be to the real
  rows.

  Args:
    draws: how many sweeps to simulate; the line shows the interval of median width.
  """
  runs = [run for run in runs if run.role == 'fit']
  truth = sweep.law if sweep.prior else laws.Chinchilla()
  parameters = sweep.prior or usual_law(runs, held.of_chinchilla(sweep.law, sweep.fixed))
  options = {'columns': findings.columns(sweep), 'law': sweep.law, 'fixed': sweep.fixed}
  drawn = []
  why = ''
  for seed in range(draws):
    rows = simulated_rows(runs, sweep.design.flops, truth, parameters, sweep.noise, seed)
    try:
      analysis = fit_results(rows, **options, replicates=200, conventions=False, seed=seed)
    except (NoForecast, laws.LawError) as error:
      why = str(error)
      continue
    drawn.append({k: v for k, v in analysis.exponents().items() if k.startswith('a,')})
  values = ', '.join(f'{k} {v:.3g}' for k, v in parameters.items())
  name = '' if isinstance(truth, laws.Chinchilla) else f'{truth.name} with '
  lines = [
    f'if the law were {name}{values}, and seeds moved the loss by {sweep.noise:.1%}, a fit would say:'
  ]
  for name in dict.fromkeys(name for exponents in drawn for name in exponents):
    intervals = [exponents[name] for exponents in drawn if name in exponents]
    widths = [high - low for _, low, high in intervals]
    value, low, high = intervals[int(np.argsort(widths, kind='stable')[len(widths) // 2])]
    lines.append(
      f'  N* ~ C^a with {name}: {value:.3f} [{low:.3f}, {high:.3f}], +-{(high - low) / 2:.3f}'
    )
  if len(drawn) < draws:
    lines.append(f'  in {draws - len(drawn)} of {draws} simulated sweeps no fit: {why}')
  return '\n'.join(lines)


def fleet_hosts(flags, sweep: Sweep) -> int | None:
  """How many runs the stated fleet trains at a time, or the cluster of --address; None without either.

  Raises:
    UserError: the cluster cannot be joined.
  """
  if flags.fleet is not None or not flags.address:
    return flags.fleet
  return sweep.launcher.slots()


def on_fleet(
  speed: Speed, sweep: Sweep, runs: list[Planned], count: int, preemptions: float
) -> str:
  """What `fleet.forecast` says of these runs, each alone on a host of this speed."""
  every = configs.load(sweep.run, sweep.bindings).build().checkpoint_every
  jobs = []
  for run in runs:
    seconds = speed.seconds(run)
    steps = run.steps - run.fork
    jobs.append(fleet.Job(seconds, seconds * every / steps if every else math.inf))
  stated = fleet.Fleet(hosts=count, preemptions=preemptions, lease=sweep.lease)
  return fleet.forecast(jobs, stated, sweep.retries)


def show_estimate(flags, sweep: Sweep, runs: list[Planned]) -> None:
  """Prints what --plan adds to the list of runs: their time, and the precision of the law."""
  speed = None
  if flags.measure:
    speed = measured(sweep, runs)
  elif flags.compiled:
    speed = compiled(flags.compiled)
  if speed:
    seconds = sum(map(speed.seconds, runs))
    hours = seconds * speed.chips / 3600
    print(f'at {speed}: {clock(seconds)} of training one by one, {hours:.3g} chip-hours')
  hosts_of_fleet = fleet_hosts(flags, sweep)
  if hosts_of_fleet is not None:
    if not speed:
      raise UserError(
        '--fleet and --address need the speed of a host: add --measure or --compiled.'
      )
    print(on_fleet(speed, sweep, runs, hosts_of_fleet, flags.preemptions))
  elif flags.preemptions:
    raise UserError(f'--preemptions={flags.preemptions:g} goes with --fleet or --address.')
  if sweep.design.law:
    print(informative(sweep, runs))
