"""Rows of metrics: JSON lines, TensorBoard events, and the line of progress on a terminal."""

import contextlib
import importlib.util
import json
import pathlib
import sys
import threading
import time

from research.core import storage
from research.core.errors import UserError, first_line
from research.core.storage import read_rows, write_atomic
from research.core.text import clock, si


class _Object:
  """A text file in a bucket. Objects cannot be appended to, so the whole text is written again now and then."""

  interval = 30.0  # seconds

  def __init__(self, path, text: str):
    self.path = path
    self.text = text
    self.changed = False
    self.written = time.monotonic()

  def write(self, line: str) -> None:
    self.text += line
    self.changed = True

  def flush(self, at_once: bool = False) -> None:
    if self.changed and (at_once or time.monotonic() - self.written > self.interval):
      self.path.write_text(self.text)
      self.changed = False
      self.written = time.monotonic()

  def close(self) -> None:
    self.flush(at_once=True)


# What tensorboardX imports where it finds it, and what scalars in a local folder do not need: 5 of its 5.5 s.
_NOT_NEEDED = ('torch', 'boto3', 'google.cloud.storage')


@contextlib.contextmanager
def _hidden(modules):
  """Makes imports of these modules fail, but for those that are imported already."""
  hidden = [name for name in modules if name not in sys.modules]
  # Python raises ModuleNotFoundError for an entry of None.
  sys.modules.update(dict.fromkeys(hidden))
  try:
    yield
  finally:
    for name in hidden:
      if name in sys.modules and sys.modules[name] is None:
        del sys.modules[name]


def _summary_writer():
  """Returns the class that writes events for TensorBoard.

  Raises:
    UserError: its package is not installed, or cannot be imported.
  """
  try:
    if importlib.util.find_spec('tensorboardX') is None:
      raise ModuleNotFoundError('it is not installed')
    with _hidden(_NOT_NEEDED):
      from tensorboardX import SummaryWriter
  # tensorboardX imports other packages if they are installed, and a broken one raises errors of any type.
  except Exception as error:
    raise UserError(
      f'a run writes events for TensorBoard by tensorboardX, which cannot be imported ({first_line(error)}): '
      'uv sync, or uv pip install --reinstall tensorboardX.'
    ) from error
  return SummaryWriter


def _import_writer() -> None:
  """Imports the class ahead of its use. The use reports an error."""
  with contextlib.suppress(UserError):
    _summary_writer()


class Rows:
  """Writes `metrics.jsonl` of a run, and every row as TensorBoard scalars as well.

  A run that resumes from `step` drops the rows after it and writes them again, so no row is missing or double.
  In a bucket, rows appear every half minute and before every checkpoint, and there is no TensorBoard.

  Raises:
    UserError: the folder `tensorboard` cannot be written, or tensorboardX cannot be imported.
  """

  def __init__(self, workdir: pathlib.Path, step: int, tensorboard: bool = True):
    path = workdir / 'metrics.jsonl'
    self.bucket = storage.is_bucket(path)
    self.tensorboard = workdir / 'tensorboard' if tensorboard and not self.bucket else None
    self.writer = None
    # TensorBoard hides events from this step on that the interrupted run wrote.
    self.purge = step + 1 if step else None
    if self.tensorboard is not None:
      storage.make(self.tensorboard)
      if importlib.util.find_spec('tensorboardX') is None:
        _summary_writer()  # raises before anything is computed
      # In a thread, while XLA compiles the run.
      threading.Thread(target=_import_writer).start()
    earlier_rows = [row for row in read_rows(path) if row['step'] <= step]
    text = ''.join(json.dumps(row) + '\n' for row in earlier_rows)
    write_atomic(path, text)
    self.file = _Object(path, text) if self.bucket else path.open('a')

  def flush(self) -> None:
    """Makes every row that was written readable for others, even if this process dies."""
    if self.bucket:
      self.file.flush(at_once=True)

  def write(self, row: dict) -> None:
    """Writes a row: numbers by name, with the key 'step'."""
    self.file.write(json.dumps(row) + '\n')
    self.file.flush()
    if self.tensorboard is not None:
      if self.writer is None:
        self.writer = _summary_writer()(str(self.tensorboard), purge_step=self.purge)
      for key, value in row.items():
        if key != 'step' and isinstance(value, int | float):
          self.writer.add_scalar(key, value, row['step'])

  def close(self) -> None:
    self.file.close()
    if self.writer is not None:
      self.writer.close()


class NoRows:
  """Replaces `Rows` in processes that write none: the first process writes them."""

  def write(self, row: dict) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


class Progress:
  """Shows progress: one line that is rewritten on a terminal, and a new line every 10 seconds elsewhere."""

  def __init__(self, steps: int, start: int, flops_per_token: float, stream=sys.stderr):
    self.steps = steps
    self.start = start
    self.flops_per_token = flops_per_token
    self.stream = stream
    self.began = time.monotonic()
    self.shown = -1e9  # long ago, so that the first row is shown
    self.interval = 0.2 if stream.isatty() else 10.0  # seconds

  def show(self, row: dict, last: bool = False) -> None:
    """Shows a row of metrics, unless the line before is too recent."""
    time_now = time.monotonic()
    if time_now - self.shown < self.interval and not last:
      return
    self.shown = time_now
    done = row['step'] - self.start
    seconds_left = (time_now - self.began) / max(done, 1) * (self.steps - row['step'])
    speed = row['tokens_per_second']
    # The loss of a policy gradient does not say how good the policy is; its mean reward does.
    name = 'reward' if 'reward' in row else 'loss'
    line = (
      f'step {row["step"]:,}/{self.steps:,}  {name} {row[name]:.4f}  {si(speed)} tokens/s  '
      f'{si(speed * self.flops_per_token, "FLOP/s")}  {clock(seconds_left)} left'
    )
    # '\r\x1b[K' returns to the start of the line and erases it.
    terminal = self.stream.isatty()
    self.stream.write(f'\r\x1b[K{line}' if terminal else line + '\n')
    if last and terminal:
      self.stream.write('\n')
    self.stream.flush()

  def say(self, text: str) -> None:
    """Prints a line of its own."""
    self.stream.write(('\r\x1b[K' if self.stream.isatty() else '') + text + '\n')
    self.stream.flush()
