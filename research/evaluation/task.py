"""What a task is: items, each with its requests and what a right answer is, and measures of the answers."""

import abc
import collections
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from research.core.errors import Invalid, UserError
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
class Task(abc.ABC):
  """A frozen dataclass: everything that changes its numbers is a field, and its name tells tasks apart.

  Attributes:
    examples: how many items.
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
    """A short name, such as 'arithmetic-2digits-0shot': it names files and columns."""

  @abc.abstractmethod
  def items(self) -> list[Item]:
    """The items, the same every time.

    Raises:
      UserError: the task's data are missing.
    """

  @abc.abstractmethod
  def measure(self, item: Item, answers: Sequence[Answer]) -> dict[str, float]:
    """What the answers to one item are worth; none of them is `Failed`."""

  def run(
    self, engine: Engine, progress: Callable[[int, int], None] = lambda done, of: None
  ) -> dict:
    """The task's metrics, how many of its items failed and why; or {'error': why it could not start}.

    An item with a failed request counts as failed, and is in no metric.
    """
    began = time.monotonic()
    try:
      items = self.items()
    except UserError as error:
      return {'error': str(error)}
    requests = [request for item in items for request in item.requests]
    answers = iter(engine.answer(requests, progress))
    measures, reasons, cut = [], collections.Counter(), 0
    for item in items:
      own = [next(answers) for _ in item.requests]
      failures = [answer.reason for answer in own if isinstance(answer, Failed)]
      if failures:
        reasons[failures[0]] += 1
        continue
      cut += any(answer.cut for answer in own)
      measures.append(self.measure(item, own))
    return {
      'metrics': self.summarise(measures),
      'items': len(items),
      'failed': sum(reasons.values()),
      'cut': cut,
      'reasons': dict(reasons.most_common(5)),
      'requests': len(requests),
      'seconds': time.monotonic() - began,
      'settings': self.settings(),
    }

  def settings(self) -> dict:
    """What else its numbers depend on, beside its fields: columns of the row."""
    return {}

  def summarise(self, measures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The task's metrics: means over its items, with the standard error of each mean."""
    metrics = {}
    for key in measures[0] if measures else ():
      values = [measure[key] for measure in measures]
      mean = sum(values) / len(values)
      metrics[key] = mean
      if len(values) > 1:
        variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
        metrics[f'{key}_stderr'] = math.sqrt(variance / len(values))
    return metrics


def judge_choices(
  answers: Sequence[Likelihood], choices: Sequence[str], right: int
) -> dict[str, float]:
  """Multiple choice by the likelihood of each choice.

  Returns:
    accuracy: whether the right choice is the likeliest (lm-eval's acc); of equal ones the first counts.
    accuracy_per_byte: the same by log-likelihood per UTF-8 byte (lm-eval's acc_norm divides by characters).
    choice_nats: -ln of the right choice's share of the likelihood of all: the smooth metric beside the hard
      one (Schaeffer et al. 2023, arXiv:2304.15004); ln(choices) is a guess.
  """
  nats = [answer.nats for answer in answers]
  per_byte = [value / len(text.encode()) for value, text in zip(nats, choices, strict=True)]
  highest = max(nats)
  total = highest + math.log(sum(math.exp(value - highest) for value in nats))
  return {
    'accuracy': float(nats.index(highest) == right),
    'accuracy_per_byte': float(per_byte.index(max(per_byte)) == right),
    'choice_nats': total - nats[right],
  }
