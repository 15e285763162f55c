"""Which of XLA's operations a call spends its time on, by jax's own profiler."""

import collections
import glob
import gzip
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable

MOST = 25  # rows that a table has
# Bytes a second that a sum over a large array gets here. A slower operation takes longer than its arrays.
FAST = 20e9


def dump(folder: str, program: str) -> None:
  """Makes XLA write the text of every program of this name into a folder; call it before jax is used."""
  flags = f'--xla_dump_to={folder} --xla_dump_hlo_as_text --xla_dump_hlo_module_re={program}'
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'


def traced(call: Callable[[], object], calls: int = 3) -> list[tuple[str, float]]:
  """Returns (name, milliseconds) of every operation of `calls` calls of a program that has run before."""
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
      for _ in range(calls):
        call()
    (path,) = glob.glob(f'{folder}/**/perfetto_trace.json.gz', recursive=True)
    with gzip.open(path) as file:
      events = json.load(file)
  events = events['traceEvents'] if isinstance(events, dict) else events
  # Some events mark a moment or name a thread, and have no duration.
  return [(e.get('name', ''), e['dur'] / 1e3) for e in events if e.get('ph') == 'X']


def table(operations: list[tuple[str, float]], calls: int = 3) -> str:
  """Milliseconds that each kind of operation takes in a call, summed over the cores.

  Operations are XLA's thunks, by the name of their kind (`ynn_fusion.12` is a `ynn_fusion`). An operation
  on several cores counts once, from its beginning to its end; operations beside each other count each. So the
  sum may be more than the time of the call. A product of Eigen (`dot`) ends in the trace when the
  cores have been given it; a line says so.

  Args:
    operations: from `traced`.
    calls: how many calls they are of.
  """
  milliseconds, count = collections.Counter(), collections.Counter()
  for name, time in operations:
    # Thunks are named as in the HLO, in small letters; Python's functions and jax's machinery otherwise.
    kind = re.sub(r'[.\d]+$', '', name)
    if not re.fullmatch(r'[a-z_\-]+', kind):
      continue
    milliseconds[kind] += time / calls
    count[kind] += 1
  lines = [f'{"":40} {"ms":>9} {"operations":>10}']
  for kind, time in milliseconds.most_common(MOST):
    lines.append(f'{kind:40} {time:9.1f} {count[kind] / calls:10.1f}')
  if milliseconds['dot']:
    lines.append(
      '"dot" may be less than products take: the profiler sees them only until the cores have them.'
    )
  return '\n'.join(lines)


def slow(operations: list[tuple[str, float]], folder: str, calls: int = 3) -> str:
  """The operations without products that take longest beyond what their arrays take at `FAST`.

  Args:
    operations: from `traced`.
    folder: where XLA wrote the program's text (`dump`); the last program that was compiled is taken.
    calls: how many calls they are of.
  """
  texts = pathlib.Path(folder).glob('*after_optimizations.txt')
  text = max(texts, key=os.path.getmtime).read_text()
  fused = dict(re.findall(r'^%(\S+) (\(.*?\{\n.*?)^\}', text, re.MULTILINE | re.DOTALL))
  milliseconds = collections.Counter()
  runs = collections.Counter()  # more than one in a call for what is in a loop
  for name, time in operations:
    milliseconds[name] += time / calls
    runs[name] += 1
  rows = []
  for name, computation in re.findall(r'%(\S+) = .*? fusion\(.*calls=%([^\s,]+)', text):
    body = fused.get(computation, '')
    if milliseconds[name] and ' dot(' not in body:
      head = body.partition(' {\n')[0]
      moved = sum(map(_bytes, re.findall(r'(\w+)\[([\d,]*)\]', head))) * runs[name] / calls
      rows.append((milliseconds[name] - 1e3 * moved / FAST, milliseconds[name], moved, name, head))
  lines = [f'{"":32} {"ms":>7} {"MB":>7} {"GB/s":>6}  reads and writes']
  for _, time, moved, name, head in sorted(rows, reverse=True)[:MOST]:
    shapes = ' '.join(re.findall(r'\w+\[[\d,]*\]', head))
    lines.append(
      f'{name:32} {time:7.1f} {moved / 1e6:7.1f} {moved / time / 1e6:6.1f}  {shapes[:90]}'
    )
  return '\n'.join(lines)


def _bytes(shape: tuple[str, str]) -> int:
  """Bytes of an array, of its dtype (f32, bf16, pred) and its sizes as HLO writes them."""
  bits = re.search(r'\d+', shape[0])
  return (int(bits[0]) if bits else 8) * math.prod(int(n) for n in shape[1].split(',') if n) // 8
