"""What a policy is asked as it learns: an endless order of prompts, each a function of its number alone."""

import abc
import dataclasses
import functools
import hashlib
import json
import pathlib
import random
from typing import Any

from research.core.errors import Invalid, UserError
from research.evaluation.generated_tasks import Generated


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, and what a reward needs to judge its completions (a `Problem`, an answer, tests)."""

  text: str
  target: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompts(abc.ABC):
  """Base of the sources of prompts."""

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """A short name for rows."""

  @abc.abstractmethod
  def at(self, seed: int, index: int) -> Prompt:
    """Prompt `index` of the endless order that belongs to a seed."""


def is_held_out(text: str, fraction: float) -> bool:
  """Whether a problem is one of the held-out fraction, by a hash of its text: the same in every program."""
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < fraction * 2**64


SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems(Prompts):
  """Problems of a generated task, without shots; the target is the `Problem`.

  Attributes:
    task: such as @generated_tasks.Arithmetic(). Its `examples` and `seed` are not used.
    held_out: the fraction of all problems that is never asked in the split 'train'.
    split: 'train', or 'validation' for the held-out problems alone.
  """

  task: Generated
  held_out: float = 0.1
  split: str = 'train'

  def __post_init__(self):
    if not isinstance(self.task, Generated):
      why = f'{self.task!r} is no generated task, such as @generated_tasks.Arithmetic().'
      raise Invalid(Problems, 'task', why)
    if self.task.shots:
      raise Invalid(Problems, 'task', 'a policy is asked without shots: set its shots to 0.')
    if self.split not in SPLITS:
      raise Invalid(Problems, 'split', f'{self.split!r} is not one of {", ".join(SPLITS)}.')
    if not 0 <= self.held_out < 1 or (self.split == 'validation' and not self.held_out):
      why = f'{self.held_out!r} must lie between 0 and 1; 0 holds out none, and has no validation.'
      raise Invalid(Problems, 'held_out', why)

  @property
  def name(self) -> str:
    return self.task.name

  def at(self, seed: int, index: int) -> Prompt:
    chance = random.Random(f'{self.split} {seed} {index}')
    for _ in range(10_000):
      problem = self.task.problem(chance)
      if is_held_out(problem.question, self.held_out) == (self.split == 'validation'):
        return Prompt(problem.question, problem)
    why = f'none of 10,000 problems of {self.task.name} is in the split {self.split!r}.'
    raise Invalid(Problems, 'held_out', why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLines(Prompts):
  """A JSON object with a prompt on every line, in an order that every pass shuffles anew.

  Attributes:
    file: its path.
    prompt: the field of the prompt.
    target: the field of what a reward compares with; None where a reward needs none.
  """

  file: str
  prompt: str = 'prompt'
  target: str | None = None

  def described(self) -> dict:
    """What stands in a run's identity: what the file holds, and not where it lies."""
    fields = {'prompt': self.prompt, 'target': self.target}
    return {'sha256': hashlib.sha256(self._text.encode()).hexdigest(), **fields}

  @property
  def name(self) -> str:
    return pathlib.Path(self.file).stem

  @functools.cached_property
  def _text(self) -> str:
    try:
      return pathlib.Path(self.file).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
      raise Invalid(PromptLines, 'file', f'{self.file} cannot be read ({error}).') from None

  @functools.cached_property
  def lines(self) -> list[Prompt]:
    """All prompts of the file.

    Raises:
      UserError: a line lacks a field, or there is no line.
    """
    prompts = []
    for number, line in enumerate(self._text.splitlines(), 1):
      if line.strip():
        prompts.append(self._read(line, f'{self.file}:{number}'))
    if not prompts:
      raise Invalid(PromptLines, 'file', f'{self.file} has no prompts.')
    return prompts

  def _read(self, line: str, where: str) -> Prompt:
    try:
      record = json.loads(line)
    except ValueError as error:
      raise UserError(f'{where}: not JSON ({error}).') from None
    wanted = [field for field in (self.prompt, self.target) if field is not None]
    for field in wanted:
      if not isinstance(record, dict) or field not in record:
        raise UserError(f'{where}: an object with {field!r} is wanted here.')
    text = record[self.prompt]
    if not isinstance(text, str) or not text:
      raise UserError(f'{where}: {self.prompt!r} must be a text that is not empty.')
    return Prompt(text, record[self.target] if self.target else None)

  def at(self, seed: int, index: int) -> Prompt:
    epoch, place = divmod(index, len(self.lines))
    return self.lines[_order(len(self.lines), seed, epoch)[place]]


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
  order = list(range(count))
  random.Random(f'{seed} {epoch}').shuffle(order)
  return order
