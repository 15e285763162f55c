"""A self-contained HTML page: its frame, its tables and its figures."""

import base64
import html
import io
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from research.core.text import si
from research.scaling.report import figure as plotted

GREEK = {
  'alpha': 'α', 'beta': 'β', 'gamma': 'γ', 'delta': 'δ', 'eta': 'η', 'kappa': 'κ', 'lambda': 'λ', 'mu': 'μ',
  'sigma': 'σ', 'tau': 'τ', 'phi': 'φ', 'rho': 'ρ', 'theta': 'θ', 'epsilon': 'ε', 'omega': 'ω', 'nu': 'ν',
}  # fmt: skip
FUNCTIONS = ('exp', 'ln', 'log', 'max', 'min', 'sum')
STYLE = """
body { font: 16px/1.55 Georgia, 'Times New Roman', serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-family: Helvetica, Arial, sans-serif; line-height: 1.2; } h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font: 13px/1.4 Helvetica, Arial, sans-serif; margin: .8rem 0; display: block; overflow-x: auto; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, td.text { text-align: left; } td.text { white-space: normal; }
figure { margin: 1rem 0; } figure img { max-width: 100%; } figcaption, .small { font-size: .88rem; color: #555; }
.headline { background: #f6f4ef; border-left: 4px solid #c0392b; padding: .7rem 1rem; } .warn { color: #a33; } pre { white-space: pre-wrap; font-size: .85rem; }
details { margin: .8rem 0; } summary { cursor: pointer; font-family: Helvetica, Arial, sans-serif; }
"""  # noqa: E501


def write(path, title: str, sections: Iterable[str]) -> pathlib.Path:
  """Writes sections of HTML as one page, without the empty ones, and returns its path."""
  body = '\n'.join(s for s in (f'<h1>{text(title)}</h1>', *sections) if s)
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{text(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n'
  )
  path = pathlib.Path(path) if isinstance(path, str) else path
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(page, encoding='utf-8')
  return path


def image(figure, caption: str, name: str = '') -> str:
  """A matplotlib figure in the page, with its caption and links to save it as SVG and its data as CSV.

  Args:
    name: of the saved files, without an ending; '' for the first words of the caption.
  """
  words = re.findall(r'[a-z0-9]+', (name or caption).lower())
  name = '-'.join(words[:4]) or 'figure'
  png = io.BytesIO()
  figure.savefig(png, format='png', dpi=130)
  svg = io.BytesIO()
  # Without its date, the same figure has the same bytes.
  figure.savefig(svg, format='svg', metadata={'Date': None})
  caption = text(caption)
  picture = f'<img alt="{caption}" src="{_inline("image/png", png.getvalue())}">'
  links = ', '.join(
    f'<a download="{name}.{ending}" href="{_inline(kind, content)}">{shown}</a>'
    for ending, kind, content, shown in (
      ('svg', 'image/svg+xml', svg.getvalue(), 'SVG'),
      ('csv', 'text/csv', plotted.data(figure).encode(), 'data as CSV'),
    )
  )
  return f'<figure>{picture}<figcaption>{caption} <span class="small">[{links}]</span></figcaption></figure>'


def _inline(kind: str, content: bytes) -> str:
  """Content as a data URL: the page needs no other file."""
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'


def formula(form: str) -> str:
  """A law's form as HTML: 'A / N^alpha' with an italic A and N and a raised alpha.

  Names of Greek letters become the letters. What follows ^ is raised, and what follows _ is lowered.
  """
  out = []
  i = 0
  while i < len(form):
    if form[i] in '^_':
      level = 'sup' if form[i] == '^' else 'sub'
      word, i = _argument(form, i + 1)
      out.append(f'<{level}>{formula(word)}</{level}>')
    elif match := re.match('[A-Za-z]+', form[i:]):
      out.append(_symbol(match.group()))
      i += match.end()
    else:
      out.append({'-': '\u2212', '*': '\u00b7'}.get(form[i], text(form[i])))
      i += 1
  return ''.join(out)


def _argument(form: str, begin: int) -> tuple[str, int]:
  """(the argument of a ^ or _, where it ends): the contents of parentheses, or a signed name or number."""
  if form[begin : begin + 1] == '(':
    depth = 0
    for i in range(begin, len(form)):
      depth += {'(': 1, ')': -1}.get(form[i], 0)
      if depth == 0:
        return form[begin + 1 : i], i + 1
  match = re.match(r'-?[A-Za-z0-9.]+(_[A-Za-z0-9]+)?', form[begin:])
  end = begin + (match.end() if match else 1)
  return form[begin:end], end


def _symbol(word: str) -> str:
  """A name in a formula: Greek letters and short names are italic, functions and words upright."""
  if word in GREEK:
    return f'<i>{GREEK[word]}</i>'
  upright = word in FUNCTIONS or len(word) > 2
  return word if upright else f'<i>{word}</i>'


def table(head, rows) -> str:
  """A table of texts, which are escaped here. Long cells may wrap."""

  def cell(value) -> str:
    kind = ' class="text"' if len(str(value)) > 30 else ''
    return f'<td{kind}>{text(value)}</td>'

  lines = ''.join('<tr>' + ''.join(map(cell, row)) + '</tr>' for row in rows)
  return '<table><tr>' + ''.join(f'<th>{text(h)}</th>' for h in head) + f'</tr>{lines}</table>'


def records(rows: Iterable[dict], most: int = 500) -> str:
  """Dicts as a table with a column for each key; at most `most` rows, and numbers to five digits."""
  rows = list(rows)
  names = list(dict.fromkeys(k for row in rows for k in row))
  return table(names, [[_cell(row.get(k, '')) for k in names] for row in rows[:most]])


def details(summary: str, body: str) -> str:
  """A body that a click on the summary opens."""
  return f'<details><summary>{text(summary)}</summary>{body}</details>'


def text(value) -> str:
  """A value as HTML text."""
  return html.escape(str(value))


def _cell(value) -> str:
  """A number to five digits; whole numbers below a million, and what is not a number, as they are."""
  try:
    number = float(value)
  except (TypeError, ValueError):
    return str(value)
  if not np.isfinite(number) or (number.is_integer() and abs(number) < 1e6):
    return str(value)
  return f'{number:.5g}'


def interval(low, high, digits=3, bare=False) -> str:
  """'[0.1, 0.2]'. For an unknown interval '', or a dash where it is `bare`, alone in a cell."""
  if not (np.isfinite(low) and np.isfinite(high)):
    return '—' if bare else ''
  if 1e-3 <= abs(high) < 1e3:
    return f'[{low:.{digits}f}, {high:.{digits}f}]'
  return f'[{si(low)}, {si(high)}]'
