"""What is done at each path: a body is read, its requests are asked of the model, and their answers told."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator

import numpy as np
import pydantic
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from research.serving import answers, asked, bodies, openapi, refusals
from research.serving.model_thread import Job, ModelThread
from research.serving.refusals import Refused
from research.serving.served import Served

# A body that is too large is read to its end, so that the client hears why; a larger one than this is not.
READ_TO_ITS_END = 2**28


class Endpoint:
  """The handlers of all paths.

  Args:
    served: the model.
    thread: where it runs.
    timeout: the most seconds of an answer.
    largest: the most bytes of a body.
    page: the HTML of the chat page.
  """

  def __init__(
    self, served: Served, thread: ModelThread, *, timeout: float, largest: int, page: str
  ):
    self.served, self.thread, self.timeout, self.largest = served, thread, timeout, largest
    self.page, self.began = page, int(time.time())

  async def chat(self, request: Request) -> Response:
    body = await self._body(request, bodies.Chat)
    # A grammar and the texts of tokens take a while, and other streams should not wait for them.
    wanted = await asyncio.to_thread(asked.of_chat, body, self.served)
    answer = answers.ChatAnswer(wanted, await self._spelling(wanted))
    return await self._answer(request, body, wanted, answer)

  async def complete(self, request: Request) -> Response:
    body = await self._body(request, bodies.Completion)
    wanted = await asyncio.to_thread(asked.of_completion, body, self.served)
    answer = answers.TextAnswer(wanted, await self._spelling(wanted))
    if body.echo:
      return await self._echo(request, body, wanted, answer)
    return await self._answer(request, body, wanted, answer)

  async def embed(self, request: Request) -> Response:
    body = await self._body(request, bodies.Embed)
    texts = await asyncio.to_thread(asked.of_embedding, body, self.served)
    vectors = []
    async with asyncio.timeout(self.timeout):
      for tokens in texts:
        vectors.append(await self.thread.call(self.served.embed, tokens))
    if body.dimensions not in (None, len(vectors[0])):
      why = f'this model has {len(vectors[0])} dimensions; leave them out.'
      raise Refused(f'dimensions: {why}', param='dimensions')
    if not np.all(np.isfinite(vectors)):
      raise refusals.server_error('the features are not numbers: look at the checkpoint.')
    total = sum(map(len, texts))
    self.thread.metrics.prompt_tokens.inc(total)
    encode = _base64 if body.encoding_format == 'base64' else np.ndarray.tolist
    data = [
      {'object': 'embedding', 'index': number, 'embedding': encode(vector)}
      for number, vector in enumerate(vectors)
    ]
    usage = {'prompt_tokens': total, 'total_tokens': total}
    return JSONResponse({'object': 'list', 'data': data, 'model': self.served.name, 'usage': usage})

  async def models(self, request: Request) -> Response:
    return JSONResponse({'object': 'list', 'data': [self._model()]})

  async def model(self, request: Request) -> Response:
    self._check_model(request.path_params['name'])
    return JSONResponse(self._model())

  async def health(self, request: Request) -> Response:
    if self.thread.broken:
      raise refusals.server_error(self.thread.broken, 503, 'model_failed')
    return JSONResponse({'status': 'ok'})

  async def metrics(self, request: Request) -> Response:
    self.thread.metrics.open.set(self.thread.waiting)
    return Response(self.thread.metrics.text(), media_type='text/plain; version=0.0.4')

  async def describe(self, request: Request) -> Response:
    return JSONResponse(openapi.document(self.served.name))

  async def show_page(self, request: Request) -> Response:
    return HTMLResponse(self.page, headers=PAGE_HEADERS)

  def _model(self) -> dict:
    can = {
      'chat': self.served.render is not None,
      'completions': self.served.generator is not None,
      'embeddings': not self.served.two_sided,
    }
    return {
      'id': self.served.name, 'object': 'model', 'created': self.began, 'owned_by': 'isoflop',
      'context_length': self.served.room, 'can': can,
    }  # fmt: skip

  def _check_model(self, name: str) -> None:
    if name != self.served.name:
      raise Refused(
        f'there is no model {name!r} here: ask for {self.served.name!r}.',
        status=404, param='model', code='model_not_found',
      )  # fmt: skip

  async def _body(self, request: Request, kind: type[bodies.Request]):
    """The body of a request, checked."""
    given = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    if given != 'application/json':
      raise Refused('Content-Type must be application/json.', status=415)
    data = await self._read(request)
    try:
      body = kind.model_validate_json(data)
    except pydantic.ValidationError as error:
      known = [field.alias or name for name, field in kind.model_fields.items()]
      raise refusals.of_validation(error, known) from None
    self._check_model(body.model)
    return body

  async def _read(self, request: Request) -> bytes:
    data, length = bytearray(), 0
    async for part in request.stream():
      length += len(part)
      if length <= self.largest:
        data += part
      elif length > READ_TO_ITS_END:
        break
    if length > self.largest:
      message = f'the body is larger than {self.largest:,} bytes, the most that this server reads.'
      raise Refused(message, status=413, code='body_too_large')
    return bytes(data)

  async def _spelling(self, wanted: asked.Asked) -> answers.Spelling | None:
    if wanted.top is None:
      return None
    vocabulary = self.served.vocabulary
    await asyncio.to_thread(lambda: vocabulary.tokens)
    return answers.Spelling(vocabulary.spell, vocabulary.ends, wanted.top)

  async def _answer(self, request: Request, body, wanted: asked.Asked, answer) -> Response:
    job = self.thread.submit(wanted.requests)
    self.thread.metrics.prompt_tokens.inc(wanted.prompt_tokens)
    if body.stream:
      events = self._events(job, body, wanted, answer)
      return _Stream(job, events, media_type='text/event-stream', headers=STREAM_HEADERS)
    whole = await _unless_gone(request, job, self._whole(job, wanted, answer))
    return JSONResponse(whole)

  async def _whole(self, job: Job, wanted: asked.Asked, answer, echoes=None) -> dict:
    choices = echoes or [[] for _ in wanted.requests]
    usage = answers.Usage(wanted.prompt_tokens)
    async with asyncio.timeout(self.timeout):
      async for piece in job:
        answers.check(piece, wanted.requests[piece.number])
        usage.generated += len(piece.tokens)
        choices[piece.number] += answer.choices(piece)
    return self._envelope_of(answer, choices, usage)

  def _envelope_of(self, answer, choices: list[list[dict]], usage: answers.Usage) -> dict:
    whole = answers.envelope(answer, self.served.name, chunk=False)
    whole['choices'] = [answer.whole(number, some) for number, some in enumerate(choices)]
    return whole | {'usage': usage.to_json()}

  async def _events(self, job: Job, body, wanted: asked.Asked, answer) -> AsyncIterator[str]:
    """Server-sent events of a stream. What goes wrong after its beginning is an event too."""
    envelope = answers.envelope(answer, self.served.name, chunk=True)
    counts = body.stream_options is not None and body.stream_options.include_usage
    usage = answers.Usage(wanted.prompt_tokens)

    def event(choices: list[dict], total: dict | None = None) -> str:
      more = {'usage': total} if counts else {}
      return _event({**envelope, 'choices': choices, **more})

    try:
      for choice in answer.first():
        yield event([choice])
      async with asyncio.timeout(self.timeout):
        async for piece in job:
          answers.check(piece, wanted.requests[piece.number])
          usage.generated += len(piece.tokens)
          for choice in answer.choices(piece):
            yield event([choice])
      if counts:
        yield event([], usage.to_json())
      yield 'data: [DONE]\n\n'
    except TimeoutError:
      yield _event(self._too_slow().to_json())
    except Refused as refusal:
      yield _event(refusal.to_json())

  async def _echo(self, request: Request, body, wanted: asked.Asked, answer) -> Response:
    """A completion with its prompt in front, and how likely the model held each of the prompt's tokens."""
    scores = [None] * len(wanted.requests)
    tokens = [one.prompt for one in wanted.requests]
    if wanted.top is not None:
      async with asyncio.timeout(self.timeout):
        for number, prompt in enumerate(tokens):
          same = number - number % wanted.answers
          top = wanted.requests[0].top
          scores[number] = (
            scores[same]
            if number != same
            else await self.thread.call(self.served.score, prompt, top)
          )
    texts = [self.served.vocabulary.decode(prompt) for prompt in tokens]
    echoes = [
      [answer.echo(number, tokens[number], texts[number], scores[number])]
      for number in range(len(tokens))
    ]
    if body.max_tokens == 0:
      for choices in echoes:
        choices[-1]['finish_reason'] = 'length'
      return JSONResponse(self._envelope_of(answer, echoes, answers.Usage(wanted.prompt_tokens)))
    job = self.thread.submit(wanted.requests)
    whole = self._whole(job, wanted, answer, echoes)
    return JSONResponse(await _unless_gone(request, job, whole))

  def _too_slow(self) -> Refused:
    return refusals.server_error(
      f'the answer took longer than {self.timeout:g} s: ask for fewer tokens.', 504, 'timeout'
    )


