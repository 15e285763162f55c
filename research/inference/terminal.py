"""Generation on a terminal: the text as it comes, and a conversation of prompts and answers."""

import sys

from research.core.errors import UserError
from research.inference.generator import Generator


def show(generator: Generator, prompt: str, settings: dict) -> None:
  """Prints the text of one prompt as it comes; `settings` are `Request`'s."""
  for text in generator.stream(prompt, **settings):
    print(text, end='', flush=True)
  print()


def converse(generator: Generator, settings: dict) -> None:
  """Asks for prompts until there are no more; one that is wrong is no reason to end."""
  while True:
    try:
      prompt = input('> ' if sys.stdin.isatty() else '')
    except EOFError:
      return
    try:
      show(generator, prompt, settings)
    except UserError as error:
      print(f'error: {error}', file=sys.stderr)
