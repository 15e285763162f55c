"""Two-step forecasts: from compute, or N and D, to a task's loss, and from that loss to what the task measures.

An accuracy of small models stays at chance and says nothing; the loss of the right answer falls all the while.
So a first law forecasts the loss and a second, fitted to all checkpoints, turns it into the accuracy (Gadre et
al. 2024, arXiv:2403.08540; Dubey et al. 2024, section 3.2.1; Bhagia et al. 2024, arXiv:2412.04403).
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling import any_law, binomial
from research.scaling.any_law import FittedLaw
from research.scaling.columns import Columns
from research.scaling.emergence import Emergence, judge
from research.scaling.laws.base import Law, LawError
from research.scaling.options import Options


@dataclasses.dataclass(frozen=True)
class TwoSteps:
  """Both fitted laws. `emergence`: what the rows say of a jump of the accuracy, where they can."""

  first: FittedLaw
  second: FittedLaw
  emergence: Emergence | None = None

  @property
  def level(self) -> float:
    return self.first.level

  def value_at(self, **inputs) -> tuple[float, float, float]:
    """The second law at the first one's loss, with the interval that the parameters of both leave."""
    value = float(self.second.fit.predict(**{self.joint: self.first.fit.predict(**inputs)}))
    return value, *self._interval(self._samples(inputs))

  def measured_at(
    self, examples: float | None = None, seed: int = 0, **inputs
  ) -> tuple[float, float]:
    """The interval of a measurement: of one run, whose loss scatters, on `examples` examples.

    Without a number of examples, the second step's own residuals stand for the noise of the measurement.
    """
    rng = np.random.default_rng(seed)
    samples = self._samples(inputs, rng)
    examples = examples or self.second.examples
    if examples:
      samples = binomial.draw(samples, examples, 1.0, rng)
    else:
      samples = _scattered(samples, self.second, rng)
    return self._interval(samples)

  @property
  def joint(self) -> str:
    """What the steps share: the first one's output and the second one's input."""
    return self.second.fit.law.inputs[0]

  def loss_at(self, **inputs) -> tuple[float, float, float]:
    return self.first.value_at(**inputs)

  def _samples(self, inputs: Mapping[str, float], rng=None) -> np.ndarray:
    """The second law's value of every pair of replicates [replicates]; `rng` adds a run's scatter."""
    losses = self.first.fit.law(self.first.bootstrap.parameters, **inputs)
    if rng is not None:
      losses = _scattered(losses, self.first, rng)
    return self.second.fit.law(self.second.bootstrap.parameters, **{self.joint: losses})

  def _interval(self, samples: np.ndarray) -> tuple[float, float]:
    narrower = min((self.first.bootstrap, self.second.bootstrap), key=lambda step: step.freedom)
    low, high = narrower.interval(samples, self.level)
    return float(low), float(high)

  def __str__(self) -> str:
    parts = [f'Step 1: {self.first}', f'Step 2: {self.second}']
    if self.emergence is not None:
      parts.append(f'Emergence: {self.emergence}')
    return '\n'.join(parts)


def _scattered(values: np.ndarray, step: FittedLaw, rng) -> np.ndarray:
  """Values of a step's law, each with the residual of a row drawn at random."""
  scatter = rng.choice(step.bootstrap.spread, len(values))
  return values * np.exp(scatter) if step.fit.problem.residuals == 'log' else values + scatter


def fit_two_steps(
  rows: Iterable[Mapping],
  first: Law,
  second: Law,
  *,
  second_rows: Iterable[Mapping] | None = None,
  anchors: Iterable[Mapping[str, float]] = (),
  columns: Columns = any_law.DEFAULT,
  role: str | None = 'fit',
  options: Options = Options(),  # noqa: B008 (frozen)
) -> TwoSteps:
  """Fits `first` to the rows and `second` to `second_rows` (the same rows by default).

  Args:
    anchors: points of the second law that no run measured, such as {'loss': 0, 'accuracy': 1}.
    columns: a column of bits per byte is taken as it stands: both steps have its unit, and it drops out.
    options: of both fits. Held and tied parameters go to the law that has them; `examples` is of the second.

  Raises:
    LawError: the second law is not one of the first one's output, or a held parameter is of neither or of both.
  """
  rows = list(rows)
  second_rows = rows if second_rows is None else list(second_rows)
  if second.inputs != (first.output,):
    raise LawError(
      f'{second.name} is a law of {", ".join(second.inputs)}, and {first.name} gives '
      f'{first.output}: the second step must be a law of what the first one gives.'
    )
  columns = _same_unit(rows, first, columns)
  of_the_first = _options_of(options, first, second, examples=None)
  of_the_second = _options_of(options, second, first)
  steps = (
    any_law.fit_law(rows, first, columns, role, of_the_first),
    any_law.fit_law(second_rows, second, columns, role, of_the_second, anchors),
  )
  return TwoSteps(*steps, _emergence(rows, steps, columns, role))


def _same_unit(rows, first: Law, columns: Columns) -> Columns:
  """Columns whose loss keeps its unit; a perplexity is no loss and is still refused."""
  column = any_law.find_column(rows, first, columns, first.output)
  linear = not any(word in str(column).lower() for word in ('ppl', 'perplexity'))
  return (
    dataclasses.replace(columns, loss_unit='nats')
    if columns.loss_unit is None and linear
    else columns
  )


def _options_of(options: Options, law: Law, other: Law, **changes) -> Options:
  """The options of one step: of the held and tied parameters those that its law has."""
  own_values = {}
  for name in ('fixed', 'tied'):
    wanted = dict(getattr(options, name) or {})
    for parameter in wanted:
      owners = [owner.name for owner in (law, other) if parameter in owner.parameters]
      if len(owners) != 1:
        known = {*law.parameters, *other.parameters}
        which = f'both {owners[0]} and {owners[1]}' if owners else 'neither law'
        raise LawError(
          f'Parameter {parameter!r} is of {which}.{did_you_mean(parameter, known) if not owners else ""}'
        )
    own_values[name] = {key: value for key, value in wanted.items() if key in law.parameters}
  return dataclasses.replace(options, **own_values, **changes)


def _emergence(rows, steps, columns: Columns, role) -> Emergence | None:
  """Judged on the rows of the first step, where these have compute and the second step's accuracy."""
  first, second = (step.fit.law for step in steps)
  examples = steps[1].examples
  if 'floor' not in second.parameters or examples is None:
    return None  # without the noise of an accuracy nothing is told from chance
  try:
    read = any_law.read(rows, ('flops', first.output, second.output), second, columns, role)
  except LawError:
    return None
  chance = steps[1].fit.parameters['floor']
  return judge(read['flops'], read[second.output], read[first.output], examples, chance)
