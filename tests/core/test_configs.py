"""gin in, partials out: what is resolved, and what a person is told when it cannot be."""

import functools
import pathlib
import textwrap

import pytest

from research.core import configs, describe
from research.core.errors import UserError
from research.model import attention, layers, mlp, residual, stack

HEADER = """\
from __gin__ import dynamic_registration
import jax.nn
from research.model import attention
from research.model import layers
from research.model import mlp
from research.model import residual
from research.model import stack
"""


@pytest.fixture
def write(tmp_path):
  def write(text: str, name: str = 'a.gin') -> str:
    path = tmp_path / name
    path.write_text(HEADER + textwrap.dedent(text))
    return str(path)

  return write


def test_references_become_partials_and_calls_are_called(write):
  file = write("""
    ROOT = @mlp.Mlp
    mlp.Mlp:
      mlp = %WIDE
      activations = (@jax.nn.silu, @jax.nn.identity)
    WIDE = 48
  """)
  tree = configs.load(file, root='ROOT').tree()
  assert isinstance(tree, functools.partial)
  assert tree.func is mlp.Mlp
  assert tree.keywords['mlp'] == 48
  assert [f.__name__ for f in tree.keywords['activations']] == ['silu', 'identity']


def test_scopes_replace_and_the_unscoped_binding_is_the_default(write):
  file = write("""
    ROOT = (@attention.Attention, @local/attention.Attention)
    attention.Attention.heads = 4
    attention.Attention.head_dim = 8
    local/attention.Attention.window = 16
  """)
  plain, local = configs.load(file, root='ROOT').tree()
  assert plain.keywords == {'heads': 4, 'head_dim': 8}
  assert local.keywords == {'heads': 4, 'head_dim': 8, 'window': 16}


def test_macros_are_looked_up_late_and_the_command_line_wins(write):
  file = write('ROOT = @mlp.Mlp\nmlp.Mlp.mlp = %A\nmlp.Mlp.activations = ()\nA = %B\nB = 1\n')
  assert configs.load(file, ['B=2'], root='ROOT').tree().keywords['mlp'] == 2
  assert configs.load(file, ['Mlp.mlp=3'], root='ROOT').tree().keywords['mlp'] == 3


def test_two_loads_share_nothing(write):
  with_window = write(
    'ROOT = @attention.Attention\nattention.Attention:\n  heads = 1\n  head_dim = 8\n  window = 4\n'
  )
  without = write(
    'ROOT = @attention.Attention\nattention.Attention:\n  heads = 1\n  head_dim = 8\n', 'b.gin'
  )
  configs.load(with_window, root='ROOT').tree()
  assert 'window' not in configs.load(without, root='ROOT').tree().keywords


def test_the_saved_text_says_the_same(write, tmp_path):
  write('mlp.Mlp.activations = ()\nA = 5\n', 'included.gin')
  file = write(f"include '{tmp_path}/included.gin'\nROOT = @mlp.Mlp\nmlp.Mlp.mlp = %A\n")
  config = configs.load(file, ['A=7'], root='ROOT')
  saved = tmp_path / 'saved.gin'
  saved.write_text(config.text)
  again = configs.load(str(saved), root='ROOT')
  assert describe.describe(again.tree()) == describe.describe(config.tree())
  assert again.tree().keywords['mlp'] == 7


BASE = 'ROOT = @mlp.Mlp\nmlp.Mlp.mlp = 8\nmlp.Mlp.activations = ()\n'


@pytest.mark.parametrize(
  ('text', 'bindings', 'says'),
  [
    (
      BASE + 'mlp.Mlp.mpl = 3\n',
      [],
      r"a\.gin:\d+: Mlp has no argument 'mpl'\. Did you mean mlp\?",
    ),
    (BASE + 'mlp.Mpl.mlp = 3\n', [], r"a\.gin:\d+: .*has no 'Mpl'\. Did you mean Mlp\?"),
    (
      BASE + 'layer.RMSNorm.epsilon = 3\n',
      [],
      r"a\.gin:\d+: 'layer' is not imported .*Did you mean layers\?",
    ),
    (
      BASE + 'mlp.Mlp.bias = %BAIS\nBIAS = 1\n',
      [],
      r'a\.gin:\d+: no macro %BAIS\. Did you mean BIAS\?',
    ),
    (
      BASE + 'from research.data import nothing_here\n',
      [],
      r'a\.gin:\d+: no Python module .*nothing_here',
    ),
    (
      BASE + "include 'gin/models/llama/7c.gin'\n",
      [],
      r'a\.gin:\d+: no gin file .* Did you mean .*7b\.gin',
    ),
    (BASE + 'mlp.Mlp.mlp = = 3\n', [], r'a\.gin:\d+: '),
    (
      'ROOT = @mlp.Mlp\nmlp.Mlp.mlp = 8\n',
      [],
      r'ROOT needs Mlp\.activations; set it .*--gin\.Mlp',
    ),
    (BASE, ['WIDHT=3'], r'--gin\.WIDHT=3: nothing in this configuration uses WIDHT'),
    (
      BASE,
      ['Mlp.bais=True'],
      r"--gin\.Mlp\.bais=True: Mlp has no argument 'bais'\. Did you mean bias\?",
    ),
    (
      BASE,
      ['Mpl.mlp=1'],
      r"--gin\.Mpl\.mlp=1: no configured class or function 'Mpl'\. Did you mean Mlp\?",
    ),
    (BASE, ['other/Mlp.mlp=1'], r'--gin\.other/Mlp\.mlp=1: nothing in this configuration uses'),
    (BASE, ['Mlp.mlp=big'], r'--gin\.Mlp\.mlp=big: .*quotes'),
    (BASE, ['Mlp.mlp'], r'--gin\.Mlp\.mlp: write it as'),
    ('A = 1\n', [], r'no ROOT = @'),
  ],
)
def test_a_mistake_is_one_sentence_with_its_place(write, text, bindings, says):
  file = write(text)
  with pytest.raises(UserError, match=says) as error:
    configs.load(file, bindings, root='ROOT').tree()
  assert '\n' not in str(error.value)


