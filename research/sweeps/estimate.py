"""What a sweep will cost, and what its rows will be worth: before any of it is spent."""

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Mapping

import numpy as np

from research.core.errors import UserError
from research.core.text import clock
from research.designs import plan
from research.sweeps.sweep import Sweep

# Besiroglu et al. 2024 (arXiv:2404.10102), Chinchilla's law fitted again: what seems to hold at every scale.
ALPHA, BETA = 0.348, 0.366


@dataclasses.dataclass(frozen=True)
class Speed:
  """Seconds of a step as `overhead` + step FLOPs / `flops_per_second`, on `chips` chips of `hardware`."""

  overhead: float
  flops_per_second: float
  chips: int
  hardware: str

  def seconds(self, run) -> float:
    """Of a planned run's training, without starting and compiling."""
    steps = run.steps - run.fork
    return steps * self.overhead + run.cost / self.flops_per_second

  def __str__(self) -> str:
    speed = f'{self.flops_per_second:.3g} FLOP/s and {1e3 * self.overhead:.2g} ms a step'
    return f'{speed} on {self.chips} x {self.hardware}'


def measured(sweep, runs: list) -> Speed:
  """Times the steps of the smallest and of the largest run here, on made-up tokens."""
  import jax

  by_step = lambda run: run.flops / run.steps
  ends = min(runs, key=by_step), max(runs, key=by_step)
  flops = np.array([by_step(run) for run in ends])
  seconds = np.array([step_seconds(sweep.config(run).build()) for run in ends])
  device = jax.devices()[0]
  chips, hardware = jax.device_count(), device.device_kind
  if flops[1] < 1.5 * flops[0] or seconds[1] <= seconds[0]:
    return Speed(0.0, float(flops[1] / seconds[1]), chips, hardware)
  rate = float((flops[1] - flops[0]) / (seconds[1] - seconds[0]))
  overhead = float(seconds[0] - flops[0] / rate)
  if overhead < 0:  # the larger is the less efficient
    return Speed(0.0, float(flops[1] / seconds[1]), chips, hardware)
  return Speed(overhead, rate, chips, hardware)


def step_seconds(run, repeats: int = 5) -> float:
  """Median wall time of a run's train step here, compiled and warm."""
  import jax

  from research.parallel import hosts
  from research.training.program import keep_compiled, make_program, mesh_of

  random, length = np.random.default_rng(0), run.target_length
  keep_compiled()
  with mesh_of(run, jax.devices()).use():
    program = make_program(run)
    draw = lambda n: random.integers(2, 64, (run.batch_size, n), np.int32)
    batch = {
      'decoder_target_tokens': draw(length),
      'decoder_input_tokens': draw(length),
      'decoder_loss_weights': np.ones((run.batch_size, length), np.int32),
    }
    if 'inputs' in run.train.lengths and len(run.train.lengths) > 1:
      batch['encoder_input_tokens'] = draw(run.train.lengths['inputs'])
    batch, rate = hosts.place(batch), np.float32(1e-4)
    state = jax.jit(program.init)(jax.random.key(0))
    step, walls = jax.jit(program.step, donate_argnums=0), []
    for _ in range(repeats + 1):
      began = time.perf_counter()
      state, scalars = step(state, batch, rate)
      jax.block_until_ready(scalars)
      walls.append(time.perf_counter() - began)
  return float(np.median(walls[1:]))


def compiled(path: str) -> Speed:
  """The speed that `research.compile` predicts: a JSON file with its `predicted_step_s`.

  Raises:
    UserError: no such file, or it holds no prediction.
  """
  try:
    found = json.loads(pathlib.Path(path).read_text())
    seconds, flops = found['predicted_step_s'], found['model_flops']
    chips, hardware = found['devices'], found['topology']
  except OSError as error:
    raise UserError(f'--compiled={path} cannot be read ({error.strerror}).') from None
  except (ValueError, KeyError) as error:
    raise UserError(
      f'--compiled={path} is not what python -m research.compile writes ({error}).'
    ) from None
  return Speed(0.0, flops / seconds, chips, hardware)


