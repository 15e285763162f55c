"""Feedback of another model: a judge compares two completions (reinforcement learning from AI feedback).

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
# The score of the first answer by the judge's letter.
SCORE_OF_A = {'A': 1.0, 'B': 0.0, 'C': 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judge(Reward):
  """The share of comparisons that a completion wins, by a judge behind an OpenAI-compatible endpoint.

  The judge sees every pair in both orders. If it prefers the same position twice, the comparison does not
  count. Where no comparison of a completion counts, the reward abstains.

  Attributes:
    url: of the API, such as 'http://localhost:8000/v1'.
    model: the judge's name there.
    principle: what makes an answer better, a sentence or a constitution.
    against: 'others' compares with the next completion of the same prompt, 'target' with the target of the
      prompt.
    question: the judge's prompt, with {principle}, {prompt}, {first} and {second}; the reply is A, B or C.
    key: the environment variable that holds the key; None where none is needed.
    seconds, tries, wait: as in `Endpoint`.
    parallel: how many questions are open at a time.
    nonsense: the largest share of a round's replies that may be none of A, B and C. Those replies do not count.
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
      why = f"{self.url!r} is not an address such as 'http://localhost:8000/v1'."
      raise Invalid(Judge, 'url', why)
    if self.against not in ('others', 'target'):
      raise Invalid(Judge, 'against', f"{self.against!r} is neither 'others' nor 'target'.")
    for field in ('seconds', 'tries', 'parallel'):
      if not getattr(self, field) > 0:
        raise Invalid(Judge, field, f'{getattr(self, field)!r} must be above 0.')
    if not 0 <= self.nonsense < 1:
      raise Invalid(Judge, 'nonsense', f'{self.nonsense!r} must be from 0 to under 1.')
    for name in ('{prompt}', '{first}', '{second}'):
      if name not in self.question:
        raise Invalid(Judge, 'question', f'it lacks {name}.')

  def described(self) -> dict:
    """The fields of a run's identity: those that change verdicts, without the address and the waits."""
    fields = ('model', 'principle', 'against', 'question', 'nonsense')
    return {name: getattr(self, name) for name in fields}

  def __call__(self, prompts, completions):
    pairs = self._pairs(prompts, completions)
    questions = []
    for prompt, first, second, _ in pairs:
      questions.append(self._question(prompt, first, second))
      questions.append(self._question(prompt, second, first))
    scores = self._read(self._ask(questions))
    scores_of: list[list[float]] = [[] for _ in completions]
    for pair, forward, backward in zip(pairs, scores[::2], scores[1::2], strict=True):
      # A judge that names the same position in both orders prefers a position, not an answer.
      if forward is None or backward is None or forward != 1 - backward:
        continue
      # The second answer may be a target, which is no completion.
      for number, score in zip(pair[3], (forward, 1 - forward), strict=False):
        scores_of[number].append(score)
    return np.array([np.mean(each) if each else np.nan for each in scores_of])

  def _ask(self, questions: list[str]) -> list[str]:
    """The judge's replies."""
    endpoint = Endpoint(self.url, self.model, self.key, self.seconds, self.tries, self.wait)
    with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
      try:
        return list(pool.map(endpoint.ask, questions))
      except UserError:
        # Without this, every other question would make all its attempts first.
        pool.shutdown(cancel_futures=True)
        raise

  def _question(self, prompt: str, first: str, second: str) -> str:
    texts = {'principle': self.principle, 'prompt': prompt, 'first': first, 'second': second}

    def text_of(match: re.Match) -> str:
      return texts[match[1]]

    # All at once: a completion that contains '{second}' must stay as it is.
    return re.sub(r'\{(principle|prompt|first|second)\}', text_of, self.question)

  def _pairs(
    self, prompts: Sequence[Prompt], completions: Sequence[Completion]
  ) -> list[tuple[str, str, str, tuple[int, ...]]]:
    """(prompt, first answer, second answer, numbers of the completions among them)."""
    if self.against == 'target':
      for prompt in prompts:
        if not isinstance(prompt.target, str):
          why = f'a prompt has the target {prompt.target!r}, not a text: name its field by PromptLines.target.'
          raise Invalid(Judge, 'against', why)
      both = zip(prompts, completions, strict=True)
      return [(p.text, c.text, p.target, (i,)) for i, (p, c) in enumerate(both)]
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
      groups.setdefault(prompt.text, []).append(i)
    pairs = []
    for text, numbers in groups.items():
      if len(numbers) < 2:
        why = 'a prompt has only one completion, so there is no other to compare with: raise Rollouts.group.'
        raise Invalid(Judge, 'against', why)
      # In a ring, so that each completion is in two comparisons. A ring of two would have the same one twice.
      following = [*numbers[1:], numbers[0]] if len(numbers) > 2 else numbers[1:]
      for i, j in zip(numbers, following, strict=False):
        pairs.append((text, completions[i].text, completions[j].text, (i, j)))
    return pairs

  def _read(self, replies: list[str]) -> list[float | None]:
    """The score of the first answer by each reply; None where the reply is none of A, B and C.

    Raises:
      UserError: there are too many such replies.
    """
    scores = []
    wrong = []
    for reply in replies:
      letter = re.fullmatch(r'\W*(?:answer\W+)?([ABC])\W*', reply.strip(), re.I)
      if letter is None:
        wrong.append(reply)
      scores.append(SCORE_OF_A[letter[1].upper()] if letter else None)
    if len(wrong) > self.nonsense * len(replies):
      raise UserError(
        f'{len(wrong)} of {len(replies)} replies of the judge {self.model} are neither A, B nor C, such as '
        f'{wrong[0][:80]!r}: change Judge.question, use another judge, or raise Judge.nonsense.'
      )
    return scores
