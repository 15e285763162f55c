"""What a completion is worth: a reward is a gin part, and calling it scores completions."""

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
  """Base of the rewards. One of your own is a class like these in a module of your own."""

  @abc.abstractmethod
  def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> np.ndarray:
    """The scores, float [completions]; NaN where it abstains.

    Args:
      prompts: of each completion.
      completions: `text` is without the stop; `finish` is 'stop_token', or 'length' where it was cut off.

    Raises:
      UserError: it cannot judge. Nothing is scored 0 for that.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(Reward):
  """1 where a completion ends and gives the target's answer exactly, else 0: a verifier.

  Attributes:
    after: the answer is what follows the last of these, as ']' of a chain of thought; None for the whole text.
  """

  after: str | None = None

  def __call__(self, prompts, completions):
    return np.array(
      [self._is_right(p.target, c) for p, c in zip(prompts, completions, strict=True)], np.float64
    )

  def _is_right(self, target, completion: Completion) -> bool:
    # A `Problem` of a generated task, or the text that a file gives.
    answer = getattr(target, 'answer', target)
    if not isinstance(answer, str | int):
      why = f'a prompt has the target {target!r}; an answer is wanted (PromptLines.target names its field).'
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
      raise Invalid(
        Format, 'pattern', f'{self.pattern!r} is no regular expression: {error}.'
      ) from None

  def __call__(self, prompts, completions):
    return np.array(
      [bool(re.fullmatch(self.pattern, c.text, re.S)) for c in completions], np.float64
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum(Reward):
  """A weighted sum of rewards; it abstains where one of them does.

  Attributes:
    parts: the rewards.
    weights: of each.
  """

  parts: tuple[Reward, ...]
  weights: tuple[float, ...]

  def __post_init__(self):
    object.__setattr__(self, 'parts', tuple(self.parts))
    object.__setattr__(self, 'weights', tuple(self.weights))
    if not self.parts or not all(isinstance(part, Reward) for part in self.parts):
      raise Invalid(Sum, 'parts', 'must be rewards: (@reward.Answer(),) with their parentheses.')
    if len(self.parts) != len(self.weights):
      why = f'{len(self.weights)} weights for {len(self.parts)} rewards: give one each.'
      raise Invalid(Sum, 'weights', why)

  def __call__(self, prompts, completions):
    scores = [part(prompts, completions) for part in self.parts]
    return sum(weight * score for weight, score in zip(self.weights, scores, strict=True))
