"""Speculative decoding against plain decoding: greedy tokens a second, of one prompt at a time.

    python experiments/speed/speculate.py --hf=FOLDER [--draft=FOLDER] [--ngram=2] [--guesses=4]

The prompt asks for a copy of a text, where n-grams help most; --prompt reads another prompt from a file. The
methods take turns, `--repeats` times after one call each that compiles, and medians are printed. If a method
gives other tokens than plain decoding, the script fails.
"""

import argparse
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

TEXT = """def mean(values):
  total = 0.0
  for value in values:
    total += value
  return total / len(values)
"""
PROMPT = f'Here is a function:\n\n{TEXT}\nHere is the same function again:\n\n{TEXT[:24]}'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--hf', metavar='FOLDER', help='a Hugging Face folder')
  parser.add_argument('--checkpoint', metavar='DIR', help="or a run's")
  parser.add_argument('--draft', metavar='DIR', help='a smaller model of the same vocabulary')
  parser.add_argument('--ngram', type=int, default=2)
  parser.add_argument('--guesses', type=int, default=4)
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--room', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--prompt', type=pathlib.Path, metavar='FILE')
  flags = parser.parse_args()

  import jax

  from research.generate import load
  from research.parallel.mesh import Mesh

  prompt = flags.prompt.read_text() if flags.prompt else PROMPT
  methods = {'plain': {'slots': 1}, f'{flags.ngram}-grams': {'ngram': flags.ngram}}
  if flags.draft:
    methods['draft'] = {'draft': flags.draft}
  with Mesh().use(jax.devices()[:1]):
    generators = {
      name: load(flags.checkpoint, hf=flags.hf, room=flags.room, guesses=flags.guesses, **knobs)
      for name, knobs in methods.items()
    }
    tokens = {}
    rates = {name: [] for name in methods}
    for repeat in range(flags.repeats + 1):
      for name, generator in generators.items():
        start = time.perf_counter()
        (answer,) = generator([prompt], max_tokens=flags.max_tokens, stop_tokens=())
        if repeat:
          rates[name].append(len(answer.tokens) / (time.perf_counter() - start))
        tokens[name] = answer.tokens
  wrong = [name for name in methods if tokens[name] != tokens['plain']]
  if wrong:
    sys.exit(f'{", ".join(wrong)}: other tokens than plain decoding')
  plain = statistics.median(rates['plain'])
  print(f'{len(tokens["plain"])} tokens, {flags.guesses} guesses a step')
  for name, values in rates.items():
    rate = statistics.median(values)
    print(f'{name:10} {rate:8.1f} tokens/s {rate / plain:6.2f} of plain')


if __name__ == '__main__':
  main()
