"""Tasks: items with their requests, and the metrics of the answers."""

import abc
import collections
import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from research.core.errors import Invalid, UserError
from research.evaluation.callbacks import Progress, no_progress
from research.evaluation.engine import Engine
from research.evaluation.requests import Answer, Failed, Likelihood, Request


@dataclasses.dataclass(frozen=True)
class Item:
  """One example of a task.

  Attributes:
    requests: what the model is asked.
    target: what `Task.measure` needs to judge the answers.
  """

  requests: tuple[Request, ...]
  target: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseTask(abc.ABC):
  """What a suite runs: a name, and a `run` that gives metrics.

  A subclass is a frozen dataclass. Every setting that changes its numbers is a field, because `suite.run_task`
  recognises a finished task by its fields.

  Attributes:
    examples: the number of items.
    seed: of the choice of the items.
  """

  examples: int = 100
  seed: int = 0

  def __post_init__(self):
    if self.examples < 1:
      raise Invalid(type(self), 'examples', f'{self.examples!r} must be positive.')

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """A short name, such as 'arithmetic-2digits-0shot'. Files and columns are named after it."""

  @abc.abstractmethod
  def run(self, engine: Engine, progress: Progress = no_progress) -> dict:
    """Asks the engine; returns what `make_result` makes, or {'error': why the task cannot run}."""

  def settings(self) -> dict:
    """What the numbers depend on besides the fields. These become columns of the row."""
    return {}

  def make_result(
    self, metrics: dict[str, float], *, items: int, requests: int, start: float,
    cut: int = 0, reasons: Mapping[str, int] | None = None, settings: dict | None = None,
  ) -> dict:  # fmt: skip
    """The result of a task as JSON values.

    Args:
      items: how many items the task has, failed ones included.
      requests: how many requests were made.
      start: `time.monotonic()` when the task began.
      cut: how many items were cut on the left.
      reasons: the number of failed items by reason.
      settings: None for `self.settings()`.
    """
    reasons = collections.Counter(reasons or {})
    return {
      'metrics': metrics,
      'items': items,
      'failed': reasons.total(),
      'cut': cut,
      'reasons': dict(reasons.most_common(5)),
      'requests': requests,
      'seconds': time.monotonic() - start,
      'settings': self.settings() if settings is None else settings,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(BaseTask):
  """A task of items, each measured by itself."""

  @abc.abstractmethod
  def items(self) -> list[Item]:
    """The items, the same every time.

    Raises:
      UserError: the task's data are missing.
    """

  @abc.abstractmethod
  def measure(self, item: Item, answers: Sequence[Answer]) -> dict[str, float]:
    """The measures of one item, by name. None of its answers is `Failed`."""

  def run(self, engine: Engine, progress: Progress = no_progress) -> dict:
    """See `BaseTask.run`. An item with a failed request counts as failed, and no metric includes it."""
    start = time.monotonic()
    try:
      items = self.items()
    except UserError as error:
      return {'error': str(error)}
    requests = [request for item in items for request in item.requests]
    answers = iter(engine.answer(requests, progress))
    measures = []
    reasons = collections.Counter()
    cut = 0
    for item in items:
      item_answers = [next(answers) for _ in item.requests]
      failures = [answer.reason for answer in item_answers if isinstance(answer, Failed)]
      if failures:
        reasons[failures[0]] += 1
        continue
      cut += any(answer.cut for answer in item_answers)
      measures.append(self.measure(item, item_answers))
    return self.make_result(
      self.summarise(measures),
      items=len(items),
      requests=len(requests),
      start=start,
      cut=cut,
      reasons=reasons,
    )

  def summarise(self, measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The task's metrics: means over its items, with the standard error of each mean."""
    metrics = {}
    for key in measures[0] if measures else ():
      values = [measure[key] for measure in measures]
      metrics[key] = sum(values) / len(values)
      if len(values) > 1:
        metrics[f'{key}_stderr'] = standard_error(values)
    return metrics


def standard_error(values: Sequence[float]) -> float:
  """The standard error of the mean of two values or more."""
  mean = sum(values) / len(values)
  variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
  return math.sqrt(variance / len(values))


def check_none_failed(answers: Iterable[Answer], engine_name: str) -> None:
  """For an outside engine that computes its metrics over all answers.

  Raises:
    UserError: a request failed.
  """
  answers = list(answers)
  reasons = collections.Counter(answer.reason for answer in answers if isinstance(answer, Failed))
  if reasons:
    raise UserError(
      f'{reasons.total()} of {len(answers)} requests failed, and {engine_name} would average over them; '
      f'the most frequent reason: {reasons.most_common(1)[0][0]}'
    )


def judge_choices(
  answers: Sequence[Likelihood], choices: Sequence[str], right: int
) -> dict[str, float]:
  """Multiple choice by the likelihood of each choice.

  Returns:
    accuracy: whether the right choice is the likeliest (lm-eval's acc); of equal ones the first counts.
    accuracy_per_byte: the same by log-likelihood per UTF-8 byte (lm-eval's acc_norm divides by characters).
    choice_nats: -ln of the right choice's share of the likelihood of all: the smooth metric beside the hard
      one (Schaeffer et al. 2023, arXiv:2304.15004). A guess has ln(number of choices).
  """
  nats = [answer.nats for answer in answers]
  per_byte = [value / len(text.encode()) for value, text in zip(nats, choices, strict=True)]
  highest = max(nats)
  # Relative to the highest, because exp of a long text's log-likelihood is 0 in float64.
  total = highest + math.log(sum(math.exp(value - highest) for value in nats))
  return {
    'accuracy': float(nats.index(highest) == right),
    'accuracy_per_byte': float(per_byte.index(max(per_byte)) == right),
    'choice_nats': total - nats[right],
  }
