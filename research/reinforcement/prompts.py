"""The prompts of reinforcement learning: endless sequences, where a prompt follows from its number alone."""

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

SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt, with the target that a reward needs to judge its completions (a `Problem`, an answer, tests)."""

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
  def draw(self, seed: int, index: int) -> Prompt:
    """Prompt `index` of the sequence of a seed. It is the same in every process."""


def is_held_out(text: str, fraction: float) -> bool:
  """Whether a problem belongs to the held-out fraction, by a hash of its text: the same in every process."""
  digest = hashlib.sha256(text.encode()).digest()
  return int.from_bytes(digest[:8], 'big') < fraction * 2**64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problems(Prompts):
  """Problems of a generated task, without shots; the target is the `Problem`.

  Attributes:
    task: such as @generated_tasks.Arithmetic(). Its `examples` and `seed` have no effect.
    held_out: the fraction of all problems that the split 'train' leaves out.
    split: 'train', or 'validation' for the held-out problems.
  """

  task: Generated
  held_out: float = 0.1
  split: str = 'train'

  def __post_init__(self):
    if not isinstance(self.task, Generated):
      why = (
        f'{self.task!r} is not a generated task: bind one, such as @generated_tasks.Arithmetic().'
      )
      raise Invalid(Problems, 'task', why)
    if self.task.shots:
      raise Invalid(Problems, 'task', 'these prompts have no shots: set its shots to 0.')
    if self.split not in SPLITS:
      raise Invalid(Problems, 'split', f'{self.split!r} is not one of {", ".join(SPLITS)}.')
    if not 0 <= self.held_out < 1 or (self.split == 'validation' and not self.held_out):
      why = f'{self.held_out!r} must be from 0 to under 1, and above 0 for the split validation.'
      raise Invalid(Problems, 'held_out', why)

  @property
  def name(self) -> str:
    return self.task.name

  def draw(self, seed: int, index: int) -> Prompt:
    rng = random.Random(f'{self.split} {seed} {index}')
    # Problems are drawn until one is of this split.
    for _ in range(10_000):
      problem = self.task.problem(rng)
      if is_held_out(problem.question, self.held_out) == (self.split == 'validation'):
        return Prompt(problem.question, problem)
    why = f'none of 10,000 problems of {self.task.name} is in the split {self.split!r}.'
    raise Invalid(Problems, 'held_out', why)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLines(Prompts):
  """The prompts of a JSON-lines file, shuffled anew in every epoch.

  Attributes:
    file: its path.
    prompt: the field of the prompt.
    target: the field of the target that a reward compares with; None where the reward needs none.
  """

  file: str
  prompt: str = 'prompt'
  target: str | None = None

  def described(self) -> dict:
    """The fields of a run's identity: the file's content instead of its path."""
    fields = {'prompt': self.prompt, 'target': self.target}
    return {'sha256': hashlib.sha256(self._text.encode()).hexdigest(), **fields}

  @property
  def name(self) -> str:
    return pathlib.Path(self.file).stem

  @functools.cached_property
  def _text(self) -> str:
    """The file's text, read once: every prompt and the run's identity come from it."""
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
    fields = [field for field in (self.prompt, self.target) if field is not None]
    for field in fields:
      if not isinstance(record, dict) or field not in record:
        raise UserError(f'{where}: this line is not an object with {field!r}.')
    text = record[self.prompt]
    if not isinstance(text, str) or not text:
      raise UserError(f'{where}: {self.prompt!r} must be a text, and not empty.')
    return Prompt(text, record[self.target] if self.target else None)

  def draw(self, seed: int, index: int) -> Prompt:
    return shuffled(self.lines, seed, index)


def shuffled(prompts: list[Prompt], seed: int, index: int) -> Prompt:
  """Prompt `index` of an endless sequence of epochs, each of which has all prompts in another order."""
  epoch, position = divmod(index, len(prompts))
  return prompts[_order(len(prompts), seed, epoch)[position]]


# A round may lie in two epochs.
@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
  order = list(range(count))
  random.Random(f'{seed} {epoch}').shuffle(order)
  return order