STREAM_HEADERS = {'Cache-Control': 'no-cache', 'X-Accel-Buffering': 'no'}
# The page is one file: nothing else may be loaded, nor may another page frame it.
PAGE_HEADERS = {
  'Cache-Control': 'no-cache',
  'Content-Security-Policy': (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  'X-Content-Type-Options': 'nosniff',
}


def _event(value: dict) -> str:
  return f'data: {json.dumps(value, ensure_ascii=False)}\n\n'


def _base64(vector: np.ndarray) -> str:
  return base64.b64encode(vector.astype('<f4').tobytes()).decode()


class _Stream(StreamingResponse):
  """A stream that ends its job, also where the client is gone before it begins."""

  def __init__(self, job: Job, *args, **knobs):
    super().__init__(*args, **knobs)
    self.job = job

  async def __call__(self, scope, receive, send) -> None:
    try:
      await super().__call__(scope, receive, send)
    finally:
      self.job.cancel()


async def _unless_gone(request: Request, job: Job, answer) -> dict:
  """What `answer` gives; a client that hangs up ends its job."""
  work = asyncio.ensure_future(answer)
  gone = asyncio.ensure_future(_hung_up(request))
  try:
    await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise Refused('the client is gone.', status=499)
    return work.result()
  finally:
    work.cancel()
    gone.cancel()
    job.cancel()


async def _hung_up(request: Request) -> None:
  while (await request.receive())['type'] != 'http.disconnect':
    pass
