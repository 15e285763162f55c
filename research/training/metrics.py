"""Rows of metrics: JSON lines, TensorBoard events, and the line a person watches."""

import contextlib
import importlib.util
import json
import pathlib
import sys
import threading
import time

from research.core import storage
from research.core.errors import UserError
from research.core.storage import read_rows, write_atomic
from research.core.text import clock, si


class _Object:
  """Lines that are added to an object of a bucket: it is written again now and then, as a whole."""

  interval = 30.0

  def __init__(self, path, text: str):
    self.path, self.text, self.new, self.written = path, text, False, time.monotonic()

  def write(self, line: str) -> None:
    self.text, self.new = self.text + line, True

  def flush(self, at_once: bool = False) -> None:
    if self.new and (at_once or time.monotonic() - self.written > self.interval):
      self.path.write_text(self.text)
      self.new, self.written = False, time.monotonic()

  def close(self) -> None:
    self.flush(at_once=True)


def _summary_writer():
  """The class that writes TensorBoard's events.

  Raises:
    UserError: its package is not installed, or cannot be imported.
  """
  try:
    if importlib.util.find_spec('tensorboardX') is None:
      raise ModuleNotFoundError('it is not installed')
    from tensorboardX import SummaryWriter
  except (
    Exception
  ) as error:  # it imports torch where it finds it, and a broken torch raises anything
    first = (str(error).splitlines() or [type(error).__name__])[0].rstrip('.')
    raise UserError(
      f'a run writes events for TensorBoard by tensorboardX, which cannot be imported ({first}): '
      'uv sync, or uv pip install --reinstall tensorboardX.'
    ) from error
  return SummaryWriter


def _import_writer() -> None:
  """Imports it ahead of its use, which tells what is wrong with it."""
  with contextlib.suppress(UserError):
    _summary_writer()


class Rows:
  """`metrics.jsonl` of a run, with every row also as TensorBoard scalars.

  On resuming from `step`, rows after it are dropped: they will come again, so there is no gap and no double.
  In a bucket rows appear every half minute and before every checkpoint, and there is no TensorBoard.

  Raises:
    UserError: the folder `tensorboard` cannot be written, or tensorboardX cannot be imported.
  """

  def __init__(self, workdir: pathlib.Path, step: int, tensorboard: bool = True):
    path = workdir / 'metrics.jsonl'
    self.bucket = storage.is_bucket(path)
    self.tensorboard = workdir / 'tensorboard' if tensorboard and not self.bucket else None
    self.writer = None
    self.purge = step + 1 if step else None
    if self.tensorboard is not None:
      storage.make(self.tensorboard)
      if importlib.util.find_spec('tensorboardX') is None:
        _summary_writer()  # says so before anything is computed
      # While the run waits for its programs: it imports torch where it finds it, in two seconds.
      threading.Thread(target=_import_writer).start()
    kept = ''.join(json.dumps(row) + '\n' for row in read_rows(path) if row['step'] <= step)
    write_atomic(path, kept)
    self.file = _Object(path, kept) if self.bucket else path.open('a')

  def flush(self) -> None:
    """What was written can be read from now on, whatever dies."""
    if self.bucket:
      self.file.flush(at_once=True)

  def write(self, row: dict) -> None:
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
  """In place of `Rows` where another process writes them."""

  def write(self, row: dict) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


class Progress:
  """One line that is rewritten on a terminal, and a new line now and then elsewhere."""

  def __init__(self, steps: int, start: int, flops_per_token: float, stream=sys.stderr):
    self.steps, self.start, self.flops_per_token, self.stream = (
      steps,
      start,
      flops_per_token,
      stream,
    )
    self.began = time.monotonic()
    self.shown = -1e9
    self.interval = 0.2 if stream.isatty() else 10.0

  def show(self, row: dict, last: bool = False) -> None:
    now = time.monotonic()
    if now - self.shown < self.interval and not last:
      return
    self.shown = now
    done = row['step'] - self.start
    left = (now - self.began) / max(done, 1) * (self.steps - row['step'])
    speed = row['tokens_per_second']
    # The loss of a policy says nothing of how good it is.
    name = 'reward' if 'reward' in row else 'loss'
    line = (
      f'step {row["step"]:,}/{self.steps:,}  {name} {row[name]:.4f}  {si(speed)} tokens/s  '
      f'{si(speed * self.flops_per_token, "FLOP/s")}  {clock(left)} left'
    )
    terminal = self.stream.isatty()
    self.stream.write(f'\r\x1b[K{line}' if terminal else line + '\n')
    if last and terminal:
      self.stream.write('\n')
    self.stream.flush()

  def say(self, text: str) -> None:
    self.stream.write(('\r\x1b[K' if self.stream.isatty() else '') + text + '\n')
    self.stream.flush()
