"""The application: the paths, who may use them, and the responses to errors."""

import hmac
import importlib.resources
import re
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from research.core.errors import UserError
from research.serving import api_errors
from research.serving.api_errors import ApiError, client_gone
from research.serving.endpoint import Endpoint
from research.serving.metrics import Metrics
from research.serving.model_thread import ModelThread
from research.serving.served_model import ServedModel

LOOPBACK = ('127.0.0.1', 'localhost', '::1')
LOOPBACK_HOSTS = ('127.0.0.1', 'localhost', '[::1]')  # the same, as they stand in the header Host
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
  guards = [Middleware(Guard, metrics=thread.metrics, key=key, only_loopback=only_loopback)]
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
    ClientDisconnect: _on_hang_up,
    TimeoutError: _on_timeout,
    Exception: _on_unexpected,
  }
  return Starlette(routes=routes, middleware=guards, exception_handlers=handlers)


class Guard:
  """Middleware that checks the name and the key of requests, and counts responses by path and status.

  Args:
    app: the application behind it.
    metrics: the server's metrics.
    key: the API key; None for none.
    only_loopback: whether requests must name this machine by one of its own names.
  """

  def __init__(self, app, metrics: Metrics, key: str | None, only_loopback: bool):
    self.app = app
    self.metrics = metrics
    self.key = key
    self.only_loopback = only_loopback

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

    error = self._refusal(Request(scope))
    app = _response(error) if error else self.app
    await app(scope, receive, counted)

  def _refusal(self, request: Request) -> ApiError | None:
    """Returns why a request is refused; None if it is not."""
    name = re.sub(r':[0-9]*$', '', request.headers.get('host', '')).lower()
    if self.only_loopback and name not in LOOPBACK_HOSTS:
      return ApiError(
        f'without a key this server answers only requests to {", ".join(LOOPBACK)}, and not to {name[:80]!r}: '
        'use one of these names, or start the server with a key in ISOFLOP_API_KEY.',
        code='wrong_host',
      )
    if not self.key or request.scope['path'] in OPEN_PATHS:
      return None
    header = request.headers.get('authorization', '')
    # The time of a comparison by == would tell how much of a key is right.
    if hmac.compare_digest(header.encode(), f'Bearer {self.key}'.encode()):
      return None
    return ApiError(
      'the API key is missing or wrong: send it as Authorization: Bearer KEY.',
      status=401, kind='authentication_error', code='invalid_api_key',
      headers={'WWW-Authenticate': 'Bearer'},
    )  # fmt: skip


def _response(error: ApiError) -> JSONResponse:
  return JSONResponse(error.to_json(), error.status, error.headers)


async def _on_api_error(request: Request, error: ApiError) -> JSONResponse:
  return _response(error)


async def _on_user_error(request: Request, error: UserError) -> JSONResponse:
  """Answers an error of the rooms below: what the model cannot do."""
  return _response(ApiError(str(error)))


async def _on_http_error(request: Request, error: HTTPException) -> JSONResponse:
  """Answers a path or a method that does not exist."""
  message = f'there is no {request.method} {request.url.path[:200]} here: {error.detail}.'
  return _response(ApiError(message, status=error.status_code, headers=dict(error.headers or {})))


async def _on_hang_up(request: Request, error: ClientDisconnect) -> JSONResponse:
  """Ends a request whose client left before its body was complete. Nobody reads this."""
  return _response(client_gone())


async def _on_timeout(request: Request, error: TimeoutError) -> JSONResponse:
  return _response(
    api_errors.server_error('the answer took too long: ask for fewer tokens.', 504, 'timeout')
  )


async def _on_unexpected(request: Request, error: Exception) -> JSONResponse:
  """Answers a fault of this program. Starlette writes its traceback to the log."""
  return _response(api_errors.server_error('the server made a mistake; its log has the details.'))