def usual_law(runs: list) -> dict[str, float]:
  """Chinchilla's law with its published exponents, and with the optimum at the centre of these runs.

  The centre is the geometric mean of N and of D; its loss is 2.5 nats, of which 1 can be removed.
  """
  n, d = (math.exp(np.mean([math.log(x) for x in xs])) for xs in zip(*(
    (run.size.params, run.tokens) for run in runs
  ), strict=True))  # fmt: skip
  by_size = BETA / (ALPHA + BETA)  # so that alpha A / N^alpha = beta B / D^beta
  law = {'A': by_size * n**ALPHA, 'B': (1 - by_size) * d**BETA, 'E': 1.5}
  return {**law, 'alpha': ALPHA, 'beta': BETA}


def simulated_rows(
  runs: list, convention: str, flops: str, prior: Mapping, noise: float, seed: int
):
  """Rows as the runs would leave them were the loss the prior's law with log-normal noise between runs."""
  random, rows = np.random.default_rng(seed), []
  for run in runs:
    n, d = run.size.params, run.tokens
    loss = prior['E'] + prior['A'] / n ** prior['alpha'] + prior['B'] / d ** prior['beta']
    loss *= math.exp(noise * random.standard_normal())
    facts = {'run': run.name, 'role': run.role, 'budget': run.budget, 'status': 'finished'}
    rows.append({**facts, convention: n, 'tokens': d, flops: run.flops, 'loss': loss})
  return rows


def informative(runs: list, flops: str, prior: Mapping | None, noise: float, draws: int = 3) -> str:
  """What a fit of the runs' rows would say of the exponents, by simulation: one line for each.

  Args:
    prior: parameters of Chinchilla's law; None for `usual_law`.
    noise: standard deviation of ln loss between runs that differ in their seed alone.
    draws: simulated sweeps; the middle one's intervals are shown.
  """
  from research.scaling import Columns, NoForecast, fit_results
  from research.scaling.rows import CONVENTIONS

  runs = [run for run in runs if run.role == 'fit']
  prior = prior or usual_law(runs)
  columns = Columns(params=CONVENTIONS[flops], tokens='tokens', flops=flops, loss='loss')
  found, why = [], ''
  for seed in range(draws):
    rows = simulated_rows(runs, CONVENTIONS[flops], flops, prior, noise, seed)
    try:
      analysis = fit_results(rows, columns=columns, replicates=200, conventions=False, seed=seed)
    except NoForecast as error:
      why = str(error)
      continue
    found.append({k: v for k, v in analysis.exponents().items() if k.startswith('a,')})
  law = ', '.join(f'{k} {v:.3g}' for k, v in prior.items())
  lines = [f'if the law were {law}, and seeds moved the loss by {noise:.1%}, a fit would say:']
  for name in dict.fromkeys(name for exponents in found for name in exponents):
    ends = sorted((e[name] for e in found if name in e), key=lambda e: e[2] - e[1])
    value, low, high = ends[len(ends) // 2]
    lines.append(
      f'  N* ~ C^a with {name}: {value:.3f} [{low:.3f}, {high:.3f}], +-{(high - low) / 2:.3f}'
    )
  if len(found) < draws:
    lines.append(f'  in {draws - len(found)} of {draws} simulated sweeps nothing: {why}')
  return '\n'.join(lines)


def foresee(flags, sweep: Sweep, runs: list[plan.Planned]) -> None:
  """What --plan says beside the runs: how long they take, what they would tell."""
  from research.sweeps import estimate

  speed = None
  if flags.measure:
    speed = estimate.measured(sweep, runs)
  elif flags.compiled:
    speed = estimate.compiled(flags.compiled)
  if speed:
    seconds = sum(map(speed.seconds, runs))
    hours = seconds * speed.chips / 3600
    print(f'at {speed}: {clock(seconds)} of training one by one, {hours:.3g} chip-hours')
  if sweep.design.law:
    print(estimate.informative(runs, sweep.design.flops, sweep.prior, sweep.noise))
