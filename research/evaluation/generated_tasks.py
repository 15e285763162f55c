"""Generated tasks: arithmetic, copying, sorting, modular arithmetic, brackets.

Every problem has a question, an answer, and the steps from the question to the answer. A task asks for the
answer directly or after the steps (a chain of thought), with or without solved examples (shots) before the
question.
"""

import abc
import dataclasses
import random
import string

from research.core.errors import Invalid
from research.evaluation.requests import GenerateUntil, LogLikelihood
from research.evaluation.task import Item, Task

MODES = ('direct', 'chain')


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question such as '12+34=', steps such as '2+4=6,1+3=4', and the answer, '46'."""

  question: str
  steps: str
  answer: str

  def completion(self, mode: str) -> str:
    """The right text after the question. In the mode 'chain' the steps stand in brackets before the answer."""
    return self.answer if mode == 'direct' else f'[{self.steps}]{self.answer}'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated(Task):
  """Base of the generated tasks.

  Attributes:
    mode: 'direct', or 'chain' for the steps before the answer.
    shots: solved problems before the question, a line each. They differ from the item's problem.
  """

  mode: str = 'direct'
  shots: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.mode not in MODES:
      raise Invalid(type(self), 'mode', f'{self.mode!r} is not one of {", ".join(MODES)}.')
    if self.shots < 0:
      raise Invalid(type(self), 'shots', f'{self.shots!r} must be 0 or more.')

  @property
  def name(self) -> str:
    return f'{self.kind()}-{self.shots}shot-{self.mode}'

  @abc.abstractmethod
  def kind(self) -> str:
    """The task's name without shots and mode."""

  @abc.abstractmethod
  def problem(self, rng: random.Random) -> Problem:
    """A random problem."""

  def lines(self, count: int, seed: int) -> list[str]:
    """Solved problems as lines of text, in this task's mode: text to train on."""
    rng = random.Random(seed)
    problems = [self.problem(rng) for _ in range(count)]
    return [f'{problem.question}{problem.completion(self.mode)}\n' for problem in problems]

  def items(self) -> list[Item]:
    rng = random.Random(self.seed)
    return [self.item(rng) for _ in range(self.examples)]

  def item(self, rng: random.Random) -> Item:
    """A problem after its shots."""
    problem = self.problem(rng)
    context = ''
    for _ in range(self.shots):
      shot = self.problem(rng)
      # A small task may have few problems, so that an equal one is accepted after 20 tries.
      for _ in range(20):
        if shot.question != problem.question:
          break
        shot = self.problem(rng)
      context += f'{shot.question}{shot.completion(self.mode)}\n'
    context += problem.question
    completion = problem.completion(self.mode) + '\n'
    requests = [LogLikelihood(context, completion, alone=True)]
    if self.mode == 'chain':
      # Twice as many tokens as the right chain has bytes, because a wrong one may be longer.
      requests.append(GenerateUntil(context, ('\n',), 2 * len(completion.encode())))
    return Item(tuple(requests), problem)

  def measure(self, item, answers):
    """See `Task.measure`.

    Returns:
      accuracy: whether the answer is exactly right.
      nats, nats_per_token: -ln p of the whole right completion, the smooth metrics beside it.
      chain: whether the right chain is the greedy completion (in the mode 'chain').
    """
    likelihood = answers[0]
    measures = {
      'nats': -likelihood.nats,
      'nats_per_token': -likelihood.nats / likelihood.tokens,
    }
    # Greedy decoding writes the right answer exactly where each of its tokens is the likeliest.
    if self.mode == 'direct':
      return {'accuracy': float(likelihood.greedy), **measures}
    generated = answers[1]
    right = generated.stopped and generated.text.rpartition(']')[2] == item.target.answer
    return {'accuracy': float(right), 'chain': float(likelihood.greedy), **measures}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arithmetic(Generated):
  """a+b= or a-b= of numbers with `digits` digits. The steps are the columns from the right, with carries."""

  digits: int = 2
  operation: str = '+'

  def __post_init__(self):
    super().__post_init__()
    if self.operation not in ('+', '-'):
      raise Invalid(Arithmetic, 'operation', f"{self.operation!r} is not '+' or '-'.")
    _positive(self, digits=self.digits)

  def kind(self) -> str:
    return f'{"addition" if self.operation == "+" else "subtraction"}-{self.digits}digits'

  def problem(self, rng: random.Random) -> Problem:
    low = 10 ** (self.digits - 1) if self.digits > 1 else 0  # no leading zeros
    a = rng.randrange(low, 10**self.digits)
    b = rng.randrange(low, 10**self.digits)
    if self.operation == '-':
      a, b = max(a, b), min(a, b)  # no negative answers
    steps = []
    carry = 0
    for i in range(self.digits):
      x = a // 10**i % 10
      y = b // 10**i % 10
      column = x + y + carry if self.operation == '+' else x - y - carry
      carried = f'{self.operation}{carry}' if carry else ''
      steps.append(f'{x}{self.operation}{y}{carried}={column}')
      # Of a subtraction the carry is a borrow, and a column may be negative.
      carry = int(column > 9) if self.operation == '+' else int(column < 0)
    answer = a + b if self.operation == '+' else a - b
    return Problem(f'{a}{self.operation}{b}=', ','.join(steps), str(answer))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularArithmetic(Generated):
  """(a+b)%m= of numbers below the modulus m. The steps are the sum before the remainder is taken."""

  modulus: int = 7

  def __post_init__(self):
    super().__post_init__()
    _positive(self, modulus=self.modulus)

  def kind(self) -> str:
    return f'modular-addition-{self.modulus}'

  def problem(self, rng: random.Random) -> Problem:
    a = rng.randrange(self.modulus)
    b = rng.randrange(self.modulus)
    return Problem(f'({a}+{b})%{self.modulus}=', f'{a}+{b}={a + b}', str((a + b) % self.modulus))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copying(Generated):
  """Repeats a word of `length` letters. The steps number its letters."""

  length: int = 5

  def __post_init__(self):
    super().__post_init__()
    _positive(self, length=self.length)

  def kind(self) -> str:
    return f'copying-{self.length}'

  def problem(self, rng: random.Random) -> Problem:
    word = _random_word(rng, self.length)
    steps = ','.join(f'{i + 1}{letter}' for i, letter in enumerate(word))
    return Problem(f'copy {word}:', steps, word)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sorting(Generated):
  """The letters of a word in alphabetical order. The steps insert its letters one by one."""

  length: int = 5

  def __post_init__(self):
    super().__post_init__()
    _positive(self, length=self.length)

  def kind(self) -> str:
    return f'sorting-{self.length}'

  def problem(self, rng: random.Random) -> Problem:
    word = _random_word(rng, self.length)
    steps = [''.join(sorted(word[: i + 1])) for i in range(len(word))]
    return Problem(f'sort {word}:', ','.join(steps), steps[-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Brackets(Generated):
  """The brackets that close a row of `length` or more brackets (Dyck-2).

  The steps are the stack of open brackets after each bracket of the row.
  """

  length: int = 8

  def __post_init__(self):
    super().__post_init__()
    _positive(self, length=self.length)

  def kind(self) -> str:
    return f'brackets-{self.length}'

  def problem(self, rng: random.Random) -> Problem:
    # No square brackets: they stand around the steps.
    closing = {'(': ')', '<': '>'}
    row = ''
    stack = ''
    steps = []
    while len(row) < self.length or not stack:  # a closed row has no answer
      opens = not stack or rng.random() < 0.6  # more opening than closing ones, so that stacks grow
      bracket = rng.choice('(<') if opens else closing[stack[-1]]
      row += bracket
      stack = stack + bracket if opens else stack[:-1]
      steps.append(stack or '-')
    answer = ''.join(closing[bracket] for bracket in reversed(stack))
    return Problem(f'close {row}:', ','.join(steps), answer)


def _random_word(rng: random.Random, length: int) -> str:
  return ''.join(rng.choice(string.ascii_lowercase) for _ in range(length))


def _positive(task: Task, **fields: int) -> None:
  for field, value in fields.items():
    if value < 1:
      raise Invalid(type(task), field, f'{value!r} must be positive.')
