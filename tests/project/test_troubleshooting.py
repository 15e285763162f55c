"""Every message that docs/troubleshooting.md quotes is still in the code."""

import ast
import functools
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / 'docs' / 'troubleshooting.md').read_text()
# A bold text in backticks is a message.
QUOTED = re.findall(r'\*\*`([^`]+)`\*\*', PAGE)
FIELD = '\0'  # in place of what an f-string inserts


@functools.cache
def messages() -> str:
  """Every string of the code, one after another; adjacent literals are one string, as Python joins them."""
  texts = []
  for path in sorted([*(ROOT / 'research').rglob('*.py'), *(ROOT / 'tasks').rglob('*.py')]):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else FIELD for part in node.values]
        texts.append(''.join(parts))
      elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        texts.append(node.value)
  return '\n\n'.join(texts)


def test_the_page_quotes_messages():
  assert len(QUOTED) > 25


@pytest.mark.parametrize('quoted', QUOTED)
def test_a_quoted_message_is_in_the_code(quoted):
  # `repr` of a name brings its own quotes.
  pieces = [re.escape(piece) for piece in re.split(r"'?\.\.\.'?", quoted.strip())]
  pattern = r'[^\n]*?'.join(pieces)
  assert re.search(pattern, messages()), f'the code no longer says: {quoted}'
