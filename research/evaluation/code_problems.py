"""Functions to complete, with their tests: 16 small ones, or those of a file in HumanEval's format."""

import dataclasses
import json
import pathlib

from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class CodeProblem:
  """A problem in the form of HumanEval (Chen et al. 2021, arXiv:2107.03374).

  Attributes:
    name: of the function.
    prompt: the function's signature and docstring, which the model continues.
    solution: a right continuation.
    test: a program that defines `check(candidate)`, which raises where the candidate is wrong.
  """

  name: str
  prompt: str
  solution: str
  test: str


# (signature, docstring, returned expression, results by arguments)
_TABLE = (
  ('add(a, b)', 'Return the sum of a and b.', 'a + b', {'(1, 2)': '3', '(-1, 1)': '0'}),
  ('double(x)', 'Return x times two.', '2 * x', {'(4,)': '8', '(0,)': '0'}),
  ('is_even(n)', 'Return whether n is even.', 'n % 2 == 0', {'(4,)': 'True', '(7,)': 'False'}),
  ('largest(xs)', 'Return the largest element of the list xs.', 'max(xs)',
   {'([3, 9, 2],)': '9', '([-5],)': '-5'}),
  ('total(xs)', 'Return the sum of the numbers in xs; 0 for an empty list.', 'sum(xs)',
   {'([],)': '0', '([1, 2, 3],)': '6'}),
  ('reverse(s)', 'Return the string s reversed.', 's[::-1]', {"('abc',)": "'cba'", "('',)": "''"}),
  ('is_palindrome(s)', 'Return whether s reads the same backwards.', 's == s[::-1]',
   {"('level',)": 'True', "('ab',)": 'False'}),
  ('count_vowels(s)', 'Return how many letters of s are a, e, i, o or u.',
   "sum(c in 'aeiou' for c in s)", {"('hello',)": '2', "('xyz',)": '0'}),
  ('unique(xs)', 'Return the elements of xs without repetitions, sorted.', 'sorted(set(xs))',
   {'([3, 1, 3],)': '[1, 3]', '([],)': '[]'}),
  ('factorial(n)', 'Return n factorial.', '1 if n < 2 else n * factorial(n - 1)',
   {'(0,)': '1', '(5,)': '120'}),
  ('clamp(x, low, high)', 'Return x, but at least low and at most high.', 'max(low, min(x, high))',
   {'(5, 0, 3)': '3', '(-1, 0, 3)': '0', '(2, 0, 3)': '2'}),
  ('words(s)', 'Return the words of s, which are separated by spaces.', 's.split()',
   {"('a bc d',)": "['a', 'bc', 'd']"}),
  ('squares(n)', 'Return a list of the squares of 0, 1, ..., n - 1.', '[i * i for i in range(n)]',
   {'(4,)': '[0, 1, 4, 9]', '(0,)': '[]'}),
  ('common(a, b)', 'Return the elements that lists a and b share, sorted.',
   'sorted(set(a) & set(b))', {'([1, 2, 3], [3, 2, 5])': '[2, 3]'}),
  ('mean(xs)', 'Return the mean of the numbers in xs.', 'sum(xs) / len(xs)', {'([1, 2, 6],)': '3'}),
  ('gcd(a, b)', 'Return the greatest common divisor of a and b.', 'a if b == 0 else gcd(b, a % b)',
   {'(12, 18)': '6', '(7, 3)': '1'}),
)  # fmt: skip


def builtin_problems() -> list[CodeProblem]:
  """The problems of `_TABLE`."""
  problems = []
  for signature, docstring, expression, results in _TABLE:
    checks = ''.join(
      f'  assert candidate(*{arguments}) == {result}\n' for arguments, result in results.items()
    )
    problems.append(
      CodeProblem(
        name=signature.partition('(')[0],
        prompt=f'def {signature}:\n  """{docstring}"""\n',
        solution=f'  return {expression}\n',
        test=f'def check(candidate):\n{checks}',
      )
    )
  return problems


def read_problems(file: str) -> list[CodeProblem]:
  """The problems of a JSON-lines file with HumanEval's fields.

  Raises:
    UserError: it cannot be read, or a line lacks a field.
  """
  try:
    lines = pathlib.Path(file).expanduser().read_text().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'FunctionCompletion.file: {file} cannot be read ({error}).') from error
  names = ('entry_point', 'prompt', 'canonical_solution', 'test')
  problems = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      fields = json.loads(line)
      problems.append(CodeProblem(*(fields[name] for name in names)))
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(
        f'{file}:{number}: not a problem with entry_point, prompt, canonical_solution and test '
        f'({type(error).__name__}: {error}).'
      ) from error
  if not problems:
    raise UserError(f'FunctionCompletion.file: {file} has no problem.')
  return problems
