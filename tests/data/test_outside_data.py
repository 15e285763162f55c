"""The recipes of docs/data.md as they stand: an objective, a corpus and a vocabulary outside the project."""

import pathlib
import re
import sys

import pytest

from research import freeze, generate
from research.core import configs
from research.core.errors import Invalid, UserError
from research.data import objectives, vocabularies
from research.data.cache import open_stream
from research.data.encoding import make_encoding
from research.data.spec import from_spec, to_spec
from research.data.streams import Stream
from research.inference import flags as flags_module
from research.training import loop, program

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import
PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / 'docs' / 'data.md'
MODULES = ('my_objective', 'my_corpus', 'my_vocabulary')

MY_RUN = """
from __gin__ import dynamic_registration
from research.data import streams
from research.evaluation import corpus_tasks
from research.evaluation import suite
from research.training import run
import my_corpus
include '{root}/gin/runs/tiny.gin'
include '{here}/my_stream.gin'
VOCAB = 16
train/streams.Stream.examples = None
validation/streams.Stream.examples = None
run.Run:
  steps = 2
  batch_size = 4
  evaluations = (@suite.Suite(),)
suite.Suite.tasks = (@corpus_tasks.Perplexity(),)
corpus_tasks.Perplexity:
  corpus = @my_corpus.Sums()
  examples = 4
"""


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


def test_the_vocabulary_of_the_page_is_its_own_tokenizer(outside):
  import my_vocabulary

  encoding = make_encoding(my_vocabulary.Digits())
  ids = encoding.encode('1+2=3?')
  assert ids == [4, 13, 5, 14, 6, 2]
  assert encoding.decode([0, *ids, encoding.end, encoding.size, 99]) == '1+2=3'
  assert (encoding.end, encoding.size) == (1, 15)
  built = my_vocabulary.Digits().build()
  assert (built.encode('1+2=3?'), built.eos_id, built.vocab_size) == (ids, 1, 15)
  assert built.decode(ids[:-1]) == '1+2=3'


def test_a_vocabulary_that_only_freezes_says_what_it_needs_to_decode(outside):
  import my_vocabulary

  class OnlyBuilds(vocabularies.Vocabulary):
    def build(self):
      raise NotImplementedError

  class Half(OnlyBuilds):
    end = 1

    def encode(self, text):
      return []

  class Changed(vocabularies.Bytes):
    """Its own ids are not those of `Bytes`."""

    build = my_vocabulary.Digits.build

  with pytest.raises(
    UserError, match=r'OnlyBuilds cannot .*: add encode, decode, end, size to the class'
  ):
    make_encoding(OnlyBuilds())
  with pytest.raises(UserError, match=r'Half cannot .*: add decode, size to the class'):
    make_encoding(Half())
  with pytest.raises(UserError, match=r'Changed cannot .*: add encode'):
    make_encoding(Changed())


@pytest.mark.slow
def test_a_run_over_the_recipes_of_the_page_evaluates_itself_and_generates(
  outside, monkeypatch, capsys, one_device
):
  monkeypatch.setenv('ISOFLOP_CACHE', str(outside / 'cache'))
  monkeypatch.setattr(program, 'keep_compiled', lambda: None)
  (outside / 'my_run.gin').write_text(MY_RUN.format(root=configs.ROOT, here=outside))
  workdir = outside / 'run'
  config = configs.load(str(outside / 'my_run.gin'))
  row = loop.train(config.build(), workdir, config.text)
  assert row['eval/perplexity-sums/failed'] == 0
  assert row['eval/perplexity-sums/items'] == 4
  capsys.readouterr()
  monkeypatch.setattr(
    sys, 'argv', ['generate', f'--checkpoint={workdir}', '--prompt=1+2=', '--max_tokens=5']
  )
  generate.main(flags_module.parse(generate.__doc__))
  assert re.fullmatch(r'[0-9+=]{0,5}', capsys.readouterr().out.strip())


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
