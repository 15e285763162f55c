"""Which of XLA's operations a call spends its time on, by jax's own profiler."""

import collections
import glob
import gzip
import json
import re
import tempfile
from collections.abc import Callable

MOST = 25  # kinds that the table has


def table(call: Callable[[], object], calls: int = 3) -> str:
  """Milliseconds that each kind of operation takes in a call, summed over the cores.

  Operations are XLA's thunks, by the name of their kind (`ynn_fusion.12` is a `ynn_fusion`). An operation
  on several cores counts once, from its beginning to its end; operations beside each other count each. So the
  sum may be more than the time of the call.

  Args:
    call: runs the program to its end. It has run before, so that nothing compiles.
    calls: how many times it is called.
  """
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
      for _ in range(calls):
        call()
    (path,) = glob.glob(f'{folder}/**/perfetto_trace.json.gz', recursive=True)
    with gzip.open(path) as file:
      events = json.load(file)
  milliseconds, count = collections.Counter(), collections.Counter()
  for event in events['traceEvents'] if isinstance(events, dict) else events:
    # Some events mark a moment or name a thread, and have no duration.
    if event.get('ph') != 'X':
      continue
    # Thunks are named as in the HLO, in small letters; Python's functions and jax's machinery otherwise.
    kind = re.sub(r'[.\d]+$', '', event.get('name', ''))
    if not re.fullmatch(r'[a-z_\-]+', kind):
      continue
    milliseconds[kind] += event['dur'] / 1e3 / calls
    count[kind] += 1
  lines = [f'{"":40} {"ms":>9} {"operations":>10}']
  for kind, time in milliseconds.most_common(MOST):
    lines.append(f'{kind:40} {time:9.1f} {count[kind] / calls:10.1f}')
  return '\n'.join(lines)
