"""The application: which path goes where, who may ask, and what a mistake looks like."""

import hmac
import importlib.resources

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from research.core.errors import UserError
from research.serving import refusals
from research.serving.endpoint import Endpoint
from research.serving.metrics import Metrics
from research.serving.model_thread import ModelThread
from research.serving.refusals import Refused
from research.serving.served import Served

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
# What may be seen without the key: neither says anything of the model.
OPEN_PATHS = ('/', '/health')
PATHS = {
  '/', '/health', '/metrics', '/openapi.json', '/v1/models', '/v1/chat/completions', '/v1/completions',
  '/v1/embeddings',
}  # fmt: skip


def make_app(
  served: Served,
  thread: ModelThread,
  *,
  key: str | None,
  timeout: float,
  largest: int,
  only_loopback: bool,
) -> Starlette:
  """The application of a model.

  Args:
    key: that requests must have; None for none.
    timeout: the most seconds of an answer.
    largest: the most bytes of a body.
    only_loopback: whether only this machine's names are answered, so that no page of the web reaches the server
      by a name of its own.
  """
  page = importlib.resources.files('research.serving').joinpath('page.html').read_text()
  endpoint = Endpoint(served, thread, timeout=timeout, largest=largest, page=page)
  routes = [
    Route('/', endpoint.show_page),
    Route('/health', endpoint.health),
    Route('/metrics', endpoint.metrics),
    Route('/openapi.json', endpoint.describe),
    Route('/v1/models', endpoint.models),
    Route('/v1/models/{name:path}', endpoint.model),
    Route('/v1/chat/completions', endpoint.chat, methods=['POST']),
    Route('/v1/completions', endpoint.complete, methods=['POST']),
    Route('/v1/embeddings', endpoint.embed, methods=['POST']),
  ]
  guards = [Middleware(Watch, metrics=thread.metrics, key=key)]
  if only_loopback:
    names = [*LOOPBACK, '[::1]']
    guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
  handlers = {
    Refused: _refuse,
    UserError: _refuse_wrong,
    HTTPException: _refuse_http,
    TimeoutError: _refuse_slow,
    Exception: _refuse_unexpected,
  }
  return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


class Watch:
  """Asks for the key, and counts answers by path and status."""

  def __init__(self, app, metrics: Metrics, key: str | None):
    self.app, self.metrics, self.key = app, metrics, key

  async def __call__(self, scope, receive, send) -> None:
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return

    async def counted(message):
      if message['type'] == 'http.response.start':
        # Only paths that exist, or anybody could make as many series as there are words.
        path = scope['path'] if scope['path'] in PATHS else 'other'
        self.metrics.requests.labels(path, message['status']).inc()
      await send(message)

    if self.key and scope['path'] not in OPEN_PATHS and not self._has_key(scope):
      refusal = Refused(
        'the API key is missing or wrong: send it as Authorization: Bearer KEY.',
        status=401, kind='authentication_error', code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )  # fmt: skip
      await _respond(refusal)(scope, receive, counted)
      return
    await self.app(scope, receive, counted)

  def _has_key(self, scope) -> bool:
    given = Request(scope).headers.get('authorization', '')
    return hmac.compare_digest(given.encode(), f'Bearer {self.key}'.encode())


def _respond(refusal: Refused) -> JSONResponse:
  return JSONResponse(refusal.to_json(), refusal.status, refusal.headers)


async def _refuse(request: Request, refusal: Refused) -> JSONResponse:
  return _respond(refusal)


async def _refuse_wrong(request: Request, error: UserError) -> JSONResponse:
  """What the model cannot do, told by the rooms below."""
  return _respond(Refused(str(error)))


async def _refuse_http(request: Request, error: HTTPException) -> JSONResponse:
  """A path or a method that does not exist."""
  message = f'there is no {request.method} {request.url.path} here: {error.detail}.'
  return _respond(Refused(message, status=error.status_code, headers=dict(error.headers or {})))


async def _refuse_slow(request: Request, error: TimeoutError) -> JSONResponse:
  return _respond(
    refusals.server_error('the answer took too long: ask for fewer tokens.', 504, 'timeout')
  )


async def _refuse_unexpected(request: Request, error: Exception) -> JSONResponse:
  """A mistake of this program; the log has its traceback."""
  return _respond(refusals.server_error('the server made a mistake, which its log tells.'))
