"""Functions to complete, judged by running them: pass@k."""

import concurrent.futures
import dataclasses
import itertools
import os
import pathlib
import secrets
from collections.abc import Sequence

from research.core.errors import Invalid
from research.evaluation import sandbox
from research.evaluation.code_problems import CodeProblem, builtin_problems, read_problems
from research.evaluation.requests import GenerateUntil
from research.evaluation.sandbox import Limits
from research.evaluation.task import Item, Task
from research.inference.sampling import Sampling
from research.scaling.repeated_sampling import pass_at_k

# A line that begins with one of these ends the function. HumanEval's authors cut completions there.
UNTIL = ('\ndef ', '\nclass ', '\n#', '\nif ', '\nprint', '\n@', '\nassert')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionCompletion(Task):
  """Functions from their signature and docstring; the problem's tests run on each sample in a sandbox.

  Attributes:
    file: JSON lines with HumanEval's fields; None is `code_problems.builtin_problems`.
    samples: completions of each problem.
    ks: the k of each pass@k; at most `samples`.
    temperature, top_p: how a completion is sampled. One sample at temperature 0 is greedy.
    max_tokens: of a completion.
    limits: of each program.
  """

  file: str | None = None
  samples: int = 10
  ks: tuple[int, ...] = (1, 10)
  temperature: float = 0.8
  top_p: float = 0.95
  max_tokens: int = 128
  limits: Limits = dataclasses.field(default_factory=Limits)

  def __post_init__(self):
    super().__post_init__()
    object.__setattr__(self, 'ks', tuple(self.ks))
    if self.samples < 1:
      raise Invalid(FunctionCompletion, 'samples', f'{self.samples!r} must be positive.')
    if not self.ks or not all(1 <= k <= self.samples for k in self.ks):
      why = f'{self.ks} must be numbers from 1 to the {self.samples} samples.'
      raise Invalid(FunctionCompletion, 'ks', why)
    if self.temperature == 0 and self.samples > 1:
      why = f'0 is greedy: all {self.samples} samples would be equal.'
      raise Invalid(FunctionCompletion, 'temperature', why)

  @property
  def name(self) -> str:
    source = 'own' if self.file is None else pathlib.Path(self.file).stem
    return f'functions-{source}-{self.samples}samples'

  def items(self) -> list[Item]:
    problems = builtin_problems() if self.file is None else read_problems(self.file)
    items = []
    for number, problem in enumerate(problems[: self.examples]):
      requests = tuple(self._request(problem, number, i) for i in range(self.samples))
      items.append(Item(requests, problem))
    return items

  def _request(self, problem: CodeProblem, number: int, sample: int) -> GenerateUntil:
    # Every sample needs another seed; the primes keep the seeds of two problems apart.
    seed = (self.seed * 1_000_003 + number * 10_007 + sample) % 2**31
    sampling = Sampling(temperature=self.temperature, top_p=self.top_p, seed=seed)
    return GenerateUntil(problem.prompt, UNTIL, self.max_tokens, sampling)

  def measure(self, item, answers):
    """See `Task.measure`: pass@k of one problem by the unbiased estimator (Chen et al. 2021, equation 1)."""
    completions = [answer.text for answer in answers]
    passed = run_tests([item.target] * len(completions), completions, self.limits)
    correct = sum(passed)
    return {f'pass@{k}': float(pass_at_k(len(passed), correct, k)) for k in self.ks}

  def settings(self) -> dict:
    return {'sandbox': sandbox.isolation()}


def run_tests(
  problems: Sequence[CodeProblem], completions: Sequence[str], limits: Limits
) -> list[bool]:
  """Whether each completion passes the tests of its problem. As many run at a time as there are cores."""
  # Threads suffice: each one waits for a process.
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
    return list(pool.map(passes, problems, completions, itertools.repeat(limits)))


def passes(problem: CodeProblem, completion: str, limits: Limits) -> bool:
  """Whether a completed function passes its problem's tests."""
  # Printed after the tests. A program that exits before them prints no mark, and cannot guess it.
  mark = secrets.token_hex(16)
  program = f'{problem.prompt}{completion}\n\n{problem.test}\ncheck({problem.name})\nprint()\nprint({mark!r})\n'
  outcome = sandbox.run_python(program, limits)
  return outcome.passed and outcome.output.rstrip('\n').endswith(f'\n{mark}')
