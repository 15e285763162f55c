"""Functions to complete as prompts, and the reward of passing their unit tests."""

import dataclasses
import functools

import numpy as np

from research.core.errors import Invalid
from research.evaluation.code_problems import CodeProblem, builtin_problems, read_problems
from research.evaluation.code_tasks import run_tests
from research.evaluation.sandbox import Limits
from research.reinforcement.prompts import Prompt, Prompts, shuffled
from research.reinforcement.reward import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeProblems(Prompts):
  """Signatures of functions with their docstrings, shuffled anew in every epoch.

  Attributes:
    file: JSON lines with HumanEval's fields; None is `code_problems.builtin_problems`.
  """

  file: str | None = None

  @property
  def name(self) -> str:
    return 'functions'

  @functools.cached_property
  def lines(self) -> list[Prompt]:
    """All problems as prompts."""
    problems = builtin_problems() if self.file is None else read_problems(self.file)
    return [Prompt(problem.prompt, problem) for problem in problems]

  def described(self) -> dict:
    """The fields of a run's identity: the problems instead of their file's path."""
    return {'problems': [prompt.target for prompt in self.lines]}

  def draw(self, seed: int, index: int) -> Prompt:
    return shuffled(self.lines, seed, index)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitTests(Reward):
  """1 where a completed function passes its problem's tests in a sandbox, else 0.

  Attributes:
    limits: of each program (`evaluation.sandbox`).
  """

  limits: Limits = dataclasses.field(default_factory=Limits)

  def __call__(self, prompts, completions):
    for prompt in prompts:
      if not isinstance(prompt.target, CodeProblem):
        why = 'only a code problem has unit tests: set Rollouts.prompts = @programs.CodeProblems().'
        raise Invalid(UnitTests, 'limits', why)
    problems = [prompt.target for prompt in prompts]
    texts = [completion.text for completion in completions]
    return np.array(run_tests(problems, texts, self.limits), np.float64)
