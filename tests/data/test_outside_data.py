"""The recipes of docs/data.md as they stand: an objective, a corpus and a vocabulary outside the project."""

import pathlib
import re
import sys

import pytest

from research import freeze
from research.core.errors import Invalid, UserError
from research.data import objectives
from research.data.cache import open_stream
from research.data.spec import from_spec, to_spec
from research.data.streams import Stream

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import
PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / 'docs' / 'data.md'
MODULES = ('my_objective', 'my_corpus', 'my_vocabulary')


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """A folder on Python's path with the files of the page, each named in its first line."""
  for block in re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.DOTALL):
    if name := re.match(r'# (\w+\.\w+)\n', block):
      (tmp_path / name[1]).write_text(block)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name in MODULES:
    sys.modules.pop(name, None)


@pytest.mark.slow
def test_the_recipes_of_the_page_are_frozen_by_a_process_of_their_own(outside, frozen_in_a_process):
  (stream,) = freeze.configured([str(outside / 'my_stream.gin')], [])
  assert from_spec(stream.spec()) == stream
  lines = []
  frozen = open_stream(stream, outside / 'cache', lines.append)
  assert frozen.manifest['corpus']['documents'] == 900 - 90
  batch = frozen.examples(range(len(frozen)))
  tokens, segments = batch['decoder_target_tokens'][0], batch['decoder_segment_ids'][0]
  alphabet = stream.vocabulary.alphabet
  text = ''.join(alphabet[i - 3] for i in tokens[segments == 1][:-1])
  left, right, total = re.fullmatch(r'(\d+)\+(\d+)=(\d+)', text[::-1]).groups()
  assert int(left) + int(right) == int(total)
  assert tokens[segments == 1][-1] == 1
  assert frozen.bytes_per_token < 1, 'the end of a document stands for no byte'


def test_another_source_makes_another_stream(outside):
  (stream,) = freeze.configured([str(outside / 'my_stream.gin')], [])
  name = stream.key()
  file = outside / 'my_corpus.py'
  file.write_text(file.read_text() + '# changed\n')
  assert stream.key() != name


def test_what_another_process_cannot_import_is_refused():
  class Local(objectives.CausalLM):
    pass

  with pytest.raises(UserError, match=r'Local is defined in a script, a notebook or a function'):
    to_spec(Local())
  with pytest.raises(UserError, match=r'cannot import Missing of my_other_module'):
    from_spec({'class': 'my_other_module:Missing'})


def test_a_subclass_inherits_the_recipe_and_a_stranger_needs_one(outside):
  (outside / 'my_objective.py').write_text(
    'from research.data import objectives\n'
    'class Same(objectives.CausalLM):\n  pass\n'
    'class Stranger(objectives.Objective):\n  name = "stranger"\n'
  )
  import my_objective
  import seqio

  from tasks import objectives as recipes

  same = Stream(task=my_objective.Same(), lengths={'targets': 64})
  assert recipes.recipe(same, seqio.ByteVocabulary()).cut == 64
  stranger = Stream(task=my_objective.Stranger(), lengths={'targets': 64})
  with pytest.raises(Invalid, match=r'Stranger needs a method recipe'):
    recipes.recipe(stranger, seqio.ByteVocabulary())


def test_objectives_say_what_a_reader_and_a_compiler_ask():
  prefixed = {name for name, kind in objectives.OBJECTIVES.items() if kind().prefixed}
  assert prefixed == {'prefix_lm', 'span_corruption', 'ul2'}
  assert objectives.Instructions(bidirectional_prompt=True).prefixed
  assert objectives.UL2.mark_names == ('[R]', '[S]', '[X]')
