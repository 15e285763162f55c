"""Functions to complete as prompts, and the reward of running them against their tests."""

import concurrent.futures
import dataclasses
import functools
import os
import random

import numpy as np

from research.core.errors import Invalid
from research.evaluation.code_problems import CodeProblem, own_problems, read_problems
from research.evaluation.code_tasks import passes
from research.evaluation.sandbox import Limits
from research.reinforcement.prompts import Prompt, Prompts
from research.reinforcement.reward import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeProblems(Prompts):
  """Heads of functions with their docstrings, in an order that every pass shuffles anew.

  Attributes:
    file: JSON lines with HumanEval's fields; None is this project's own problems.
  """

  file: str | None = None

  @property
  def name(self) -> str:
    return 'functions'

  @functools.cached_property
  def lines(self) -> list[Prompt]:
    """All problems, as prompts."""
    problems = own_problems() if self.file is None else read_problems(self.file)
    return [Prompt(problem.prompt, problem) for problem in problems]

  def described(self) -> dict:
    """What stands in a run's identity: the problems, and not where their file lies."""
    return {'problems': [prompt.target for prompt in self.lines]}

  def at(self, seed: int, index: int) -> Prompt:
    epoch, place = divmod(index, len(self.lines))
    order = list(range(len(self.lines)))
    random.Random(f'{seed} {epoch}').shuffle(order)
    return self.lines[order[place]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnitTests(Reward):
  """1 where a completed function passes the tests of its problem, in a sandbox; else 0.

  Attributes:
    limits: of each program (`evaluation.sandbox`).
  """

  limits: Limits = dataclasses.field(default_factory=Limits)

  def __call__(self, prompts, completions):
    for prompt in prompts:
      if not isinstance(prompt.target, CodeProblem):
        why = (
          'unit tests are those of a code problem: set Rollouts.prompts = @programs.CodeProblems().'
        )
        raise Invalid(UnitTests, 'limits', why)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
      passed = pool.map(
        lambda pair: passes(pair[0].target, pair[1].text, self.limits),
        zip(prompts, completions, strict=True),
      )
      return np.array(list(passed), np.float64)
