"""A start says by name what goes where, and what does not fit."""

import types

import pytest

from research.checkpoints.starts import Checkpoint
from research.core.errors import Invalid, UserError
from research.training.learning import keep, without

SAVED = {
  'embedder/tokens': (8, 4),
  'stack/sublayers/0/parts/0/query/kernel': (2, 4, 4),
  'head/kernel': (4, 8),
}


def start(**knobs) -> Checkpoint:
  """A start from a checkpoint that holds `SAVED`."""
  made = Checkpoint(folder='runs/base', **knobs)
  made.__dict__['checkpoint'] = types.SimpleNamespace(shapes=lambda: SAVED)
  return made


def test_names_that_are_equal_are_matched():
  assert start().sources(SAVED) == {name: name for name in SAVED}


def test_what_stands_for_a_parameter_takes_it_and_what_stands_beside_is_new():
  query = 'stack/sublayers/0/parts/0/query/kernel'
  wanted = {
    'embedder/tokens/base': (8, 4),
    'embedder/tokens/lora_a': (8, 2),
    'stack/sublayers/0/parts/0/base/query/kernel/base': (2, 4, 4),
    'stack/sublayers/0/parts/0/base/query/kernel/lora_b': (2, 2, 4),
    'stack/sublayers/0/parts/0/adapter/up/kernel': (2, 4, 4),
    'head/kernel': (4, 8),
  }
  assert start().sources(wanted) == {
    'embedder/tokens/base': 'embedder/tokens',
    'stack/sublayers/0/parts/0/base/query/kernel/base': query,
    'head/kernel': 'head/kernel',
  }


def test_all_that_does_not_fit_is_named_in_one_sentence():
  wanted = {**SAVED, 'embedder/tokens': (9, 4), 'stack/norm/scale': (4,)}
  del wanted['head/kernel']
  with pytest.raises(UserError) as error:
    start().sources(wanted)
  assert 'embedder/tokens is (8, 4) and this model has (9, 4)' in str(error.value)
  assert 'stack/norm/scale is missing' in str(error.value)
  assert 'head/kernel is not in this model' in str(error.value)


def test_what_is_meant_is_said_by_patterns():
  wanted = {'tokens': (9, 4), 'stack/norm/scale': (4,), 'head/kernel': (4, 8)}
  said = start(
    resized=('tokens',), new=('.*/scale',), unused=('stack/.*',), rename=(('(tokens)', r'embedder/\1'),)
  )  # fmt: skip
  assert said.sources(wanted) == {'tokens': 'embedder/tokens', 'head/kernel': 'head/kernel'}


@pytest.mark.parametrize('field', ['new', 'resized', 'unused'])
def test_a_pattern_of_nothing_is_refused(field):
  with pytest.raises(
    Invalid, match=r'heed/kernel.* matches no parameter. Did you mean head/kernel'
  ):
    start(**{field: ('heed/kernel',)}).sources(SAVED)


@pytest.mark.parametrize('knobs', [{'new': 'head/.*'}, {'new': ('(',)}, {'rename': ('ab',)}])
def test_what_is_no_pattern_is_refused(knobs):
  with pytest.raises(Invalid):
    Checkpoint(folder='', **knobs)


def test_a_tree_is_parted_by_names():
  tree = {'a': {0: 1, 1: 2}, 'b': {'c': 3}}
  assert keep(tree, {'a/1'}) == {'a': {1: 2}}
  assert without(tree, frozenset({'a/1', 'b/c'})) == {'a': {0: 1}}
