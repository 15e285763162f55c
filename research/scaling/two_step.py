"""Two-step forecasts: from compute, or N and D, to a task's loss, and from this loss to the task's metric.

The accuracy of small models stays at chance and says nothing, while the loss of the right answer falls all
along. So a first law forecasts the loss, and a second one, fitted to all checkpoints, turns it into the
accuracy (Gadre et al. 2024, arXiv:2403.08540; Dubey et al. 2024, arXiv:2407.21783, section 3.2.1; Bhagia et al.
2024, arXiv:2412.04403).
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from research.core.errors import did_you_mean
from research.scaling import any_law, binomial, bootstrap, held
from research.scaling.any_law import FittedLaw
from research.scaling.columns import Columns
from research.scaling.emergence import Emergence, judge
from research.scaling.laws.base import Law, LawError
from research.scaling.options import Options


@dataclasses.dataclass(frozen=True)
class TwoSteps:
  """Both fitted laws. `emergence`: the judgement of a jump of the accuracy, where the rows allow one."""

  first: FittedLaw
  second: FittedLaw
  emergence: Emergence | None = None

  @property
  def level(self) -> float:
    """Of every interval."""
    return self.first.level

  def value_at(self, **inputs) -> tuple[float, float, float]:
    """(value, low, high) of the second law at the first one's loss, with the interval of both laws."""
    value = float(self.second.fit.predict(**{self.joint: self.first.fit.predict(**inputs)}))
    return value, *self._interval(self._samples(inputs))

  def measured_at(
    self, examples: float | None = None, seed: int = 0, **inputs
  ) -> tuple[float, float]:
    """(low, high) of a measurement: one run, with the scatter of its loss, on `examples` examples.

    Without a number of examples the noise of the measurement is that of the second step's residuals.
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
    """The quantity between the steps: the first one's output and the second one's input."""
    return self.second.fit.law.inputs[0]

  def loss_at(self, **inputs) -> tuple[float, float, float]:
    """(loss, low, high) of the first step."""
    return self.first.value_at(**inputs)

  def _samples(self, inputs: Mapping[str, float], rng=None) -> np.ndarray:
    """The second law's value with the k-th replicate of both steps [replicates]; `rng` adds a run's scatter."""
    losses = self.first.fit.law(self.first.bootstrap.parameters, **inputs)
    if rng is not None:
      losses = _scattered(losses, self.first, rng)
    return self.second.fit.law(self.second.bootstrap.parameters, **{self.joint: losses})

  def _interval(self, samples: np.ndarray) -> tuple[float, float]:
    # Of both steps the one with fewer degrees of freedom, which gives the wider interval.
    freedom = min(self.first.bootstrap.freedom, self.second.bootstrap.freedom)
    low, high = bootstrap.interval(samples, self.level, freedom)
    return float(low), float(high)

  def __str__(self) -> str:
    parts = [f'Step 1: {self.first}', f'Step 2: {self.second}']
    if self.emergence is not None:
      parts.append(f'Emergence: {self.emergence}')
    return '\n'.join(parts)


def _scattered(values: np.ndarray, step: FittedLaw, rng) -> np.ndarray:
  """Values of a step's law, each with the residual of a random row."""
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
  """Fits `first` to `rows` and `second` to `second_rows`.

  Args:
    second_rows: such as all checkpoints; None for the same rows.
    anchors: points of the second law that no run measured, such as {'loss': 0, 'accuracy': 1}.
    columns: as in `any_law.fit_law`. A loss in bits per byte stays as it is, since its unit drops out between
      the steps.
    options: of both fits. A fixed or tied parameter goes to the law that has it; `examples` is of the second.

  Raises:
    LawError: the input of the second law is not the output of the first, or a fixed or tied parameter is in
      neither law or in both, or its value is impossible.
  """
  rows = list(rows)
  second_rows = rows if second_rows is None else list(second_rows)
  if second.inputs != (first.output,):
    raise LawError(
      f'{second.name} is a law of {", ".join(second.inputs)}, and {first.name} predicts '
      f'{first.output}: the second step must be a law of what the first one predicts.'
    )
  columns = _same_unit(rows, first, columns)
  of_the_first = _options_of(options, first, second, examples=None)
  of_the_second = _options_of(options, second, first)
  for law, of_the_law in ((first, of_the_first), (second, of_the_second)):
    held.check(law, of_the_law.fixed, of_the_law.tied)
  steps = (
    any_law.fit_law(rows, first, columns, role, of_the_first),
    any_law.fit_law(second_rows, second, columns, role, of_the_second, anchors),
  )
  return TwoSteps(*steps, _emergence(rows, steps, columns, role))


def _same_unit(rows, first: Law, columns: Columns) -> Columns:
  """The columns, with a loss that keeps its unit. A perplexity has no unit that could drop out."""
  column = any_law.find_column(rows, first, columns, first.output)
  is_perplexity = any(word in str(column).lower() for word in ('ppl', 'perplexity'))
  if columns.loss_unit is not None or is_perplexity:
    return columns
  return dataclasses.replace(columns, loss_unit='nats')


def _options_of(options: Options, law: Law, other: Law, **changes) -> Options:
  """The options of the step with `law`: of the fixed and tied parameters only those that it has."""
  constraints = {}
  for name in ('fixed', 'tied'):
    all_of_them = dict(getattr(options, name) or {})
    for parameter in all_of_them:
      owners = [owner.name for owner in (law, other) if parameter in owner.parameters]
      if not owners:
        known = {*law.parameters, *other.parameters}
        raise LawError(
          f'Neither law has a parameter {parameter!r}.{did_you_mean(parameter, known)}'
        )
      if len(owners) > 1:
        raise LawError(
          f'Both {owners[0]} and {owners[1]} have a parameter {parameter!r}, so it cannot be fixed or tied.'
        )
    constraints[name] = {key: v for key, v in all_of_them.items() if key in law.parameters}
  return dataclasses.replace(options, **constraints, **changes)


def _emergence(rows, steps, columns: Columns, role) -> Emergence | None:
  """The judgement on the rows of the first step; None where they lack compute or the accuracy."""
  first, second = (step.fit.law for step in steps)
  examples = steps[1].examples
  # Without a chance level and the noise of an accuracy there is no test of chance.
  if 'floor' not in second.parameters or examples is None:
    return None
  try:
    read = any_law.read(rows, ('flops', first.output, second.output), second, columns, role)
  except LawError:
    return None
  chance = steps[1].fit.parameters['floor']
  return judge(read['flops'], read[second.output], read[first.output], examples, chance)
