"""Speculative decoding against plain decoding: greedy tokens a second, of one prompt at a time.

    python experiments/speed/speculate.py --hf=FOLDER [--draft=FOLDER] [--ngram=2] [--guesses=4 --guesses=8]

The prompt asks for a copy of a text, where n-grams help most; --prompt reads another prompt from a file. The
methods take turns, `--repeats` times after one call each that compiles, and medians are printed, with the share
of guesses that the model accepted. If a method gives other tokens than plain decoding, the script fails.
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


def accepted(generator, prompt: str, max_tokens: int) -> float:
  """Returns the share of guesses that the model accepts after a prompt, all of an answer's steps together."""
  engine = generator.engine
  request = generator.request(prompt, max_tokens=max_tokens, stop_tokens=())
  continuation = engine.method.continuation(engine.batch(request), request)
  # The first token is that of the prompt. Every step adds the accepted guesses and one token of the model.
  steps = int(continuation.steps)
  return (max_tokens - 1 - steps) / (steps * engine.method.guesses)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--hf', metavar='FOLDER', help='a Hugging Face folder')
  parser.add_argument('--checkpoint', metavar='DIR', help="or a run's")
  parser.add_argument('--draft', metavar='DIR', help='a smaller model of the same vocabulary')
  parser.add_argument('--ngram', type=int, default=2)
  parser.add_argument('--guesses', type=int, action='append', help='default: 4')
  parser.add_argument('--max_tokens', type=int, default=64)
  parser.add_argument('--room', type=int, default=256)
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--prompt', type=pathlib.Path, metavar='FILE')
  flags = parser.parse_args()

  import jax

  from research.generate import load
  from research.parallel.mesh import Mesh

  prompt = flags.prompt.read_text() if flags.prompt else PROMPT
  methods = {'plain': {'slots': 1}}
  for guesses in flags.guesses or [4]:
    methods[f'{flags.ngram}-grams, {guesses} guesses'] = {'ngram': flags.ngram, 'guesses': guesses}
    if flags.draft:
      methods[f'draft, {guesses} guesses'] = {'draft': flags.draft, 'guesses': guesses}
  with Mesh().use(jax.devices()[:1]):
    generators = {
      name: load(flags.checkpoint, hf=flags.hf, room=flags.room, **knobs)
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
    shares = {
      name: accepted(generator, prompt, flags.max_tokens)
      for name, generator in generators.items()
      if name != 'plain'
    }
  wrong = [name for name in methods if tokens[name] != tokens['plain']]
  if wrong:
    sys.exit(f'{", ".join(wrong)}: other tokens than plain decoding')
  plain = statistics.median(rates['plain'])
  print(f'{flags.max_tokens} tokens')
  for name, values in rates.items():
    rate = statistics.median(values)
    share = f', {shares[name]:.0%} of guesses accepted' if name in shares else ''
    print(f'{name:20} {rate:8.1f} tokens/s {rate / plain:6.2f} of plain{share}')


if __name__ == '__main__':
  main()
