"""Flags of the command that do not go together are a sentence, before anything heavy is imported."""

import socket
import sys

import pytest

from research import serve
from research.core.errors import UserError
from research.parallel.mesh import Mesh


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'give one of --checkpoint and --hf.'),
    (['--hf=a', '--checkpoint=b'], 'give one of --checkpoint and --hf.'),
    (['--hf=a', '--slots=0'], '--slots=0 must be above 0.'),
    (['--hf=a', '--timeout=nan'], '--timeout=nan must be above 0.'),
    (['--hf=a', '--room=-1'], '--room=-1 must be 0 or more.'),
    (['--hf=a', '--port=99999'], '--port=99999 must be at most 65535.'),
    (['--hf=a', '--allow_origin=*'], "'*' is no origin: write http://NAME:PORT or https://NAME."),
    (['--hf=a', '--prot=1'], 'no flag --prot=1. Did you mean --port'),
  ],
)
def test_wrong_flags(flags, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['serve', *flags])
  with pytest.raises(SystemExit):
    serve._flags()
  assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_a_model_is_read():
  server = pytest.importorskip('research.serving.server')
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=rf'127\.0\.0\.1:{port} \(Address already in use\): choose'):
      server.serve(None, None, server.Knobs(port=port))


def test_a_mesh_by_gin():
  """Eight devices are here."""
  assert serve.mesh_of([], [])[0] == Mesh()
  assert len(serve.mesh_of([], [])[1]) == 1
  mesh, devices = serve.mesh_of([], ['Mesh.tensor=2'])
  assert (mesh, len(devices)) == (Mesh(tensor=2), 8)
  mesh, _ = serve.mesh_of(['gin/meshes/fsdp_tensor.gin'], ['TENSOR=4'])
  assert mesh == Mesh(data=1, fsdp=-1, tensor=4)


@pytest.mark.parametrize(
  ('bindings', 'message'),
  [
    (['Mesh.tensor=3'], r'--gin\.Mesh\.tensor=3: .* needs a multiple of 3 devices and there are 8'),
    (['Mesh.tensr=2'], r"--gin\.Mesh\.tensr=2: Mesh has no argument 'tensr'\. Did you mean tensor"),
    (['Run.steps=2'], r'--gin\.Run\.steps=2: nothing in this configuration uses Run\.steps'),
  ],
)
def test_a_mesh_that_cannot_be(bindings, message):
  with pytest.raises(UserError, match=message):
    serve.mesh_of([], bindings)
