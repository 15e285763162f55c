"""A preset says what the config.json of the released weights says, epsilons and rotary bases included.

The configurations of transformers default to one release of each family: read through `research.convert` they
are the same tree as our gin file, which was written from the papers.
"""

import functools
import inspect

import pytest

from research.core import configs
from research.huggingface import inwards
from research.model.attention import Attention

transformers = pytest.importorskip('transformers')

RELEASED = {
  'llama/7b': ('Llama', {}),
  'mixtral/8x7b': ('Mixtral', {}),
  'jamba/52b': ('Jamba', {}),
  'gemma/7b': ('Gemma', {}),
  'gemma2/2b': ('Gemma2', {}),
  'glm/4_9b': ('Glm', {}),
  'gpt2/124m': ('GPT2', {}),
  'gptj/6b': ('GPTJ', {}),
  'opt/125m': ('OPT', {}),
  'falcon/7b': ('Falcon', {}),
  'bert/base': ('Bert', {}),
  't5/1_0_small': ('T5', {'vocab_size': 32128}),
  'mamba/130m': ('Mamba', {'vocab_size': 50280, 'num_hidden_layers': 24}),
}


def plain(value):
  """A tree of partials as dicts of every argument, those that are left to a default included."""
  if isinstance(value, tuple | list):
    return [plain(v) for v in value]
  if isinstance(value, dict):
    return {k: plain(v) for k, v in value.items()}
  if not callable(value):
    return value
  target, given = (
    (value, {}) if not isinstance(value, functools.partial) else (value.func, value.keywords)
  )
  function = target.__init__ if inspect.isclass(target) else target
  defaults = {
    name: p.default
    for name, p in inspect.signature(function).parameters.items()
    if p.default is not p.empty
  }
  arguments = {**defaults, **given}
  if target is Attention:  # None means these
    arguments['kv_heads'] = arguments['kv_heads'] or arguments['heads']
    arguments['scale'] = arguments['scale'] or arguments['head_dim'] ** -0.5
  return {'': target.__name__, **plain(arguments)}


@pytest.mark.parametrize('preset', RELEASED)
def test_preset_is_the_released_configuration(preset, tmp_path):
  name, changes = RELEASED[preset]
  config = getattr(transformers, f'{name}Config')(**changes).to_dict()
  path = tmp_path / 'model.gin'
  path.write_text(inwards.gin_text(*inwards.family_of(config)))
  tree = lambda file: plain(configs.load(str(file), root='MODEL').tree())
  assert tree(f'gin/models/{preset}.gin') == tree(path)
