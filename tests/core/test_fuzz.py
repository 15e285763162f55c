"""Whatever a person types: bindings, gin files and flags give a value or one sentence, never a traceback."""

import contextlib
import io

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from research.core import cli, configs
from research.core.errors import UserError

BASE = """\
from __gin__ import dynamic_registration
import math
from research.model import layers
from research.model import mlp
ROOT = @mlp.Mlp
mlp.Mlp:
  mlp = %WIDE
  activations = (@math.sqrt, @layers.RMSNorm)
WIDE = 48
"""
QUICK = settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LONG = settings(QUICK, max_examples=4000)

# Pieces of gin, so that more than the first token is tried.
pieces = st.sampled_from([
  'mlp', 'Mlp', 'mlp.Mlp', 'Mlp.mlp', 'mlp.Mlp.mlp', 'ROOT', 'WIDE', 'scope/', '%WIDE', '%ROOT',
  '@mlp.Mlp', '@Mlp()', '@layers.RMSNorm', '@', '%', '=', ':', '.', '/', ' ', '\n', '\n  ', '(',
  ')', '[', ']', '{', '}', ',', '1', '-1', '1e-3', '48', 'True', 'None', "'a'", '"48"', '"""', "'",
  '#', '\\', 'import ', 'from ', 'include ', ' as ', 'math', 'research', 'research.model',
  "'x.gin'", '\t', '\r', '\x00', '\x1a', 'é', '∞', '\u2028', '\ufeff', '0x', '1_0', '1j',
])  # fmt: skip
texts = st.lists(pieces | st.text(max_size=3), max_size=12).map(''.join)


def built_or_told(read) -> None:
  """Runs `read(config)` over the base file and resolves; only a UserError of one line may come."""
  said = None
  try:
    config = configs.load('base.gin', root='ROOT')
    read(config)
    config.tree()
  except UserError as error:
    said = str(error)
  assert said is None or len(said.splitlines()) == 1, said


@pytest.fixture
def base(tmp_path, monkeypatch):
  (tmp_path / 'base.gin').write_text(BASE)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def check_binding(text: str) -> None:
  built_or_told(lambda config: config.read_binding(text))


def check_file(folder, data: bytes) -> None:
  (folder / 'fuzz.gin').write_bytes(data)
  built_or_told(lambda config: config.read_file('fuzz.gin'))


def check_flags(argv: list[str]) -> None:
  parser = cli.parser('x', 'What it is.')
  parser.add_argument('--workdir')
  parser.add_argument('--steps', type=int)
  said = io.StringIO()
  with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
    code = 0
    try:
      cli.parse(parser, argv)
    except SystemExit as stop:
      code = stop.code
  assert code in (0, 2)
  assert 'Traceback' not in said.getvalue()


@QUICK
@example('Mlp.mlp="48"')
@example('WIDE=%WIDE')
@example('Mlp.activations=(@Mlp,)')
@example('Mlp.mlp={[1]: 2}')
@example('Mlp.mlp=' + '(' * 3000)
@example('Mlp.mlp=' + '9' * 5000)
@example('=')
@example('mlp.Mlp:\n  mlp = 3')
@given(texts)
def test_a_binding_gives_a_value_or_a_sentence(base, text):
  check_binding(text)


@QUICK
@example(b'\xff\xfei\x00')
@example(b'\xef\xbb\xbfWIDE = 3\n')
@example(b'WIDE = 3\r\nWIDE = 4\r')
@example(b'WIDE = \x00')
@example(b"include 'fuzz.gin'\n")
@example(b'WIDE = (1,\n')
@example(b'mlp.Mlp:\n')
@example(b'mlp.Mlp:\n  mlp = 3\n bias = True\n')
@example(b"WIDE = '\\N{nothing}'\n")
@example(b'WIDE = 1 if True else 2\n')
@given(st.binary(max_size=40) | texts.map(lambda text: text.encode('utf-8', 'surrogatepass')))
def test_a_gin_file_of_any_bytes_gives_a_value_or_a_sentence(base, data):
  check_file(base, data)


words = st.sampled_from([
  '--gin_file', '--gin_file=a', '--gin.', '--gin.a=1', '--workdir', '--steps', '--steps=x', '--help',
  '-h', '--', '-', '=', '1', '%', '%s', '--step=1', '--gin',
])  # fmt: skip


@QUICK
@given(st.lists(words | st.text(max_size=6), max_size=6))
def test_flags_are_taken_or_refused(argv):
  check_flags(argv)


@pytest.mark.slow
@LONG
@given(texts)
def test_many_bindings_give_a_value_or_a_sentence(base, text):
  check_binding(text)


@pytest.mark.slow
@LONG
@given(st.binary(max_size=200) | texts.map(lambda text: text.encode('utf-8', 'surrogatepass')))
def test_gin_files_of_many_bytes_give_a_value_or_a_sentence(base, data):
  check_file(base, data)


@pytest.mark.slow
@LONG
@given(st.lists(words | st.text(max_size=20), max_size=12))
def test_many_flags_are_taken_or_refused(argv):
  check_flags(argv)
