"""Feedback of another model: a judge says which of two completions is the better answer (RLAIF).

Bai et al. (2022), arXiv:2212.08073; Lee et al. (2023), arXiv:2309.00267.
"""

import concurrent.futures
import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from research.core.errors import Invalid, UserError
from research.inference.request import Completion
from research.reinforcement.chat_client import Endpoint
from research.reinforcement.prompts import Prompt
from research.reinforcement.reward import Reward

QUESTION = """Which of two answers to a prompt is better? {principle}

Prompt:
{prompt}

Answer A:
{first}

Answer B:
{second}

Reply with one letter alone: A, B, or C if neither is better or you cannot tell."""
# What the first answer is worth by the judge's letter.
WORTH = {'A': 1.0, 'B': 0.0, 'C': 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(Reward):
  """The share of comparisons that a completion wins, by a judge behind an OpenAI-compatible endpoint.

  Every pair is shown in both orders. Where the judge prefers the same place twice, it prefers no answer: the
  comparison counts for nothing, and a completion without any that counts is abstained on.

  Attributes:
    url: up to and with /v1, such as 'http://localhost:8000/v1'.
    model: the judge's name there.
    principle: what makes an answer better, a sentence or a constitution.
    against: 'others', the next completion of the same prompt; or 'target', the text that the prompts' file
      gives.
    question: what is asked, with {principle}, {prompt}, {first} and {second}; the reply is A, B or C.
    key: the environment variable that holds the key; None where none is needed.
    seconds, tries, wait: as of `Endpoint`.
    parallel: questions at a time.
    nonsense: the largest share of replies, of one round, that may be no verdict. They count for nothing.
  """

  url: str
  model: str
  principle: str = 'The better one is correct, helpful and harmless.'
  against: str = 'others'
  question: str = QUESTION
  key: str | None = None
  seconds: float = 60.0
  tries: int = 5
  wait: float = 1.0
  parallel: int = 8
  nonsense: float = 0.1

  def __post_init__(self):
    if not re.match(r'https?://', self.url):
      raise Invalid(Judge, 'url', f"{self.url!r} is no address such as 'http://localhost:8000/v1'.")
    if self.against not in ('others', 'target'):
      raise Invalid(Judge, 'against', f"{self.against!r} is neither 'others' nor 'target'.")
    for field in ('seconds', 'tries', 'parallel'):
      if not getattr(self, field) > 0:
        raise Invalid(Judge, field, f'{getattr(self, field)!r} must be above 0.')
    if not 0 <= self.nonsense < 1:
      raise Invalid(Judge, 'nonsense', f'{self.nonsense!r} must be from 0 to under 1.')
    for name in ('{prompt}', '{first}', '{second}'):
      if name not in self.question:
        raise Invalid(Judge, 'question', f'it does not say where {name} goes.')

  def described(self) -> dict:
    """What stands in a run's identity: who judges by what, and not where it answers or how long we wait."""
    fields = ('model', 'principle', 'against', 'question', 'nonsense')
    return {name: getattr(self, name) for name in fields}

  def __call__(self, prompts, completions):
    pairs = self._pairs(prompts, completions)
    questions = []
    for prompt, first, second, _ in pairs:
      questions += [self._ask(prompt, first, second), self._ask(prompt, second, first)]
    endpoint = Endpoint(self.url, self.model, self.key, self.seconds, self.tries, self.wait)
    with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
      try:
        replies = list(pool.map(endpoint.ask, questions))
      except UserError:
        pool.shutdown(cancel_futures=True)
        raise
    worth = self._read(replies)
    wins: list[list[float]] = [[] for _ in completions]
    for (_, _, _, numbers), forward, backward in zip(pairs, worth[::2], worth[1::2], strict=True):
      if forward is None or backward is None or forward != 1 - backward:
        continue
      for number, value in zip(numbers, (forward, 1 - forward), strict=False):
        wins[number].append(value)
    return np.array([np.mean(each) if each else np.nan for each in wins])

  def _ask(self, prompt: str, first: str, second: str) -> str:
    texts = {'principle': self.principle, 'prompt': prompt, 'first': first, 'second': second}
    # One pass, so that a completion with '{second}' in it is a text like any other.
    return re.sub(r'\{(principle|prompt|first|second)\}', lambda m: texts[m[1]], self.question)

  def _pairs(
    self, prompts: Sequence[Prompt], completions: Sequence[Completion]
  ) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(prompt, first answer, second answer, numbers of the completions among them)."""
    if self.against == 'target':
      for prompt in prompts:
        if not isinstance(prompt.target, str):
          why = (
            f'a prompt has the target {prompt.target!r}, and a text is wanted (PromptLines.target).'
          )
          raise Invalid(Judge, 'against', why)
      return [
        (p.text, c.text, p.target, (i,))
        for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
      ]
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
      groups.setdefault(prompt.text, []).append(i)
    pairs = []
    for text, numbers in groups.items():
      if len(numbers) < 2:
        why = 'a prompt has one completion, and no other to compare it with: raise Rollouts.group.'
        raise Invalid(Judge, 'against', why)
      # In a ring, so that each is compared twice. Of two, once.
      after = [*numbers[1:], numbers[0]] if len(numbers) > 2 else numbers[1:]
      for i, j in zip(numbers, after, strict=False):
        pairs.append((text, completions[i].text, completions[j].text, (i, j)))
    return pairs

  def _read(self, replies: list[str]) -> list[float | None]:
    """What each first answer is worth; None where the reply is no verdict."""
    worth = []
    wrong = []
    for reply in replies:
      letter = re.fullmatch(r'\W*(?:answer\W+)?([ABC])\W*', reply.strip(), re.I)
      if letter is None:
        wrong.append(reply)
      worth.append(WORTH[letter[1].upper()] if letter else None)
    if len(wrong) > self.nonsense * len(replies):
      raise UserError(
        f'{len(wrong)} of {len(replies)} replies of the judge {self.model} are neither A, B nor C, such as '
        f'{wrong[0][:80]!r}: ask it otherwise (Judge.question), use another judge, or allow more '
        '(Judge.nonsense).'
      )
    return worth
