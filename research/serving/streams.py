"""Responses that end with their client: a client that hangs up gives its slots back at once."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine

from starlette.requests import Request
from starlette.responses import StreamingResponse

from research.serving.api_errors import client_gone
from research.serving.model_thread import Job

# A proxy in front (nginx) must not hold events back.
HEADERS = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}


def event_text(value: dict) -> str:
  """Returns a server-sent event with a value as JSON."""
  # In ASCII, because some clients take U+2028 for the end of a line.
  return f'data: {json.dumps(value)}\n\n'


class EventStream(StreamingResponse):
  """A stream of server-sent events. At its end it cancels its job, even if the client is gone before it begins.

  Args:
    job: the job of the stream.
    events: the events, as of `event_text`.
  """

  def __init__(self, job: Job, events: AsyncIterator[str]):
    super().__init__(events, media_type='text/event-stream', headers=HEADERS)
    self.job = job

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self.job.cancel()


async def unless_gone(request: Request, answer: Coroutine, job: Job | None = None):
  """Returns the result of the coroutine `answer`. If the client hangs up before, it cancels that and the job.

  Args:
    request: whose body was read.
    answer: what computes the answer.
    job: what it waits for, if the engine works for it.

  Raises:
    ApiError: the client has hung up. Nobody reads it, but the metrics count its status.
  """
  work = asyncio.ensure_future(answer)
  gone = asyncio.ensure_future(_hung_up(request))
  try:
    await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise client_gone()
    return work.result()
  finally:
    work.cancel()
    gone.cancel()
    if job:
      job.cancel()


async def _hung_up(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass
