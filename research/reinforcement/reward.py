"""Rewards: they score completions of prompts."""

import abc
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from research.core.errors import Invalid
from research.inference.request import Completion
from research.reinforcement.prompts import Prompt


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reward(abc.ABC):
  """Base of the rewards. A reward of your own is a subclass in any module that the gin file imports."""

  @abc.abstractmethod
  def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> np.ndarray:
    """The scores, float [completions]; NaN where the reward abstains.

    Args:
      prompts: the prompt of each completion.
      completions: `text` is without the stop; `finish` is 'stop_token', or 'length' where it was cut off.

    Raises:
      UserError: it cannot judge. A failure is never a score of 0.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Reward):
  """A verifier: 1 where a completion stops by itself and its answer equals the target's, else 0.

  Attributes:
    after: the answer is the text after the last `after`, such as ']' of a chain of thought; None for the whole
      text.
  """

  after: str | None = None

  def __call__(self, prompts, completions):
    pairs = zip(prompts, completions, strict=True)
    return np.array([self._is_right(prompt.target, c) for prompt, c in pairs], np.float64)

  def _is_right(self, target, completion: Completion) -> bool:
    # The target is a `Problem` of a generated task, or an answer from a file.
    answer = getattr(target, 'answer', target)
    if not isinstance(answer, str | int):
      why = (
        f'a prompt has the target {target!r}, not an answer: name its field by PromptLines.target.'
      )
      raise Invalid(Answer, 'after', why)
    text = completion.text
    if self.after is not None:
      text = text.rpartition(self.after)[2]
    return completion.finish == 'stop_token' and text.strip() == str(answer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format(Reward):
  """1 where the whole completion matches a regular expression, else 0.

  Attributes:
    pattern: such as r'\\[.*\\]\\d+' for steps in brackets before a number.
  """

  pattern: str

  def __post_init__(self):
    try:
      re.compile(self.pattern)
    except re.error as error:
      why = f'{self.pattern!r} is not a regular expression: {error}.'
      raise Invalid(Format, 'pattern', why) from None

  def __call__(self, prompts, completions):
    matches = [re.fullmatch(self.pattern, completion.text, re.S) for completion in completions]
    return np.array([match is not None for match in matches], np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Reward):
  """A weighted sum of rewards. It abstains where one of them does.

  Attributes:
    parts: the rewards.
    weights: one for each reward.
  """

  parts: tuple[Reward, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    object.__setattr__(self, 'parts', tuple(self.parts))  # gin may bind lists
    object.__setattr__(self, 'weights', tuple(self.weights))
    if not self.parts or not all(isinstance(part, Reward) for part in self.parts):
      raise Invalid(Sum, 'parts', 'must be rewards: (@reward.Answer(),) with their parentheses.')
    if len(self.parts) != len(self.weights):
      why = f'{len(self.weights)} weights for {len(self.parts)} rewards: give one each.'
      raise Invalid(Sum, 'weights', why)

  def __call__(self, prompts, completions):
    scores = [part(prompts, completions) for part in self.parts]
    return sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
