"""Flags of the command that do not go together are a sentence, before anything heavy is imported."""

import socket
import sys

import pytest

from research import serve
from research.core.errors import UserError


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'give one of --checkpoint and --hf.'),
    (['--hf=a', '--checkpoint=b'], 'give one of --checkpoint and --hf.'),
    (['--hf=a', '--slots=0'], '--slots=0 must be above 0.'),
    (['--hf=a', '--timeout=nan'], '--timeout=nan must be above 0.'),
    (['--hf=a', '--room=-1'], '--room=-1 must be 0 or more.'),
    (['--hf=a', '--port=99999'], '--port=99999 must be at most 65535.'),
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
