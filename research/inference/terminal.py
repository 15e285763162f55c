"""Generation on a terminal: prints text as it is generated, and asks for prompts."""

import sys

from research.core.errors import UserError
from research.inference.generator import Generator


def show(generator: Generator, prompt: str, samples: int, settings: dict) -> None:
  """Prints the answers to one prompt, each as it is generated; `settings` are fields of `Request`."""
  for request in generator.requests(prompt, samples, **settings):
    for text in generator.engine.stream(request):
      print(text, end='', flush=True)
    print()


def converse(generator: Generator, samples: int, settings: dict) -> None:
  """Asks for prompts until the input ends. An error of one prompt does not end the loop."""
  while True:
    try:
      prompt = input('> ' if sys.stdin.isatty() else '')
    except EOFError:
      return
    try:
      show(generator, prompt, samples, settings)
    except UserError as error:
      print(f'error: {error}', file=sys.stderr)
