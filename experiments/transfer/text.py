"""Two texts that share little: Python code without words, and the sentences of docstrings without code.

    python experiments/transfer/text.py

It writes code.jsonl, prose.jsonl and their held-out halves to runs/texts, from packages that the lock installs.
The same packages give the same files. Files that are there already are kept.
"""

import ast
import hashlib
import importlib.metadata
import json
import os
import pathlib
import textwrap

FOLDER = pathlib.Path('runs/texts')
# The bindings of run.gin that read prose; its own read code.
PROSE = (f"TRAIN='{FOLDER}/prose.jsonl'", f"HELD_OUT='{FOLDER}/prose_held_out.jsonl'")
TRAIN = ('numpy', 'pandas', 'scipy')
HELD_OUT = ('scikit-learn',)
MOST = {TRAIN: 2_700_000, HELD_OUT: 300_000}  # bytes of each text
LARGEST = 200_000  # bytes of a source file
WORDS = 8  # the fewest words of a paragraph of prose
TIME = 1_767_225_600  # 2026-01-01: the key of a frozen stream has the time of its file
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def sources(package: str) -> list[pathlib.Path]:
  """The Python files of an installed package without its tests, in an order that only their names decide."""
  files = importlib.metadata.distribution(package).files or ()
  names = [str(file) for file in files if str(file).endswith('.py') and 'test' not in str(file)]
  names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
  distribution = importlib.metadata.distribution(package)
  paths = [pathlib.Path(str(distribution.locate_file(name))) for name in names]
  return [path for path in paths if path.stat().st_size <= LARGEST]


def split(source: str) -> tuple[str, list[str]]:
  """(the code without comments and docstrings, the docstrings) of a source file."""
  tree = ast.parse(source)
  docstrings = []
  for node in ast.walk(tree):
    if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
      docstrings.append(textwrap.dedent(node.body[0].value.value))
      rest = node.body[1:]
      node.body = rest if rest or isinstance(node, ast.Module) else [ast.Pass()]
  return ast.unparse(tree), docstrings


def sentences(docstring: str) -> list[str]:
  """The paragraphs of a docstring that are prose: some words, a full stop, and no example."""
  paragraphs = []
  for paragraph in docstring.split('\n\n'):
    text = ' '.join(paragraph.split())
    is_prose = text.endswith('.') and '>>>' not in text and '---' not in text
    if is_prose and len(text.split()) >= WORDS:
      paragraphs.append(text)
  return paragraphs


def documents(packages: tuple[str, ...]) -> tuple[list[str], list[str]]:
  """(documents of code, documents of prose), a document a file; a paragraph counts once."""
  code, prose, seen = [], [], set()
  for package in packages:
    for path in sources(package):
      try:
        program, docstrings = split(path.read_text(encoding='utf-8'))
      except (SyntaxError, UnicodeDecodeError):
        continue
      code.append(program)
      found = [text for docstring in docstrings for text in sentences(docstring)]
      fresh = [text for text in dict.fromkeys(found) if text not in seen]
      seen.update(fresh)
      prose.append('\n'.join(fresh))
  return code, prose


def write(path: pathlib.Path, texts: list[str], most: int) -> None:
  """Writes documents of 200 characters or more as JSON lines, until they have `most` bytes."""
  lines, size = [], 0
  for text in texts:
    if len(text) >= 200 and size < most:
      lines.append(json.dumps({'text': text}))
      size += len(text.encode())
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text('\n'.join(lines) + '\n')
  os.utime(path, (TIME, TIME))
  print(f'{path}: {len(lines)} documents, {size:,} bytes')


def make() -> None:
  """Makes the files that are missing."""
  for packages, suffix in ((TRAIN, ''), (HELD_OUT, '_held_out')):
    paths = [FOLDER / f'{kind}{suffix}.jsonl' for kind in ('code', 'prose')]
    if not all(path.is_file() for path in paths):
      for path, texts in zip(paths, documents(packages), strict=True):
        write(path, texts, MOST[packages])
    for path in paths:
      os.utime(path, (TIME, TIME))


if __name__ == '__main__':
  make()
