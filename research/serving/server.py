"""The server: it opens the model, listens, and on SIGTERM answers what it has begun before it ends."""

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
from research.serving.served import Served

KEY = 'ISOFLOP_API_KEY'  # the environment variable with the API key
LARGEST_BODY = 8 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Knobs:
  """How a server runs.

  Attributes:
    host, port: where it listens; port 0 takes a free one.
    queue: how many requests may wait or be at work.
    timeout: the most seconds of an answer.
    drain: after SIGTERM, the most seconds for what was begun.
  """

  host: str = '127.0.0.1'
  port: int = 8000
  queue: int = 64
  timeout: float = 600.0
  drain: float = 30.0


def api_key(host: str) -> str | None:
  """The key that the environment names; None for none.

  Raises:
    UserError: there is none, and other machines reach the server.
  """
  key = os.environ.get(KEY, '').strip()
  if not key and host not in LOOPBACK:
    raise UserError(
      f'--host={host}: other machines can reach this, so set {KEY} to a key that requests must have, or '
      'listen on 127.0.0.1.'
    )
  return key or None


def serve(
  open_model: Callable[[], Served],
  mesh: Callable[[], contextlib.AbstractContextManager],
  knobs: Knobs,
  log: Callable[[str], None] = print,
) -> int:
  """Serves a model until a signal; the exit status.

  Args:
    open_model: opens the model; called in the model's thread, where `mesh` is in use.
    log: told where the server listens.

  Raises:
    UserError: the model cannot be opened, the port is taken, or there is no key where one is needed.
  """
  key = api_key(knobs.host)
  address = bind(knobs.host, knobs.port)
  thread = ModelThread(open_model, mesh, knobs.queue, Metrics())
  served = thread.start()
  app = make_app(
    served, thread, key=key, timeout=knobs.timeout, largest=LARGEST_BODY,
    only_loopback=key is None,
  )  # fmt: skip
  config = config_of(app, knobs.host, knobs.port, knobs.drain)
  server = Server(config, thread, lambda url: log(f'{served.name} at {url}'))
  try:
    server.run([address])
  except OSError as error:  # another program began to listen there while the model was read
    raise _cannot_listen(knobs.host, knobs.port, error) from None
  finally:
    thread.stop()
  return 1 if thread.broken else 0


def bind(host: str, port: int) -> socket.socket:
  """A socket at an address, on which nothing listens yet: so a port that is taken shows before a model is read.

  Raises:
    UserError: the address is taken, or is not this machine's.
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
  """uvicorn's server. It ends with status 0 after a signal, and by itself where the model failed."""

  def __init__(self, config: uvicorn.Config, thread: ModelThread, announce: Callable[[str], None]):
    super().__init__(config)
    self.thread, self.announce = thread, announce

  @contextlib.contextmanager
  def capture_signals(self):
    if threading.current_thread() is not threading.main_thread():  # only that one may
      yield
      return
    # uvicorn's own raises the signal again in the end, and a drained server has nothing to complain about.
    before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
      yield
    finally:
      for one, handler in before.items():
        signal.signal(one, handler)

  async def startup(self, sockets=None) -> None:
    await super().startup(sockets)
    if self.started:
      host, port = self.servers[0].sockets[0].getsockname()[:2]
      shown = f'[{host}]' if ':' in host else host
      self.announce(f'http://{shown}:{port}')

  async def on_tick(self, counter: int) -> bool:
    return await super().on_tick(counter) or bool(self.thread.broken)
