"""Writes the files of the study: the policy's text, prompts, and pairs that the gold reward labelled."""

import json
import os
import pathlib

import gold
import numpy as np

# Part of the name of frozen text: files that are written again keep it.
TIME = 1_700_000_000


def pairs(count: int, seed: int) -> list[dict]:
  """Pairs of completions; the better is chosen with probability sigma(CERTAINTY x difference)."""
  first = gold.texts(count, seed)
  second = gold.texts(count, seed + 1)
  rng = np.random.default_rng((2, seed))
  rows = []
  for one, other in zip(first, second, strict=True):
    a, b = one[gold.PROMPT :], other[gold.PROMPT :]
    right = rng.random() < 1 / (1 + np.exp(-gold.CERTAINTY * (gold.gold(a) - gold.gold(b))))
    chosen, rejected = (a, b) if right else (b, a)
    rows.append({'prompt': one[: gold.PROMPT], 'chosen': chosen, 'rejected': rejected})
  return rows


def write(folder: pathlib.Path, sizes: tuple[int, ...], count: int) -> None:
  """Writes every file that is missing or differs, with a fixed time; the policy reads `count` texts."""
  folder.mkdir(parents=True, exist_ok=True)
  rows = {'text': [{'text': text} for text in gold.texts(count, 0)]}
  rows['text_validation'] = [{'text': text} for text in gold.texts(1_000, 1)]
  rows['prompts'] = [{'prompt': text[: gold.PROMPT]} for text in gold.texts(2_000, 2)]
  rows['pairs_validation'] = pairs(1_000, 10)
  for size in sizes:
    rows[f'pairs_{size}'] = pairs(size, 100 + 2 * size)
  for name, records in rows.items():
    path = folder / f'{name}.jsonl'
    content = ''.join(json.dumps(record) + '\n' for record in records)
    if not path.is_file() or path.read_text() != content:
      path.write_text(content)
    os.utime(path, (TIME, TIME))
