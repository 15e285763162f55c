"""The thread that owns the model. Requests come to it through a queue, and pieces go back to their loop.

jax's programs run here alone. The side that speaks HTTP never waits for them, and the thread waits for nobody.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence

from research.core.errors import in_a_line
from research.inference.request import Completion, Request
from research.serving import refusals
from research.serving.metrics import Metrics
from research.serving.served import Served


@dataclasses.dataclass(frozen=True)
class Piece:
  """What one step said for one request.

  Attributes:
    number: of the request within its job.
    text: that is sure now.
    tokens, logprobs, top: as of `Completion`, of this step alone.
    finish, error: as of `Completion`.
  """

  number: int
  text: str
  tokens: list[int]
  logprobs: list[float]
  top: list[list[tuple[int, float]]]
  finish: str
  error: str


class Job:
  """Requests of one client: an asynchronous iterator over the pieces of all of them, until each is finished."""

  def __init__(self, requests: Sequence[Request], thread: 'ModelThread'):
    self.requests, self._thread = list(requests), thread
    self.numbers: dict[
      int, int
    ] = {}  # the engine's number of a request to the job's; the thread's own
    self.told = [0] * len(self.requests)  # how many tokens of each the client has; the thread's own
    self.began = time.monotonic()
    self.last: list[float | None] = [None] * len(self.requests)
    self.open = len(self.requests)
    self._loop = asyncio.get_running_loop()
    self._pieces: asyncio.Queue[Piece | refusals.Refused] = asyncio.Queue()

  def put(self, pieces: list[Piece | refusals.Refused]) -> None:
    """Hands pieces over. From any thread."""
    # The loop may have ended, and then nobody asks any more.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(self._put, pieces)

  def _put(self, pieces) -> None:
    for piece in pieces:
      self._pieces.put_nowait(piece)

  async def __aiter__(self) -> AsyncIterator[Piece]:
    while self.open:
      piece = await self._pieces.get()
      if isinstance(piece, refusals.Refused):
        self._thread.release(self)
        raise piece
      if piece.finish:
        self.open -= 1
        self._thread.waiting -= 1
      yield piece

  def cancel(self) -> None:
    """Forgets what is not finished; call it whenever the client is done."""
    if self.open:
      self._thread.tell('cancel', self)
      self._thread.release(self)


class ModelThread:
  """Runs a model's engine.

  Args:
    open_model: opens the model; it is called in the thread, and `mesh` is in use.
    mesh: a function to the context in which the model is used.
    most: how many requests may wait or be at work; more are refused.
    metrics: what is measured.
  """

  def __init__(
    self,
    open_model: Callable[[], Served],
    mesh: Callable[[], contextlib.AbstractContextManager],
    most: int,
    metrics: Metrics,
  ):
    self._open, self._mesh, self.most, self.metrics = open_model, mesh, most, metrics
    self.waiting = 0  # requests that are not finished; the loop's own
    self.broken = ''
    self._inbox: queue.SimpleQueue = queue.SimpleQueue()
    self._jobs: dict[int, Job] = {}
    self._opened: concurrent.futures.Future[Served] = concurrent.futures.Future()
    self._thread = threading.Thread(target=self._run, name='model', daemon=True)

  def start(self) -> Served:
    """Opens the model and gives it back when it is ready.

    Raises:
      UserError: it cannot be opened.
    """
    self._thread.start()
    self.served = self._opened.result()
    return self.served

  def stop(self) -> None:
    """Ends the thread; what is still asked is not answered."""
    self.tell('stop', None)
    self._thread.join(timeout=60)

  def tell(self, what: str, value) -> None:
    self._inbox.put((what, value))

  def submit(self, requests: Sequence[Request]) -> Job:
    """A job of requests that were checked.

    Raises:
      Refused: too many wait, or the model has failed.
    """
    if self.broken:
      raise refusals.server_error(self.broken, 503, 'model_failed')
    if len(requests) > self.most:
      raise refusals.Refused(
        f'{len(requests)} answers at a time are more than the {self.most} that this server takes.',
        code='too_many_answers',
      )
    if self.waiting + len(requests) > self.most:
      raise refusals.busy(self.metrics.seconds_to_wait())
    job = Job(requests, self)
    self.waiting += len(requests)
    self.tell('submit', job)
    return job

  def release(self, job: Job) -> None:
    """A job takes no more room."""
    self.waiting -= job.open
    job.open = 0

  async def call(self, function: Callable, *args):
    """What a function of the model gives; it is called in the thread, between two steps.

    Raises:
      Refused: too many wait, or the model has failed.
    """
    if self.broken:
      raise refusals.server_error(self.broken, 503, 'model_failed')
    if self.waiting >= self.most:
      raise refusals.busy(self.metrics.seconds_to_wait())
    self.waiting += 1
    future: concurrent.futures.Future = concurrent.futures.Future()
    try:
      self.tell('call', (future, function, args))
      return await asyncio.wrap_future(future)
    finally:
      self.waiting -= 1

  def _run(self) -> None:
    try:
      with self._mesh():
        try:
          served = self._open()
        except BaseException as error:
          self._opened.set_exception(error)
          return
        self.engine = served.generator.engine if served.generator else None
        self._opened.set_result(served)
        self._work()
    except Exception as error:
      traceback.print_exc()
      self._fail(error)

  def _work(self) -> None:
    while True:
      busy = self.engine is not None and self.engine.busy
      if not self._take_commands(wait=not busy):
        return
      if self.engine is not None and self.engine.busy:
        began = time.monotonic()
        self._report(self.engine.step())
        self.metrics.steps.observe(time.monotonic() - began)

  def _take_commands(self, wait: bool) -> bool:
    """Does what was told; False when the thread should end. One call is done at a time, between two steps."""
    while True:
      try:
        what, value = self._inbox.get(block=wait)
      except queue.Empty:
        return True
      wait = False
      if what == 'stop':
        return False
      if what == 'submit':
        for number, request in enumerate(value.requests):
          engine_number = self.engine.submit(request)
          value.numbers[engine_number] = number
          self._jobs[engine_number] = value
      elif what == 'cancel':
        for number in value.numbers:
          self.engine.cancel(number)
          self._jobs.pop(number, None)
      else:
        _do(*value)
        return True

  def _report(self, events) -> None:
    now = time.monotonic()
    pieces: dict[int, tuple[Job, list[Piece]]] = {}
    for event in events:
      job = self._jobs[event.number]
      number = job.numbers[event.number]
      piece = _piece(number, event.text, event.completion, job.told[number])
      job.told[number] += len(piece.tokens)
      self.metrics.on_piece(job, number, piece, now)
      if piece.finish:
        del self._jobs[event.number]
      pieces.setdefault(id(job), (job, []))[1].append(piece)
    for job, of_job in pieces.values():
      job.put(of_job)

  def _fail(self, error: Exception) -> None:
    """The engine's state is not to be trusted any more: everybody is told."""
    self.broken = f'the model failed ({in_a_line(error)[:200]}); restart the server.'
    refusal = refusals.server_error(self.broken, 503, 'model_failed')
    for job in {id(job): job for job in self._jobs.values()}.values():
      job.put([refusal])
    while True:
      what, value = self._inbox.get()
      if what == 'stop':
        return
      if what == 'submit':
        value.put([refusal])
      elif what == 'call' and value[0].set_running_or_notify_cancel():
        value[0].set_exception(refusal)


def _piece(number: int, text: str, completion: Completion, told: int) -> Piece:
  return Piece(
    number, text, completion.tokens[told:], completion.logprobs[told:], completion.top[told:],
    completion.finish, completion.error,
  )  # fmt: skip


def _do(future: concurrent.futures.Future, function: Callable, args: tuple) -> None:
  """Calls a function for whoever waits for it."""
  if not future.set_running_or_notify_cancel():
    return
  try:
    future.set_result(function(*args))
  except Exception as error:
    future.set_exception(error)
