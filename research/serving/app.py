"""The application: the paths, who may use them, and the responses to errors."""

import hmac
import importlib.resources
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from research.core.errors import UserError
from research.serving import api_errors
from research.serving.api_errors import ApiError
from research.serving.endpoint import Endpoint
from research.serving.metrics import Metrics
from research.serving.model_thread import ModelThread
from research.serving.served_model import ServedModel

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
# These need no key, because they say nothing about the model.
OPEN_PATHS = ('/', '/health')
PATHS = {
  '/', '/health', '/metrics', '/openapi.json', '/v1/models', '/v1/chat/completions', '/v1/completions',
  '/v1/embeddings',
}  # fmt: skip


def make_app(
  model: ServedModel,
  thread: ModelThread,
  *,
  key: str | None,
  timeout: float,
  largest: int,
  only_loopback: bool,
  origins: Sequence[str] = (),
) -> Starlette:
  """Returns the application of a model.

  Args:
    model: the model.
    thread: the thread that runs it.
    key: the API key that requests must have; None for none.
    timeout: the most seconds of an answer.
    largest: the most bytes of a body.
    only_loopback: whether requests must name this machine by one of its own names. Otherwise a web page could
      reach the server under the page's name (DNS rebinding).
    origins: the web pages of other servers that may send requests from a browser (CORS), such as
      'http://localhost:3000'.
  """
  page = importlib.resources.files('research.serving').joinpath('page.html').read_text()
  endpoint = Endpoint(model, thread, timeout=timeout, largest=largest, page=page)
  routes = [
    Route('/', endpoint.show_page),
    Route('/health', endpoint.health),
    Route('/metrics', endpoint.metrics),
    Route('/openapi.json', endpoint.describe),
    Route('/v1/models', endpoint.list_models),
    Route('/v1/models/{name:path}', endpoint.describe_model),
    Route('/v1/chat/completions', endpoint.chat, methods=['POST']),
    Route('/v1/completions', endpoint.complete, methods=['POST']),
    Route('/v1/embeddings', endpoint.embed, methods=['POST']),
  ]
  guards = [Middleware(Guard, metrics=thread.metrics, key=key)]
  if only_loopback:
    names = [*LOOPBACK, '[::1]']
    guards.insert(0, Middleware(TrustedHostMiddleware, allowed_hosts=names, www_redirect=False))
  if origins:
    # The outermost, because a browser asks for permission (OPTIONS) without the key.
    cors = Middleware(
      CORSMiddleware, allow_origins=origins, allow_methods=['GET', 'POST'], allow_headers=['*'],
      expose_headers=['Retry-After'],
    )  # fmt: skip
    guards.insert(0, cors)
  handlers = {
    ApiError: _on_api_error,
    UserError: _on_user_error,
    HTTPException: _on_http_error,
    TimeoutError: _on_timeout,
    Exception: _on_unexpected,
  }
  return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


class Guard:
  """Middleware that checks the key and counts responses by path and status.

  Args:
    app: the application behind it.
    metrics: the server's metrics.
    key: the API key; None for none.
  """

  def __init__(self, app, metrics: Metrics, key: str | None):
    self.app = app
    self.metrics = metrics
    self.key = key

  async def __call__(self, scope, receive, send) -> None:
    if scope['type'] != 'http':
      await self.app(scope, receive, send)
      return

    async def counted(message):
      if message['type'] == 'http.response.start':
        # Only paths that exist get a series of their own. Otherwise clients could create any number.
        path = scope['path'] if scope['path'] in PATHS else 'other'
        self.metrics.requests.labels(path, message['status']).inc()
      await send(message)

    if self.key and scope['path'] not in OPEN_PATHS and not self._has_key(scope):
      error = ApiError(
        'the API key is missing or wrong: send it as Authorization: Bearer KEY.',
        status=401, kind='authentication_error', code='invalid_api_key',
        headers={'WWW-Authenticate': 'Bearer'},
      )  # fmt: skip
      await _response(error)(scope, receive, counted)
      return
    await self.app(scope, receive, counted)

  def _has_key(self, scope) -> bool:
    header = Request(scope).headers.get('authorization', '')
    # The time of a comparison by == would tell how much of a key is right.
    return hmac.compare_digest(header.encode(), f'Bearer {self.key}'.encode())


def _response(error: ApiError) -> JSONResponse:
  return JSONResponse(error.to_json(), error.status, error.headers)


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
  return _response(error)


async def _on_user_error(request: Request, error: UserError) -> JSONResponse:
  """Answers an error of the rooms below: what the model cannot do."""
  return _response(ApiError(str(error)))


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
  """Answers a path or a method that does not exist."""
  message = f'there is no {request.method} {request.url.path} here: {error.detail}.'
  return _response(ApiError(message, status=error.status_code, headers=dict(error.headers or {})))


async def _on_timeout(request: Request, error: TimeoutError) -> JSONResponse:
  return _response(
    api_errors.server_error('the answer took too long: ask for fewer tokens.', 504, 'timeout')
  )


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
  """Answers a fault of this program. Starlette writes its traceback to the log."""
  return _response(api_errors.server_error('the server made a mistake; its log has the details.'))
