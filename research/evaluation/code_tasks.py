"""Completing functions, judged by running them: pass@k."""

import concurrent.futures
import dataclasses
import os
import secrets

from research.core.errors import Invalid
from research.evaluation import sandbox
from research.evaluation.code_problems import CodeProblem, own_problems, read_problems
from research.evaluation.requests import GenerateUntil
from research.evaluation.sandbox import Limits
from research.evaluation.task import Item, Task
from research.inference.sampling import Sampling
from research.scaling.repeated_sampling import pass_at_k

# What begins after a function has ended, as HumanEval's authors cut it.
UNTIL = ('\ndef ', '\nclass ', '\n#', '\nif ', '\nprint', '\n@', '\nassert')


@dataclasses.dataclass(frozen=True, kw_only=True)
class FunctionCompletion(Task):
  """Functions from their head and docstring; each sample is run against the problem's tests in a sandbox.

  Attributes:
    file: JSON lines with HumanEval's fields; None is this project's own problems.
    samples: how many completions of each problem.
    ks: of each pass@k; at most `samples`.
    temperature, top_p: how a completion is sampled; one sample at temperature 0 is greedy.
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
    source = 'own' if self.file is None else os.path.splitext(os.path.basename(self.file))[0]
    return f'functions-{source}-{self.samples}samples'

  def items(self) -> list[Item]:
    problems = own_problems() if self.file is None else read_problems(self.file)
    return [
      Item(tuple(self._request(problem, n, i) for i in range(self.samples)), problem)
      for n, problem in enumerate(problems[: self.examples])
    ]

  def _request(self, problem: CodeProblem, number: int, sample: int) -> GenerateUntil:
    # A seed of its own for every sample, by arithmetic that keeps those of two problems apart.
    seed = (self.seed * 1_000_003 + number * 10_007 + sample) % 2**31
    sampling = Sampling(temperature=self.temperature, top_p=self.top_p, seed=seed)
    return GenerateUntil(problem.prompt, UNTIL, self.max_tokens, sampling)

  def measure(self, item, answers):
    workers = os.cpu_count() or 1
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
      passed = list(pool.map(lambda answer: passes(item.target, answer.text, self.limits), answers))
    correct = sum(passed)
    return {f'pass@{k}': float(pass_at_k(len(passed), correct, k)) for k in self.ks}

  def settings(self) -> dict:
    return {'sandbox': sandbox.isolation()}


def passes(problem: CodeProblem, completion: str, limits: Limits) -> bool:
  """Whether a completed function passes its problem's tests."""
  # Printed when the tests are through: a program that ends itself before has not passed them.
  mark = secrets.token_hex(16)
  program = f'{problem.prompt}{completion}\n\n{problem.test}\ncheck({problem.name})\nprint()\nprint({mark!r})\n'
  outcome = sandbox.run_python(program, limits)
  return outcome.code == 0 and outcome.output.rstrip('\n').endswith(f'\n{mark}')
