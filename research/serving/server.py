"""The server: it opens the model and listens. On SIGTERM it finishes the answers that it has begun."""

import contextlib
import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette

from research.core.errors import UserError
from research.serving.app import LOOPBACK, make_app
from research.serving.metrics import Metrics
from research.serving.model_thread import ModelThread
from research.serving.served_model import ServedModel

KEY = 'ISOFLOP_API_KEY'  # the environment variable with the API key
LARGEST_BODY = 8 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Knobs:
  """How a server runs.

  Attributes:
    host: the address on which it listens.
    port: its port; 0 takes a free one.
    queue: how many requests may wait or be active.
    timeout: the most seconds of an answer.
    drain: after SIGTERM, the most seconds for answers that were begun.
    origins: the origins whose web pages may send requests from a browser.
  """

  host: str = '127.0.0.1'
  port: int = 8000
  queue: int = 64
  timeout: float = 600.0
  drain: float = 30.0
  origins: tuple[str, ...] = ()


def api_key(host: str) -> str | None:
  """Returns the API key of the environment, None if there is none.

  Raises:
    UserError: there is none, and other machines can reach the server.
  """
  key = os.environ.get(KEY, '').strip()
  if not key and host not in LOOPBACK:
    raise UserError(
      f'--host={host}: other machines can reach this, so set {KEY} to a key that requests must have, or '
      'listen on 127.0.0.1.'
    )
  return key or None


def serve(
  open_model: Callable[[], ServedModel],
  mesh: Callable[[], contextlib.AbstractContextManager],
  knobs: Knobs,
  log: Callable[[str], None] = print,
) -> int:
  """Serves a model until a signal; returns the exit status.

  Args:
    open_model: opens the model. The model's thread calls it, under the mesh.
    mesh: returns the context in which the mesh is in use.
    knobs: how the server runs.
    log: receives the line with the server's address.

  Raises:
    UserError: the model cannot be opened, the port is taken, or a key is needed and missing.
  """
  key = api_key(knobs.host)
  listening = bind(knobs.host, knobs.port)
  thread = ModelThread(open_model, mesh, knobs.queue, Metrics())
  model = thread.start()
  app = make_app(
    model, thread, key=key, timeout=knobs.timeout, largest=LARGEST_BODY,
    only_loopback=key is None, origins=knobs.origins,
  )  # fmt: skip

  def announce(url: str) -> None:
    log(f'{model.name} at {url}')

  server = Server(config_of(app, knobs.host, knobs.port, knobs.drain), thread, announce)
  try:
    server.run([listening])
  except OSError as error:  # another program began to listen there while the model was read
    raise _cannot_listen(knobs.host, knobs.port, error) from None
  finally:
    thread.stop()
  return 1 if thread.broken else 0


def bind(host: str, port: int) -> socket.socket:
  """Returns a socket with this address, before anything listens on it. So a taken port is an error before the
  model is read.

  Raises:
    UserError: the address is taken, or belongs to another machine.
  """
  bound = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET)
  bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    bound.bind((host, port))
  except OSError as error:
    bound.close()
    raise _cannot_listen(host, port, error) from None
  return bound


def _cannot_listen(host: str, port: int, error: OSError) -> UserError:
  return UserError(
    f'nothing can listen on {host}:{port} ({error.strerror}): choose another --port, or another --host.'
  )


def config_of(app: Starlette, host: str, port: int, drain: float) -> uvicorn.Config:
  return uvicorn.Config(
    app, host=host, port=port, log_level='warning', access_log=False, server_header=False,
    lifespan='off', ws='none', timeout_graceful_shutdown=max(1, int(drain)),
  )  # fmt: skip


class Server(uvicorn.Server):
  """uvicorn's server. It ends with status 0 after a signal, and by itself if the model fails.

  Args:
    config: uvicorn's settings.
    thread: the model's thread.
    announce: receives the server's URL once it listens.
  """

  def __init__(self, config: uvicorn.Config, thread: ModelThread, announce: Callable[[str], None]):
    super().__init__(config)
    self.thread = thread
    self.announce = announce

  @contextlib.contextmanager
  def capture_signals(self):
    if threading.current_thread() is not threading.main_thread():  # Python allows it only there
      yield
      return
    # uvicorn's own version raises the signal again at the end, but a drained server should end with status 0.
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, self.handle_exit) for number in numbers}
    try:
      yield
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    if self.started:
      # With port 0 only the socket knows the port.
      host, port = self.servers[0].sockets[0].getsockname()[:2]
      shown = f'[{host}]' if ':' in host else host
      self.announce(f'http://{shown}:{port}')

  async def on_tick(self, counter: int) -> bool:
    return await super().on_tick(counter) or bool(self.thread.broken)
