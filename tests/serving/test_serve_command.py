"""Flags of the command that do not go together are a sentence, before anything heavy is imported."""

import sys

import pytest

from research import serve


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ([], 'give one of --checkpoint and --hf.'),
    (['--hf=a', '--checkpoint=b'], 'give one of --checkpoint and --hf.'),
    (['--hf=a', '--slots=0'], '--slots=0 must be above 0.'),
    (['--hf=a', '--timeout=nan'], '--timeout=nan must be above 0.'),
    (['--hf=a', '--room=-1'], '--room=-1 must be 0 or more.'),
    (['--hf=a', '--prot=1'], 'no flag --prot=1. Did you mean --port'),
  ],
)
def test_wrong_flags(flags, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['serve', *flags])
  with pytest.raises(SystemExit):
    serve._flags()
  assert message in capsys.readouterr().err
