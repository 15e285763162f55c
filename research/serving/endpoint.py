"""The handlers of the paths: each reads a body, sends its requests to the model, and returns the answers."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator

import numpy as np
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from research.serving import answers, api_errors, bodies, engine_requests, openapi
from research.serving.api_errors import ApiError
from research.serving.body_reader import read_body
from research.serving.engine_requests import EngineRequests
from research.serving.model_thread import Job, ModelThread
from research.serving.served_model import ServedModel
from research.serving.streams import EventStream, event_text, unless_gone


class Endpoint:
  """The handlers of all paths.

  Args:
    model: the model.
    thread: the thread that runs it.
    timeout: the most seconds of an answer.
    largest: the most bytes of a body.
    page: the HTML of the chat page.
  """

  def __init__(
    self, model: ServedModel, thread: ModelThread, *, timeout: float, largest: int, page: str
  ):
    self.model = model
    self.thread = thread
    self.timeout = timeout
    self.largest = largest
    self.page = page
    self.began = int(time.time())

  async def chat(self, request: Request) -> Response:
    """POST /v1/chat/completions"""
    body = await self._body(request, bodies.Chat)
    # Grammars and tokenizers take a while. In a thread of their own they do not hold up other streams.
    requests = await asyncio.to_thread(engine_requests.of_chat, body, self.model)
    answer = answers.ChatAnswer(requests, await self._spelling(requests))
    return await self._answer(request, body, requests, answer)

  async def complete(self, request: Request) -> Response:
    """POST /v1/completions"""
    body = await self._body(request, bodies.Completion)
    requests = await asyncio.to_thread(engine_requests.of_completion, body, self.model)
    answer = answers.TextAnswer(requests, await self._spelling(requests))
    if body.echo:
      return await self._echo(request, body, requests, answer)
    return await self._answer(request, body, requests, answer)

  async def embed(self, request: Request) -> Response:
    """POST /v1/embeddings"""
    body = await self._body(request, bodies.Embed)
    texts = await asyncio.to_thread(engine_requests.of_embedding, body, self.model)
    vectors = await unless_gone(request, self._vectors(texts, body.dimensions))
    if not np.all(np.isfinite(vectors)):
      raise api_errors.server_error(
        'the features are not numbers (NaN or infinite): check the checkpoint.'
      )
    total = sum(map(len, texts))
    self.thread.metrics.prompt_tokens.inc(total)
    encode = _base64 if body.encoding_format == 'base64' else np.ndarray.tolist
    data = [
      {'object': 'embedding', 'index': number, 'embedding': encode(vector)}
      for number, vector in enumerate(vectors)
    ]
    usage = {'prompt_tokens': total, 'total_tokens': total}
    return JSONResponse({'object': 'list', 'data': data, 'model': self.model.name, 'usage': usage})

  async def _vectors(self, texts: list[list[int]], dimensions: int | None) -> list[np.ndarray]:
    """Returns the embeddings of texts.

    Raises:
      ApiError: the model has other dimensions than those that the client wants (None for any).
    """
    vectors = []
    async with asyncio.timeout(self.timeout):
      for tokens in texts:
        vectors.append(await self.thread.call(self.model.embed, tokens))
        if dimensions not in (None, len(vectors[0])):
          why = f'this model has {len(vectors[0])} dimensions; leave them out.'
          raise ApiError(f'dimensions: {why}', param='dimensions')
    return vectors

  async def list_models(self, request: Request) -> Response:
    """GET /v1/models"""
    return JSONResponse({'object': 'list', 'data': [self._description()]})

  async def describe_model(self, request: Request) -> Response:
    """GET /v1/models/NAME"""
    self._check_name(request.path_params['name'])
    return JSONResponse(self._description())

  async def health(self, request: Request) -> Response:
    """GET /health"""
    if self.thread.broken:
      raise api_errors.server_error(self.thread.broken, 503, 'model_failed')
    return JSONResponse({'status': 'ok'})

  async def metrics(self, request: Request) -> Response:
    """GET /metrics"""
    self.thread.metrics.open.set(self.thread.waiting)
    return Response(self.thread.metrics.text(), media_type='text/plain; version=0.0.4')

  async def describe(self, request: Request) -> Response:
    """GET /openapi.json"""
    return JSONResponse(openapi.document(self.model.name))

  async def show_page(self, request: Request) -> Response:
    """GET /"""
    return HTMLResponse(self.page, headers=PAGE_HEADERS)

  def _description(self) -> dict:
    """Returns the protocol's model object. `context_length` and `can` are beyond the protocol."""
    can = {
      'chat': self.model.render is not None,
      'completions': self.model.generator is not None,
      'embeddings': not self.model.two_sided,
    }
    return {
      'id': self.model.name, 'object': 'model', 'created': self.began, 'owned_by': 'isoflop',
      'context_length': self.model.room, 'can': can,
    }  # fmt: skip

  def _check_name(self, name: str) -> None:
    if name != self.model.name:
      raise ApiError(
        f'there is no model {name[:80]!r} here: ask for {self.model.name!r}.',
        status=404, param='model', code='model_not_found',
      )  # fmt: skip

  async def _body(self, request: Request, kind: type[bodies.Request]):
    """Returns the checked body of a request (`read_body`), which names this model."""
    body = await read_body(request, kind, self.largest, self.timeout)
    self._check_name(body.model)
    return body

  async def _spelling(self, requests: EngineRequests) -> answers.Spelling | None:
    """Returns what writes log-probabilities; None if the client wants none."""
    if requests.top is None:
      return None
    vocabulary = self.model.vocabulary
    # The first use takes seconds for a large vocabulary.
    await asyncio.to_thread(vocabulary.spell, 0)
    return answers.Spelling(vocabulary.spell, vocabulary.ends, requests.top)

  async def _answer(self, request: Request, body, requests: EngineRequests, answer) -> Response:
    """Returns the answer to a body, as a stream or whole.

    Args:
      request: the HTTP request.
      body: its body.
      requests: the engine's requests of the body.
      answer: an `answers.ChatAnswer` or an `answers.TextAnswer`.
    """
    job = self.thread.submit(requests.requests)
    self.thread.metrics.prompt_tokens.inc(requests.prompt_tokens)
    if body.stream:
      return EventStream(job, self._events(job, body, requests, answer))
    whole = await unless_gone(request, self._whole(job, requests, answer), job)
    return JSONResponse(whole)

  async def _whole(self, job: Job, requests: EngineRequests, answer, echoes=None) -> dict:
    """Returns an answer that is not streamed. `echoes` are the choices that come before those of the pieces."""
    choices = echoes or [[] for _ in requests.requests]
    usage = answers.Usage(requests.prompt_tokens)
    async with asyncio.timeout(self.timeout):
      async for piece in job:
        answers.check(piece, requests.requests[piece.number])
        usage.generated += len(piece.tokens)
        choices[piece.number] += answer.choices(piece)
    return self._envelope_of(answer, choices, usage)

  def _envelope_of(self, answer, choices: list[list[dict]], usage: answers.Usage) -> dict:
    whole = answers.envelope(answer, self.model.name, chunk=False)
    whole['choices'] = [
      answer.whole(number, of_request) for number, of_request in enumerate(choices)
    ]
    return whole | {'usage': usage.to_json()}

  async def _events(self, job: Job, body, requests: EngineRequests, answer) -> AsyncIterator[str]:
    """Yields the server-sent events of a stream. After its beginning an error is an event too."""
    envelope = answers.envelope(answer, self.model.name, chunk=True)
    counts = body.stream_options is not None and body.stream_options.include_usage
    usage = answers.Usage(requests.prompt_tokens)

    def event(choices: list[dict], total: dict | None = None) -> str:
      # With `include_usage` every chunk has the field, and all but the last have null in it.
      more = {'usage': total} if counts else {}
      return event_text({**envelope, 'choices': choices, **more})

    try:
      for choice in answer.first():
        yield event([choice])
      async with asyncio.timeout(self.timeout):
        async for piece in job:
          answers.check(piece, requests.requests[piece.number])
          usage.generated += len(piece.tokens)
          for choice in answer.choices(piece):
            yield event([choice])
      if counts:
        yield event([], usage.to_json())
      yield 'data: [DONE]\n\n'
    except TimeoutError:
      yield event_text(self._too_slow().to_json())
    except ApiError as error:
      yield event_text(error.to_json())

  async def _echo(self, request: Request, body, requests: EngineRequests, answer) -> Response:
    """Returns completions that begin with their prompts, and the log-probabilities of the prompts' tokens."""
    scores = await unless_gone(request, self._scores_of_prompts(requests))
    echoes = []
    for number, engine_request in enumerate(requests.requests):
      text = self.model.vocabulary.decode(engine_request.prompt)
      echoes.append([answer.echo(number, engine_request.prompt, text, scores[number])])
    if body.max_tokens == 0:
      for choices in echoes:
        choices[-1]['finish_reason'] = 'length'
      return JSONResponse(self._envelope_of(answer, echoes, answers.Usage(requests.prompt_tokens)))
    job = self.thread.submit(requests.requests)
    whole = self._whole(job, requests, answer, echoes)
    return JSONResponse(await unless_gone(request, whole, job))

  async def _scores_of_prompts(self, requests: EngineRequests) -> list:
    """Returns the scores of each request's prompt; None for each if the client wants none."""
    if requests.top is None:
      return [None] * len(requests.requests)
    scores = []
    async with asyncio.timeout(self.timeout):
      # The answers to one prompt are side by side, so it is scored once.
      for engine_request in requests.requests[:: requests.answers]:
        score = await self.thread.call(self.model.score, engine_request.prompt, engine_request.top)
        scores += [score] * requests.answers
    return scores

  def _too_slow(self) -> ApiError:
    return api_errors.server_error(
      f'the answer took longer than {self.timeout:g} s: ask for fewer tokens.', 504, 'timeout'
    )


# The page is one file. It may load nothing else, and no other page may frame it.
PAGE_HEADERS = {
  'Cache-Control': 'no-cache',
  'Content-Security-Policy': (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
  ),
  'X-Content-Type-Options': 'nosniff',
}


def _base64(vector: np.ndarray) -> str:
  return base64.b64encode(vector.astype('<f4').tobytes()).decode()
