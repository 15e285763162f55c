"""The thread that owns the model. Commands reach it through a queue, and pieces of answers go back to the loop.

Only this thread runs jax's programs. So the event loop, which speaks HTTP, never waits for them, and a step
never waits for a client.
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
from research.serving import api_errors
from research.serving.metrics import Metrics
from research.serving.served_model import ServedModel


@dataclasses.dataclass(frozen=True)
class Piece:
  """The result of one step for one request.

  Attributes:
    number: the request's number in its job.
    text: the text that is now certain.
    tokens, logprobs, top: those of this step, as in `Completion`.
    finish, error: as in `Completion`.
  """

  number: int
  text: str
  tokens: list[int]
  logprobs: list[float]
  top: list[list[tuple[int, float]]]
  finish: str
  error: str


class Job:
  """The requests of one client: an asynchronous iterator over their pieces, until every request is finished.

  The event loop and the model's thread both use a job, but no attribute is written by both.

  Attributes:
    requests: the requests, numbered from 0.
    numbers: the engine's number of a request -> its number in the job. The thread writes it.
    sent: how many tokens of each request were sent. The thread writes it.
    last_times: when the last piece of each request came, None before the first. The thread writes it.
    began: the time of `submit`, by `time.monotonic`.
    open: how many requests are not finished. The loop writes it.
  """

  def __init__(self, requests: Sequence[Request], thread: 'ModelThread'):
    self.requests = list(requests)
    self.numbers: dict[int, int] = {}
    self.sent = [0] * len(self.requests)
    self.last_times: list[float | None] = [None] * len(self.requests)
    self.began = time.monotonic()
    self.open = len(self.requests)
    self._thread = thread
    self._loop = asyncio.get_running_loop()
    self._pieces: asyncio.Queue[Piece | api_errors.ApiError] = asyncio.Queue()

  def put(self, pieces: list[Piece | api_errors.ApiError]) -> None:
    """Sends pieces to the event loop. Any thread may call this."""
    # Once the loop has ended, nobody waits for the pieces.
    with contextlib.suppress(RuntimeError):
      self._loop.call_soon_threadsafe(self._put, pieces)

  def _put(self, pieces) -> None:
    for piece in pieces:
      self._pieces.put_nowait(piece)

  async def __aiter__(self) -> AsyncIterator[Piece]:
    while self.open:
      piece = await self._pieces.get()
      if isinstance(piece, api_errors.ApiError):
        self._thread.release(self)
        raise piece
      if piece.finish:
        self.open -= 1
        self._thread.waiting -= 1
      yield piece

  def cancel(self) -> None:
    """Drops the requests that are not finished. Call it whenever the client is done."""
    if self.open:
      self._thread.tell('cancel', self)
      self._thread.release(self)


class ModelThread:
  """Runs a model's engine.

  Args:
    open_model: opens the model. The thread calls it, under the mesh.
    mesh: returns the context in which the mesh is in use.
    most: how many requests may wait or be active; more are refused.
    metrics: the server's metrics.

  Attributes:
    waiting: how many requests are not finished. The event loop writes it.
    broken: why the model has failed; '' while it works.
  """

  def __init__(
    self,
    open_model: Callable[[], ServedModel],
    mesh: Callable[[], contextlib.AbstractContextManager],
    most: int,
    metrics: Metrics,
  ):
    self._open = open_model
    self._mesh = mesh
    self.most = most
    self.metrics = metrics
    self.waiting = 0
    self.broken = ''
    self._inbox: queue.SimpleQueue = queue.SimpleQueue()
    self._jobs: dict[int, Job] = {}
    self._opened: concurrent.futures.Future[ServedModel] = concurrent.futures.Future()
    self._thread = threading.Thread(target=self._run, name='model', daemon=True)

  def start(self) -> ServedModel:
    """Opens the model and returns it when it is ready.

    Raises:
      UserError: it cannot be opened.
    """
    self._thread.start()
    return self._opened.result()

  def stop(self) -> None:
    """Ends the thread. Requests that are not finished get no answer."""
    self.tell('stop', None)
    self._thread.join(timeout=60)

  def tell(self, command: str, value) -> None:
    """Queues a command: 'submit' or 'cancel' with a job, 'call' with a future and a function, or 'stop'."""
    self._inbox.put((command, value))

  def submit(self, requests: Sequence[Request]) -> Job:
    """Starts a job of requests that were checked.

    Raises:
      ApiError: too many requests wait, or the model has failed.
    """
    if self.broken:
      raise api_errors.server_error(self.broken, 503, 'model_failed')
    if len(requests) > self.most:
      raise api_errors.ApiError(
        f'{len(requests)} answers at a time are more than the {self.most} that this server takes.',
        code='too_many_answers',
      )
    if self.waiting + len(requests) > self.most:
      raise api_errors.busy(self.metrics.seconds_to_wait())
    job = Job(requests, self)
    self.waiting += len(requests)
    self.tell('submit', job)
    return job

  def release(self, job: Job) -> None:
    """Takes a job's open requests out of the count of those that wait."""
    self.waiting -= job.open
    job.open = 0

  async def call(self, function: Callable, *args):
    """Returns the result of a function that uses the model. The thread calls it, between two steps.

    Raises:
      ApiError: too many requests wait, or the model has failed.
    """
    if self.broken:
      raise api_errors.server_error(self.broken, 503, 'model_failed')
    if self.waiting >= self.most:
      raise api_errors.busy(self.metrics.seconds_to_wait())
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
          model = self._open()
        except BaseException as error:  # `start` raises it in the main thread
          self._opened.set_exception(error)
          return
        self.engine = model.generator.engine if model.generator else None
        self._opened.set_result(model)
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
    """Does the commands of the queue; returns False if the thread should end.

    It returns after a call, so that at most one is done between two steps and streams do not stall.

    Args:
      wait: whether to wait for a command, because there is nothing else to do.
    """
    while True:
      try:
        command, value = self._inbox.get(block=wait)
      except queue.Empty:
        return True
      wait = False
      if command == 'stop':
        return False
      if command == 'submit':
        for number, request in enumerate(value.requests):
          engine_number = self.engine.submit(request)
          value.numbers[engine_number] = number
          self._jobs[engine_number] = value
      elif command == 'cancel':
        for number in value.numbers:
          self.engine.cancel(number)
          self._jobs.pop(number, None)
      else:
        _do(*value)
        return True

  def _report(self, events) -> None:
    """Sends the results of a step to their jobs, those of one job together."""
    now = time.monotonic()
    pieces: dict[int, tuple[Job, list[Piece]]] = {}
    for event in events:
      job = self._jobs[event.number]
      number = job.numbers[event.number]
      piece = _piece(number, event.text, event.completion, job.sent[number])
      job.sent[number] += len(piece.tokens)
      self.metrics.on_piece(job, number, piece, now)
      if piece.finish:
        del self._jobs[event.number]
      pieces.setdefault(id(job), (job, []))[1].append(piece)
    for job, pieces_of_job in pieces.values():
      job.put(pieces_of_job)

  def _fail(self, error: Exception) -> None:
    """Answers every request, now and later, with an error: the engine's state cannot be trusted any more."""
    self.broken = f'the model failed ({in_a_line(error)[:200]}); restart the server.'
    failure = api_errors.server_error(self.broken, 503, 'model_failed')
    for job in {id(job): job for job in self._jobs.values()}.values():
      job.put([failure])
    while True:
      command, value = self._inbox.get()
      if command == 'stop':
        return
      if command == 'submit':
        value.put([failure])
      elif command == 'call' and value[0].set_running_or_notify_cancel():
        value[0].set_exception(failure)


def _piece(number: int, text: str, completion: Completion, sent: int) -> Piece:
  """Returns what a completion has beyond the tokens that were sent."""
  return Piece(
    number,
    text,
    completion.tokens[sent:],
    completion.logprobs[sent:],
    completion.top[sent:],
    completion.finish,
    completion.error,
  )


def _do(future: concurrent.futures.Future, function: Callable, args: tuple) -> None:
  """Calls a function and puts its result, or its error, into the future."""
  # The client may have gone while the command waited.
  if not future.set_running_or_notify_cancel():
    return
  try:
    future.set_result(function(*args))
  except Exception as error:
    future.set_exception(error)
