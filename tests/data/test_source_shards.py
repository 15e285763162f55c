"""A registered seqio task that is read by its source's shards has the bytes of one process, whoever writes."""

import json
import shutil
import sys
import textwrap

import numpy as np
import pytest

from research.core.errors import Invalid, UserError
from research.data import batches, corpora, shards
from research.data.spec import from_spec
from research.data.streams import Stream
from tasks import freezing, on_ray

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import

# Each of `alone` has one of the files of `lines`; `heads_or_tails` draws for every example.
MODULE = """
import pathlib
import seqio
import tensorflow as tf

FOLDER = pathlib.Path(__file__).parent

@seqio.map_over_dataset(num_seeds=1)
def heads_or_tails(line, seed):
  heads = tf.random.stateless_uniform([], seed) < 0.5
  return {'targets': tf.strings.join([line, tf.where(heads, ' heads', ' tails')])}

def add(name, source):
  seqio.TaskRegistry.add(
    name,
    source=source,
    preprocessors=[heads_or_tails, seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True)},
    shuffle_buffer_size=50,
  )

def dataset(split, shuffle_files=False, seed=None):
  return tf.data.Dataset.range(30).map(tf.strings.as_string)

add('lines', seqio.TextLineDataSource({'train': str(FOLDER / '?.txt'), 'none': str(FOLDER / '*.none')}))
for number in range(3):
  add(f'alone_{number}', seqio.TextLineDataSource({'train': str(FOLDER / f'{number}.txt')}))
add('made', seqio.FunctionDataSource(dataset, splits=['train']))
seqio.MixtureRegistry.add('lines_and_made', [('lines', 1), ('made', 1)])
"""
SIZES = (40, 700, 0)  # lines of each file: one block of rows, several, and none


def silent(line):
  del line


@pytest.fixture(scope='module')
def module(tmp_path_factory):
  folder = tmp_path_factory.mktemp('source')
  (folder / 'my_lines.py').write_text(textwrap.dedent(MODULE))
  for number, size in enumerate(SIZES):
    lines = [f'file {number} line {i} {"x" * (i % 37)}\n' for i in range(size)]
    (folder / f'{number}.txt').write_text(''.join(lines))
  sys.path.insert(0, str(folder))
  yield folder
  sys.path.remove(str(folder))


def make(task='lines', **fields) -> Stream:
  return Stream(
    **{'task': task, 'module': 'my_lines', 'lengths': {'targets': 64}, 'source_shards': True}
    | fields
  )


def frozen(stream, cache, **options) -> batches.Frozen:
  freezing.freeze([stream], cache, silent, **options)
  return batches.Frozen(cache / 'streams' / stream.key(), stream)


class Backwards:
  """An engine whose one process writes the last shard first, from nothing but the spec, as a host does."""

  def __init__(self, cache):
    self.cache = cache

  def write(self, stream, new):
    for number in reversed(range(stream.passes)):
      for piece in reversed(range(new.pieces)):
        on_ray._writer.cache_clear()
        on_ray.write_shard(
          json.dumps(stream.spec()), str(new.folder), str(self.cache), number, piece
        )


def files_in(folder) -> dict[str, bytes]:
  """The files of a stream, without the times at which they were checked."""
  return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != 'verified.json'}


def documents(of: batches.Frozen, number: int) -> list[str]:
  """The documents of the rows of a pass, in order."""
  rows = of.examples(range(sum(s['examples'] for s in of.manifest['shards'][number])), number)
  found = []
  for tokens, segments in zip(
    rows['decoder_target_tokens'], rows['decoder_segment_ids'], strict=True
  ):
    for segment in range(1, segments.max() + 1):
      ids = tokens[segments == segment]
      found.append(bytes((ids[ids > 2] - 3).astype(np.uint8)).decode())
  return found


@pytest.fixture(scope='module')
def one(module, tmp_path_factory) -> batches.Frozen:
  """Two passes, written by one process."""
  return frozen(make(passes=2), tmp_path_factory.mktemp('one'))


def test_the_bytes_do_not_depend_on_who_writes_a_shard(module, one, tmp_path):
  many = frozen(one.stream, tmp_path, engine=Backwards(tmp_path))
  assert files_in(many.folder) == files_in(one.folder)


