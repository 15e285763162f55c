"""Two-digit sums: the documents to train on, and the task that asks for sums that no document has.

A tenth of all pairs of numbers is held out, in both orders. A sum ends in '=' where its answer follows at once,
and in ':' where the columns stand before it, so that the question alone says which is wanted.
"""

import dataclasses
import random
import re
from collections.abc import Iterable
from typing import ClassVar

from research.core.errors import Invalid
from research.data.corpora import Corpus
from research.evaluation.generated_tasks import Arithmetic, Problem
from research.evaluation.requests import LogLikelihood
from research.evaluation.task import Item
from research.reinforcement.prompts import is_held_out

MODES = ('direct', 'chain')
SHOTS = (0, 1, 4)
HELD_OUT = 0.1  # of all pairs of numbers
MOST_LINES = 6  # of a document; a question has at most four solved ones before it
# The most frequent sum, 109, is right for 90 of the 8,100 pairs: what a model without addition reaches at best.
GUESS = 90 / 8100
IN_TEXT = re.compile(rb'(?<!\d)(\d\d)\+(\d\d)[=:]')


def held_out(a: int, b: int) -> bool:
  """Whether a pair of numbers, in either order, is in no text to train on."""
  return is_held_out(f'{min(a, b)}+{max(a, b)}', HELD_OUT)


def marked(problem: Problem, mode: str) -> Problem:
  """The problem with ':' in place of '=' at the end of its question in the mode 'chain'."""
  if mode == 'direct':
    return problem
  return dataclasses.replace(problem, question=problem.question.replace('=', ':'))


def pair_of(problem: Problem) -> tuple[int, int]:
  a, b = problem.question[:-1].split('+')
  return int(a), int(b)


def draw(task: Arithmetic, rng: random.Random, of_test: bool) -> Problem:
  """A random problem: one of those that are held out, or one of the others."""
  while held_out(*pair_of(problem := task.problem(rng))) != of_test:
    pass
  return problem


def count_in_text(text: bytes) -> tuple[int, int]:
  """(how many two-digit sums the text has, how many of them are held out)."""
  pairs = [(int(a), int(b)) for a, b in IN_TEXT.findall(text)]
  return len(pairs), sum(held_out(a, b) for a, b in pairs)


@dataclasses.dataclass(frozen=True)
class Sums(Corpus):
  """Documents of one to six solved sums, a line each; without the sums that are held out.

  Attributes:
    mode: 'direct', or 'chain' for the columns in brackets before the answer.
    lines: how many sums of the training split; the validation split has a hundredth.
    seed: of the sums.
  """

  mode: str = 'direct'
  lines: int = 100_000
  seed: int = 0
  name: ClassVar[str] = 'sums'

  def __post_init__(self):
    if self.lines < 1000:
      raise Invalid(Sums, 'lines', f'{self.lines!r} must be 1000 or more.')

  def documents(self) -> Iterable[tuple[str, str]]:
    """(split, text) of each document."""
    task = Arithmetic(mode=self.mode)
    rng = random.Random(f'{self.mode} {self.seed}')
    for split, lines in (('validation', self.lines // 100), ('train', self.lines)):
      while lines > 0:
        count = rng.randint(1, MOST_LINES)
        lines -= count
        problems = [marked(draw(task, rng, of_test=False), self.mode) for _ in range(count)]
        yield split, ''.join(f'{p.question}{p.completion(self.mode)}\n' for p in problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutSums(Arithmetic):
  """Sums that no document has, all different; the same sums for every mode and number of shots.

  The shots are sums of the training text. An answer counts where all of it is the greedy completion, with its
  columns in the mode 'chain', so that one reading of the right completion tells and nothing is generated.
  """

  def items(self) -> list[Item]:
    questions = random.Random(self.seed)
    of_shots = random.Random(self.seed + 1)
    found: dict[tuple[int, int], Item] = {}
    while len(found) < self.examples:
      problem = draw(self, questions, of_test=True)
      # As many are drawn for any number of shots, so that one shot is the last of four.
      shots = [draw(self, of_shots, of_test=False) for _ in range(max(SHOTS))]
      found.setdefault(pair_of(problem), self._item(problem, shots[max(SHOTS) - self.shots :]))
    return list(found.values())

  def _item(self, problem: Problem, shots: list[Problem]) -> Item:
    context = ''
    for shot in shots:
      shot = marked(shot, self.mode)
      context += f'{shot.question}{shot.completion(self.mode)}\n'
    problem = marked(problem, self.mode)
    completion = problem.completion(self.mode) + '\n'
    request = LogLikelihood(context + problem.question, completion, alone=True)
    return Item((request,), problem)

  def measure(self, item, answers):
    """See `Task.measure`.

    Returns:
      accuracy: whether the right completion is the greedy one.
      nats: -ln p of the right completion, with its columns in the mode 'chain'.
      nats_per_token: nats by bytes of the completion.
    """
    (likelihood,) = answers
    return {
      'accuracy': float(likelihood.greedy),
      'nats': -likelihood.nats,
      'nats_per_token': -likelihood.nats / likelihood.tokens,
    }
