"""Serves a trained model by OpenAI's protocol, with a chat page at /.

    python -m research.serve --checkpoint=runs/tiny
    python -m research.serve --hf=FOLDER --port=8000 --slots=16

The checkpoint is a run's workdir or a converted model's folder; --hf reads a Hugging Face folder as it is. The
server answers /v1/chat/completions, /v1/completions, /v1/embeddings and /v1/models. The environment variable
ISOFLOP_API_KEY holds the API key; a server that other machines can reach needs one.

The server uses one device, unless gin names a mesh over all of them: --gin.Mesh.tensor=2
"""

import argparse
import re

from research.core import cli

DEFAULT_MESH_FILE = 'gin/meshes/data.gin'  # bindings without a file change this mesh


def _origin(text: str) -> str:
  """Returns the origin of a web page, as a browser writes it."""
  if not re.fullmatch(r'https?://[^/*\s]+', text):
    raise argparse.ArgumentTypeError(
      f'{text!r} is no origin: write http://NAME:PORT or https://NAME.'
    )
  return text


def _flags():
  parser = cli.parser('serve', __doc__, gin=False)
  parser.add_argument('--checkpoint', metavar='DIR', help="a run's or a converted model's folder")
  parser.add_argument('--hf', metavar='FOLDER', help='config.json, *.safetensors and a tokenizer')
  what = "the model's name in requests (default: the folder's)"
  parser.add_argument('--name', default='', help=what)
  what = "a chat template's file, or plain; default: the model's own"
  parser.add_argument('--template', metavar='FILE', help=what)
  what = 'a mesh over all devices (gin/meshes); default: one device'
  parser.add_argument('--gin_file', action='append', default=[], metavar='FILE', help=what)
  parser.add_argument('--host', default='127.0.0.1', help='(default 127.0.0.1)')
  numbers = {
    'port': (8000, '0 takes a free one'),
    'slots': (8, 'requests that are answered at once'),
    'room': (0, 'the most tokens of a prompt and its answer; 0 is the length of the training'),
    'queue': (64, 'requests that may wait or be active; more are refused (429)'),
    'kept': (4, 'prompts that stay in the cache, for prompts that begin with them'),
  }
  for name, (default, what) in numbers.items():
    parser.add_argument(f'--{name}', type=int, default=default, help=f'{what} (default {default})')
  seconds = {
    'timeout': (600, 'the most seconds of an answer'),
    'drain': (30, 'after SIGTERM, the most seconds for answers that were begun'),
  }
  for name, (default, what) in seconds.items():
    parser.add_argument(
      f'--{name}', type=float, default=default, help=f'{what} (default {default})'
    )
  what = 'the server of web pages that may ask from a browser; may be repeated'
  parser.add_argument(
    '--allow_origin', action='append', default=[], type=_origin, metavar='URL', help=what
  )
  parser.add_argument('--int8', action='store_true', help='stores keys and values in int8')
  flags = cli.parse(parser)
  if bool(flags.checkpoint) == bool(flags.hf):
    parser.error('give one of --checkpoint and --hf.')
  for name in ('slots', 'queue', 'timeout'):
    if not getattr(flags, name) > 0:
      parser.error(f'--{name}={getattr(flags, name)} must be above 0.')
  for name in ('port', 'room', 'kept', 'drain'):
    if not getattr(flags, name) >= 0:
      parser.error(f'--{name}={getattr(flags, name)} must be 0 or more.')
  if flags.port > 65535:
    parser.error(f'--port={flags.port} must be at most 65535.')
  return flags


if __name__ == '__main__':
  FLAGS = _flags()
  cli.use_huge_pages()

from research.core.errors import UserError


def main(flags) -> int:
  # A large model takes a minute.
  print(
    f'opening {flags.checkpoint or flags.hf}; the address follows when it can answer', flush=True
  )
  from research.training.program import keep_compiled

  try:
    from research.serving.served_model import open_served
    from research.serving.server import Knobs, serve
  except ImportError as error:
    raise UserError(
      f'the packages of serving are needed: uv sync --extra serve ({error}).'
    ) from None
  keep_compiled()

  def open_model():
    return open_served(
      flags.checkpoint, flags.hf, name=flags.name, template=flags.template, room=flags.room,
      slots=flags.slots, int8=flags.int8, kept=flags.kept,
    )  # fmt: skip

  mesh, devices = mesh_of(flags.gin_file, flags.gin)
  knobs = Knobs(
    flags.host, flags.port, flags.queue, flags.timeout, flags.drain, tuple(flags.allow_origin)
  )
  return serve(open_model, lambda: mesh.use(devices), knobs, lambda line: print(line, flush=True))


def mesh_of(files: list[str], bindings: list[str]):
  """Returns the mesh that gin names and all devices; without gin a mesh of one device.

  Raises:
    UserError: gin is wrong, or the mesh does not divide the devices.
  """
  import jax

  from research.core import configs
  from research.parallel.mesh import Mesh

  if not files and not bindings:
    return Mesh(), jax.devices()[:1]
  # The files bind a run's mesh. There is no run here, so a macro takes its place as the root.
  config = configs.load(files or [DEFAULT_MESH_FILE], ['MESH=@Mesh()', *bindings], root='MESH')
  mesh = config.tree()
  with config.explains():  # an error names the binding
    mesh.shape(jax.device_count())
  return mesh, jax.devices()


if __name__ == '__main__':
  cli.run(main, FLAGS)