def test_the_files_follow_each_other_and_passes_differ(one):
  counts = [[s['examples'] for s in of_pass] for of_pass in one.manifest['shards']]
  assert [c > 0 for c in counts[0]] == [size > 0 for size in SIZES]
  assert counts[0][1] > 256, 'a shard of several blocks'
  for number in range(2):
    got = documents(one, number)
    lines = [' '.join(document.split()[:4]) for document in got]
    assert sorted(lines) == sorted(
      f'file {f} line {i}' for f, n in enumerate(SIZES) for i in range(n)
    )
    assert [line[:6] for line in lines] == ['file 0'] * 40 + ['file 1'] * 700
  assert documents(one, 0) != documents(one, 1)


def test_a_shard_has_the_bytes_of_a_task_over_its_file_alone(one, tmp_path):
  import seqio

  writer = freezing.writer(one.stream, one.folder, tmp_path, silent)
  for piece in range(2):
    seed = writer.seed(0, piece)
    with seqio.map_seed_manager(seed):
      want = seqio.get_dataset(
        f'alone_{piece}', one.stream.lengths, seqio.DecoderFeatureConverter(pack=True),
        shuffle=True, seed=seed, verbose=False,
      )  # fmt: skip
    want = list(want.as_numpy_iterator())
    first = sum(s['examples'] for s in one.manifest['shards'][0][:piece])
    got = one.examples(range(first, first + len(want)))
    assert len(want) == one.manifest['shards'][0][piece]['examples'] > 0
    for key, rows in got.items():
      np.testing.assert_array_equal(rows, [row[key] for row in want], err_msg=key)


def test_a_freeze_goes_on_with_what_is_missing(one, tmp_path):
  folder = tmp_path / 'streams' / one.folder.name
  shutil.copytree(one.folder, folder)
  gap = folder / shards.shard_name(0, 0)
  gap.unlink()
  gap.with_suffix('.json').unlink()
  kept = folder / shards.shard_name(0, 1)
  written = kept.stat().st_mtime_ns
  frozen(one.stream, tmp_path)
  assert files_in(folder) == files_in(one.folder)
  assert kept.stat().st_mtime_ns == written


def test_a_source_that_changed_meanwhile_is_refused(module, tmp_path):
  import seqio

  stream = make(examples=2)
  frozen(stream, tmp_path)
  more = module / '3.txt'
  more.write_text('one more\n')
  seqio.utils._list_files_for_glob.cache_clear()  # as in another process
  try:
    assert len(frozen(stream, tmp_path)) == 2, 'what is complete is not looked at'
    with pytest.raises(UserError, match=r'does not have the shards with which .* \(4, then 3\)'):
      frozen(make(), tmp_path)
  finally:
    more.unlink()
    seqio.utils._list_files_for_glob.cache_clear()


def test_a_source_of_one_shard_is_one_piece(module, tmp_path):
  one = frozen(make('made'), tmp_path, engine=Backwards(tmp_path))
  assert [s['last'] for s in one.manifest['shards'][0]] == [True]
  assert sorted(int(document.split()[0]) for document in documents(one, 0)) == list(range(30))


def test_without_it_one_process_writes_and_says_so(module, tmp_path):
  lines = []
  freezing.freeze([make(source_shards=False)], tmp_path, lines.append, engine=Backwards(tmp_path))
  assert any('seqio cannot begin in its middle' in line for line in lines)


@pytest.mark.parametrize(
  ('fields', 'why'),
  [
    ({'task': 'lines_and_made'}, 'lines_and_made is a mixture: mix streams of its tasks'),
    ({'split': 'none'}, 'the source of lines none has no shard'),
  ],
)
def test_what_has_no_shards_is_refused(module, tmp_path, fields, why):
  with pytest.raises(UserError, match=why):
    frozen(make(**fields), tmp_path)


def test_streams_without_it_keep_their_names(module):
  stream = make(source_shards=False)
  assert 'source_shards' not in stream.spec() | stream.described()
  # The name that the version before source_shards gave it.
  assert stream.key() == 'lines-train-00fc7cb055582ed6'
  split = make()
  assert from_spec(json.loads(json.dumps(split.spec()))) == split
  assert split.key() != stream.key()
  assert split.described()['source_shards']
  with pytest.raises(Invalid, match='is for a registered seqio task'):
    Stream(corpus=corpora.PythonSources(), source_shards=True)


@pytest.mark.slow
def test_workers_write_the_bytes_of_one_process(one, tmp_path):
  two = frozen(one.stream, tmp_path, workers=2)
  assert files_in(two.folder) == files_in(one.folder)