def test_an_invalid_value_names_the_line_that_set_it(write):
  file = write("""
    ROOT = @stack.Stack
    stack.Stack:
      parts = ()
      residual = @residual.PreNorm
      repeats = %DEPTH
    residual.PreNorm.norm = @layers.RMSNorm
    DEPTH = -2
  """)
  config = configs.load(file, root='ROOT')
  tree = config.tree()
  with (
    pytest.raises(
      UserError, match=r'a\.gin:15, by %DEPTH at .*a\.gin:13: Stack\.repeats: -2 is not'
    ),
    config.explains(),
  ):
    tree(32, rngs=None)


def test_describe_prints_defaults_and_no_addresses():
  text = describe.describe(functools.partial(attention.Attention, heads=2, head_dim=4))
  assert 'heads = 2' in text
  assert 'window = None' in text
  assert ' at 0x' not in describe.describe(
    configs.load('gin/models/llama/7b.gin', root='MODEL').tree()
  )
  nested = ((attention.Attention, functools.partial(mlp.Mlp, mlp=4)),)
  assert ' at 0x' not in describe.describe(nested)
  assert 'mlp = 4' in describe.describe(nested)
  assert describe.describe(stack.Stack) != describe.describe(residual.PreNorm)


def test_no_python_under_gin():
  # A gin/__init__.py would shadow gin-config itself.
  assert not list((pathlib.Path(configs.ROOT) / 'gin').rglob('*.py'))


def test_a_bare_reference_on_the_command_line_is_looked_up_too(write):
  file = write(BASE + 'layers.RMSNorm.epsilon = 1e-5\n')
  tree = configs.load(file, ['Mlp.activations=(@RMSNorm,)'], root='ROOT').tree()
  assert tree.keywords['activations'][0].func is layers.RMSNorm


def test_the_saved_text_needs_no_command_line(write, tmp_path):
  file = write(BASE + 'layers.RMSNorm.epsilon = 1e-5\n')
  config = configs.load(
    file, ['Mlp.activations=(@a/RMSNorm,)', 'a/RMSNorm.epsilon=1e-3'], root='ROOT'
  )
  (tmp_path / 'saved.gin').write_text(config.text)
  again = configs.load(str(tmp_path / 'saved.gin'), root='ROOT')
  assert describe.describe(again.tree()) == describe.describe(config.tree())
  assert again.tree().keywords['activations'][0].keywords == {'epsilon': 1e-3}


def test_a_second_family_of_models_is_refused_and_a_model_of_ones_own_is_not(write, tmp_path):
  first = write('MODEL = @layers.LayerNorm\nlayers.LayerNorm.epsilon = 1e-4\n', 'first.gin')
  second = write('MODEL = @attention.Attention\n', 'second.gin')
  with pytest.raises(
    UserError, match=r'second.gin:8: this is a second model beside .*first.gin:8, whose'
  ):
    configs.load([first, second], root='MODEL')
  both = write(f"include '{first}'\ninclude '{second}'\n", 'both.gin')
  with pytest.raises(UserError, match=r'second.gin:8: this is a second model'):
    configs.load(both, root='MODEL')
  # Another size of the same family, and what a file says after its include.
  size = write(f"include '{first}'\nlayers.LayerNorm.epsilon = 1e-3\n", 'size.gin')
  assert configs.load([first, size], root='MODEL').tree().keywords['epsilon'] == 1e-3
  own = write(f"include '{first}'\nMODEL = @layers.RMSNorm\n", 'own.gin')
  config = configs.load(own, root='MODEL')
  assert config.tree() is layers.RMSNorm
  # A workdir's one text of it is read as before.
  again = tmp_path / 'config.gin'
  again.write_text(config.text)
  assert configs.load(str(again), root='MODEL').tree() is layers.RMSNorm
