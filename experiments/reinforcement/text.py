"""Writes the text that the base model reads: two-digit sums whose answers are mostly wrong.

    python experiments/reinforcement/text.py --out=runs/sums

A digit of an answer is wrong with probability `--noise`. So the text teaches addition, but a model that has
learned it perfectly still gets most sums wrong: reinforcement learning has to teach it to prefer right answers.
No held-out problem occurs in the text (`prompts.is_held_out`).
"""

import argparse
import json
import pathlib
import random

from research.evaluation.generated_tasks import Arithmetic
from research.reinforcement.prompts import is_held_out

HELD_OUT = 0.1  # of all problems; the gin files say the same
# Lines of a document. Freezing drops repeated documents, so that there must be several; and so few that a line
# often begins a row.
LINES = 4


def noisy(answer: str, noise: float, rng: random.Random) -> str:
  """The answer with each digit replaced by another one with probability `noise`."""
  digits = []
  for digit in answer:
    others = [other for other in '0123456789' if other != digit]
    digits.append(rng.choice(others) if rng.random() < noise else digit)
  return ''.join(digits)


def documents(count: int, noise: float, seed: int):
  """Documents of a few sums, a line each."""
  rng = random.Random(seed)
  task = Arithmetic()
  for _ in range(count):
    lines = []
    while len(lines) < LINES:
      problem = task.problem(rng)
      if not is_held_out(problem.question, HELD_OUT):
        lines.append(f'{problem.question}{noisy(problem.answer, noise, rng)}\n')
    yield ''.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--out', type=pathlib.Path, required=True, metavar='DIR')
  parser.add_argument('--documents', type=int, default=200_000)
  parser.add_argument('--noise', type=float, default=0.45)
  flags = parser.parse_args()
  flags.out.mkdir(parents=True, exist_ok=True)
  for split, count, seed in (('train', flags.documents, 0), ('validation', 2_000, 1)):
    with (flags.out / f'{split}.jsonl').open('w') as file:
      for text in documents(count, flags.noise, seed):
        file.write(json.dumps({'text': text}) + '\n')


if __name__ == '__main__':
  main()
