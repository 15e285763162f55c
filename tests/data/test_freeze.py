"""Freezing, from files to batches: what goes in comes out, whatever breaks on the way."""

import gzip
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import pytest

from research import freeze
from research.core.errors import Invalid, UserError
from research.data import batches, cache
from research.data.cache import open_stream
from research.data.corpora import (
  ArrayRecords,
  HuggingFace,
  JsonLines,
  Parquet,
  TextFiles,
  Tfds,
  TFRecords,
)
from research.data.mixtures import Mixture
from research.data.streams import Stream
from research.data.vocabularies import Bytes, SentencePiece
from tasks import freezing

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import
ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
silent = lambda line: None


def texts(n=60, seed=0):
  draw = np.random.default_rng(seed)
  words = ['alpha', 'beta', 'gamma', 'delta', 'omega', 'naïve', '北京']
  return [
    f'{i}: ' + ' '.join(words[j] for j in draw.integers(0, 7, draw.integers(5, 120)))
    for i in range(n)
  ]


def opened(stream, cache):
  """The stream, frozen in this process: TensorFlow is imported once for all tests."""
  freezing.freeze([stream], cache, silent)
  return batches.Frozen(cache / 'streams' / stream.key(), stream)


def text_of(frozen, key='decoder_target_tokens'):
  """The documents in a causal byte stream, in no order."""
  rows = frozen.examples(range(len(frozen)))
  documents = {}
  for i, row in enumerate(rows[key]):
    ids = rows[key.replace('target_tokens', 'segment_ids')][i]
    for s in range(1, ids.max() + 1):
      documents[i, s] = bytes((row[ids == s] - 3).clip(0, 255).astype(np.uint8))
  return documents


def jsonl(path, rows):
  opener = gzip.open if path.suffix == '.gz' else open
  with opener(path, 'wt') as f:
    f.writelines(json.dumps(r) + '\n' for r in rows)
  return str(path)


def stream_of(corpus, **fields):
  return Stream(corpus=corpus, **{'lengths': {'targets': 2048}, **fields})


def write_text(folder):
  (folder / 'a.txt').write_text('\x1e'.join(texts()))
  return TextFiles(files=str(folder / '*.txt'), separator='\x1e')


def write_jsonl(folder):
  jsonl(folder / 'a.jsonl.gz', [{'text': t} for t in texts()[:30]])
  jsonl(folder / 'b.jsonl', [{'text': t} for t in texts()[30:]])
  return JsonLines(files=(str(folder / '*.gz'), str(folder / 'b.jsonl')))


def write_parquet(folder):
  import pyarrow as pa
  import pyarrow.parquet as pq

  table = pa.table({'n': list(range(60)), 'text': texts()})
  pq.write_table(table, folder / 'a.parquet', row_group_size=7)
  return Parquet(files=str(folder / 'a.parquet'))


def write_huggingface(folder):
  import pyarrow as pa

  table = pa.table({'text': texts()})
  (folder / 'set').mkdir()
  with pa.ipc.new_stream(str(folder / 'set' / 'data-00000-of-00001.arrow'), table.schema) as out:
    out.write_table(table)
  return HuggingFace(files=str(folder / 'set'))


def write_tfrecord(folder):
  import tensorflow as tf

  with tf.io.TFRecordWriter(str(folder / 'a.tfrecord')) as out:
    for t in texts():
      feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[t.encode()]))
      example = tf.train.Example(features=tf.train.Features(feature={'text': feature}))
      out.write(example.SerializeToString())
  return TFRecords(files=str(folder / 'a.tfrecord'))


def write_array_record(folder):
  module = pytest.importorskip('array_record.python.array_record_module')
  import tensorflow as tf

  out = module.ArrayRecordWriter(str(folder / 'a.array_record'), 'group_size:1')
  for t in texts():
    feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=[t.encode()]))
    example = tf.train.Example(features=tf.train.Features(feature={'text': feature}))
    out.write(example.SerializeToString())
  out.close()
  return ArrayRecords(files=str(folder / 'a.array_record'))


WRITERS = [
  write_text,
  write_jsonl,
  write_parquet,
  write_huggingface,
  write_tfrecord,
  write_array_record,
]


@pytest.mark.parametrize('write', WRITERS)
def test_every_kind_of_file_gives_its_documents(tmp_path, write):
  corpus = write(tmp_path)
  fields = {'validation_fraction': 0.2}
  corpus = type(corpus)(**{**vars(corpus), **fields})
  splits = [
    opened(stream_of(corpus, split=split), tmp_path / 'cache') for split in ('train', 'validation')
  ]
  found = [sorted(d[:-1] if d[-1] == 0 else d for d in text_of(f).values()) for f in splits]
  assert sorted(found[0] + found[1]) == sorted(t.encode() for t in texts())
  assert 3 < len(found[1]) < 25
  total = sum(s['target_bytes'] for f in splits for s in f.manifest['shards'][0])
  assert total == sum(len(t.encode()) for t in texts())


def test_a_data_set_of_hugging_face_is_one_split_and_not_its_caches(tmp_path):
  from tasks import files, readers

  corpus, folder = write_huggingface(tmp_path), tmp_path / 'set'
  (folder / 'state.json').write_text(
    json.dumps({'_data_files': [{'filename': 'data-00000-of-00001.arrow'}], '_split': 'train'})
  )
  shutil.copy(folder / 'data-00000-of-00001.arrow', folder / 'cache-1234.arrow')
  assert len(list(readers.read(corpus, files.Dropped()))) == 60
  (tmp_path / 'dataset_dict.json').write_text('{"splits": ["train"]}')
  with pytest.raises(Invalid, match=r'has several splits: name the folder of one, such as'):
    HuggingFace(files=str(tmp_path))


def test_a_prepared_tfds_data_set(tmp_path):
  import tensorflow as tf
  import tensorflow_datasets as tfds

  folder = tmp_path / 'tfds' / 'mine' / '1.0.0'
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  features.save_config(str(folder))
  splits = []
  for name, seed in (('train', 1), ('validation', 2)):
    with tf.io.TFRecordWriter(str(folder / f'mine-{name}.tfrecord-00000-of-00001')) as out:
      for t in texts(20, seed):
        out.write(features.serialize_example({'text': t}))
    template = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
    splits.append({'name': name, 'shardLengths': ['20'], 'filepathTemplate': template})
  facts = {'name': 'mine', 'version': '1.0.0', 'fileFormat': 'tfrecord', 'splits': splits}
  (folder / 'dataset_info.json').write_text(json.dumps(facts))
  corpus = Tfds(tfds_name='mine:1.0.0', data_dir=str(tmp_path / 'tfds'))
  frozen = opened(stream_of(corpus), tmp_path / 'cache')
  assert sorted(d[:-1] for d in text_of(frozen).values()) == sorted(
    t.encode() for t in texts(20, 1)
  )
  with pytest.raises(UserError, match=r"Tfds.tfds_name: 'mien:1.0.0 train' cannot be opened"):
    opened(
      stream_of(Tfds(tfds_name='mien:1.0.0', data_dir=str(tmp_path / 'tfds'))), tmp_path / 'cache'
    )


@pytest.fixture
def bucket(monkeypatch):
  """The URL of an empty bucket: Google's protocol spoken by a server of this process."""
  gcsfs = pytest.importorskip('gcsfs')
  with pytest.importorskip('bucket').Bucket('mine') as server:
    for name, value in server.environment.items():
      monkeypatch.setenv(name, value)
    gcsfs.GCSFileSystem.clear_instance_cache()
    yield 'gs://mine/data'


def test_a_bucket_serves_a_machine_that_has_nothing(tmp_path, monkeypatch, bucket):
  monkeypatch.setattr(cache, 'HOME', str(tmp_path / 'a'))
  monkeypatch.setattr(
    cache, '_freeze', lambda missing, folder, log: freezing.freeze(missing, folder, silent)
  )
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(50)])
  stream = stream_of(JsonLines(files=str(tmp_path / 'x.jsonl'), piece_bytes=4000))
  made = open_stream(stream, bucket, silent)
  monkeypatch.setattr(cache, 'HOME', str(tmp_path / 'b'))
  monkeypatch.setattr(cache, '_freeze', lambda *_: pytest.fail('it is in the bucket'))
  lines = []
  fetched = open_stream(stream, bucket, lines.append)
  assert fetched.folder != made.folder
  assert fetched.fingerprint == made.fingerprint
  assert lines
  assert all(line.startswith(f'fetching {bucket}/streams/') for line in lines)
  assert open_stream(stream, bucket, pytest.fail).fingerprint == made.fingerprint


def test_a_bucket_that_cannot_be_opened_is_named(tmp_path):
  with pytest.raises(UserError, match=r'ISOFLOP_CACHE=nowhere://x: a URL of gs:// or s3://'):
    open_stream(stream_of(write_text(tmp_path)), 'nowhere://x', silent)


@pytest.mark.parametrize('write', WRITERS)
def test_every_kind_of_file_is_read_from_a_url(tmp_path, write):
  """TensorFlow's ram:// is a store that only its file system opens, as gs:// is."""
  import tensorflow as tf

  from tasks import files, readers

  corpus = write(tmp_path)
  url = f'ram://{tmp_path.name}/{write.__name__}'
  for path in filter(pathlib.Path.is_file, tmp_path.rglob('*')):
    tf.io.gfile.makedirs(url)
    with tf.io.gfile.GFile(f'{url}/{path.name}', 'wb') as out:
      out.write(path.read_bytes())
  there = type(corpus)(**{**vars(corpus), 'files': f'{url}/*.*'})
  want, got = (sorted(readers.read(c, files.Dropped())) for c in (corpus, there))
  assert got == want
  assert len(got) == 60
  with pytest.raises(UserError, match=f'no file matches {url}/none'):
    list(readers.read(type(corpus)(files=f'{url}/none*'), files.Dropped()))
  with pytest.raises(UserError, match=f'{url}: it cannot be read'):  # a folder
    list(readers.read(type(corpus)(files=url), files.Dropped()))


def test_the_split_and_the_examples_do_not_depend_on_the_files_order(tmp_path):
  for name, rows in (('a', texts()), ('b', texts()[::-1])):
    (tmp_path / name).mkdir()
    jsonl(tmp_path / name / 'x.jsonl', [{'text': t} for t in rows])
  frozen = [
    opened(stream_of(JsonLines(files=str(tmp_path / name / 'x.jsonl'))), tmp_path / 'cache')
    for name in 'ab'
  ]
  assert frozen[0].folder != frozen[1].folder
  assert frozen[0].fingerprint == frozen[1].fingerprint


def cut_gzip(good):
  """All of the first forty lines and some of the next, in blocks of their own."""
  lines, pack = good.splitlines(keepends=True), zlib.compressobj(wbits=31)
  head = pack.compress(b''.join(lines[:40])) + pack.flush(zlib.Z_FULL_FLUSH)
  return head + (pack.compress(b''.join(lines[40:])) + pack.flush())[:20]


BROKEN = {
  'truncated gzip': (
    'x.jsonl.gz',
    cut_gzip,
    'after line 40 it ends in the middle: a truncated gzip',
  ),
  'invalid UTF-8': ('x.jsonl', lambda good: good + b'{"text": "\xff"}\n', 'line 61 is not UTF-8'),
  'empty file': ('x.jsonl', lambda good: b'', 'it is empty'),
  'no field': ('x.jsonl', lambda good: b'{"txt": "a"}\n' + good, "line 1 has no text field 'text'"),
  'not JSON': ('x.jsonl', lambda good: good + b'{"text": \n', 'line 61 is not JSON'),
  'a number': ('x.jsonl', lambda good: good + b'{"text": 7}\n', 'It is of type int'),
  'not gzip': (
    'x.jsonl.gz',
    lambda good: good,
    'it cannot be read (its name ends in .gz, and it is not gzip',
  ),
  'a folder': ('.', None, 'it cannot be read (Is a directory)'),
  'not an object': (
    'x.jsonl',
    lambda good: good + b'[1]\n',
    'line 61 is an array and not a JSON object',
  ),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_input_is_refused_with_its_place_or_counted(tmp_path, name):
  file, spoil, message = BROKEN[name]
  good = ''.join(json.dumps({'text': t}) + '\n' for t in texts()).encode()
  if spoil:
    (tmp_path / file).write_bytes(spoil(good))
  jsonl(tmp_path / 'good.jsonl', [{'text': 'fine ' * 50}])
  files = (str(tmp_path / file), str(tmp_path / 'good.jsonl'))
  with pytest.raises(UserError, match=re.escape(message)) as error:
    opened(stream_of(JsonLines(files=files)), tmp_path / 'cache')
  assert str(tmp_path / file) in str(error.value)
  assert '\n' not in str(error.value)
  frozen = opened(stream_of(JsonLines(files=files, broken='skip')), tmp_path / 'cache')
  corpus = frozen.manifest['corpus']
  assert sum(n for why, n in corpus['dropped'].items() if why.startswith('broken')) == 1
  (place,) = corpus['broken']
  assert place.startswith(str(tmp_path / file))
  assert message in place


@pytest.mark.parametrize('kind', [Parquet, HuggingFace, TFRecords, ArrayRecords])
def test_a_file_of_another_kind_is_refused_in_a_sentence(tmp_path, kind):
  file = tmp_path / 'x'
  file.write_bytes(b'PAR1 this is none of those files. ' * 9)
  with pytest.raises(UserError, match=f'{file}: it (cannot be read|is a Parquet file)') as error:
    opened(stream_of(kind(files=str(file))), tmp_path / 'cache')
  assert not re.search(r'\n|{{|Op:|\.\)', str(error.value))
  with pytest.raises(UserError, match=r'train split \(left out: 1 broken: unreadable files\)'):
    opened(stream_of(kind(files=str(file), broken='skip')), tmp_path / 'cache')


def test_invalid_utf8_in_text_is_named_by_its_line(tmp_path):
  (tmp_path / 'a.txt').write_bytes(b'one\ntwo\n\xc3\x28three\n')
  with pytest.raises(UserError, match=r'a.txt: line 3 is not UTF-8 \(byte 0xc3\)'):
    opened(stream_of(TextFiles(files=str(tmp_path / 'a.txt'))), tmp_path / 'cache')


def test_a_million_character_line_is_cut_and_none_of_it_lost(tmp_path):
  long = ''.join(f'é{i}' for i in range(150_000))
  assert len(long) > 900_000
  (tmp_path / 'a.txt').write_text(long)
  corpus = TextFiles(files=str(tmp_path / 'a.txt'), longest=300_001, validation_fraction=1e-9)
  frozen = opened(stream_of(corpus), tmp_path / 'cache')
  rows = frozen.examples(range(len(frozen)))['decoder_target_tokens']
  assert (rows == 0xC3 + 3).sum() == (rows == 0xA9 + 3).sum() == 150_000
  assert (rows == 1).sum() == -(-len(long.encode()) // 300_000)


def test_a_million_character_line_of_json_is_cut_as_well(tmp_path):
  file = jsonl(tmp_path / 'x.jsonl', [{'text': ''.join(f'é{i}' for i in range(150_000))}])
  corpus = JsonLines(files=file, validation_fraction=1e-9, longest=300_001)
  frozen = opened(stream_of(corpus), tmp_path / 'cache')
  rows = frozen.examples(range(len(frozen)))['decoder_target_tokens']
  assert (rows == 0xC3 + 3).sum() == 150_000
  assert (rows == 1).sum() == frozen.manifest['corpus']['documents'] == 4


def test_lines_and_documents_come_whole_however_the_blocks_fall(tmp_path, monkeypatch):
  from tasks import files

  lines = [b'', b'a', b'bb' * 9, b'', b'c' * 31, b'd']
  (tmp_path / 'x').write_bytes(b'\n'.join(lines) + b'\n')
  for block in (1, 2, 3, 7, 1000):
    monkeypatch.setattr(files, 'BLOCK', block)
    assert list(files.lines_of(str(tmp_path / 'x'))) == lines
  document = 'ä\nöö\n'.encode() * 50
  for longest in (3, 4, 5, 10, 99):
    parts = files.cut(document, longest)
    assert b''.join(parts) == document
    assert max(map(len, parts)) <= longest
    assert all(p.decode() for p in parts)


def test_a_missing_file_and_a_misspelt_one(tmp_path):
  (tmp_path / 'corpus.txt').write_text('x')
  with pytest.raises(Invalid, match=r'Did you mean corpus.txt\?'):
    TextFiles(files=str(tmp_path / 'corpsu.txt'))
  with pytest.raises(Invalid, match=r'There is no folder'):
    TextFiles(files=str(tmp_path / 'no' / 'corpus.txt'))


def test_pieces_and_workers_change_nothing_in_the_text(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(200)])
  file = str(tmp_path / 'x.jsonl')
  whole = opened(stream_of(JsonLines(files=file)), tmp_path / 'cache')
  pieces = opened(stream_of(JsonLines(files=file, piece_bytes=9000)), tmp_path / 'cache')
  assert len(whole.manifest['shards'][0]) == 1
  assert len(pieces.manifest['shards'][0]) > 5
  assert sorted(text_of(whole).values()) == sorted(text_of(pieces).values())


def test_a_larger_cap_extends_the_same_files(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(200)])
  corpus = JsonLines(files=str(tmp_path / 'x.jsonl'), piece_bytes=9000)
  lengths = {'targets': 256}
  small = opened(stream_of(corpus, lengths=lengths, examples=20), tmp_path / 'cache')
  # A gap, as killed workers leave it, is filled.
  for end in ('bin', 'json'):
    (small.folder / f'pass0-00000.{end}').rename(tmp_path / f'gone.{end}')
  large = opened(stream_of(corpus, lengths=lengths, examples=120), tmp_path / 'cache')
  assert (small.folder / 'pass0-00000.bin').read_bytes() == (tmp_path / 'gone.bin').read_bytes()
  assert small.folder == large.folder
  assert len(small.manifest['shards'][0]) < len(large.manifest['shards'][0])
  for key, value in small.examples(range(20)).items():
    np.testing.assert_array_equal(value, large.examples(range(20))[key])


def test_one_tokenisation_serves_two_objectives(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(50)])
  corpus = JsonLines(files=str(tmp_path / 'x.jsonl'), piece_bytes=5000)
  vocabulary = SentencePiece(size=440, extra_ids=100)
  causal = stream_of(corpus, vocabulary=vocabulary, lengths={'targets': 64})
  first = opened(causal, tmp_path / 'cache')
  kept = sorted((tmp_path / 'cache' / 'tokens').rglob('*.npz'))
  assert len(kept) == len(first.manifest['shards'][0]) > 1
  times = [p.stat().st_mtime_ns for p in kept]
  other = stream_of(corpus, vocabulary=vocabulary, task='fim', lengths={'targets': 128})
  opened(other, tmp_path / 'cache')
  assert [p.stat().st_mtime_ns for p in kept] == times
  # From the kept tokens come the same rows as from the text.
  for path in first.folder.iterdir():
    path.unlink()
  assert opened(causal, tmp_path / 'cache').fingerprint == first.fingerprint
  shutil.rmtree(tmp_path / 'cache' / 'tokens')
  for path in first.folder.iterdir():
    path.unlink()
  assert opened(causal, tmp_path / 'cache').fingerprint == first.fingerprint


def test_two_corpora_mix_when_their_tokens_mean_the_same(tmp_path):
  def part(name, vocabulary):
    jsonl(tmp_path / f'{name}.jsonl', [{'text': t} for t in texts(30, len(name))])
    corpus = JsonLines(files=str(tmp_path / f'{name}.jsonl'))
    stream = stream_of(corpus, vocabulary=vocabulary, lengths={'targets': 64})
    return opened(stream, tmp_path / 'cache')

  def mixed(vocabulary):
    parts = {name: part(name, v) for name, v in (('a', Bytes()), ('bb', vocabulary))}
    return batches.FrozenMixture(Mixture({n: p.stream for n, p in parts.items()}), parts)

  both = mixed(Bytes())
  total = {
    key: sum(r * both.parts[n].per_example(key) for n, r in both.rates.items())
    for key in ('target_bytes', 'target_tokens')
  }
  assert both.bytes_per_token == total['target_bytes'] / total['target_tokens']
  assert next(batches.batches(both, 8, 0))['decoder_target_tokens'].shape == (8, 64)
  with pytest.raises(Invalid, match="'bb' and 'a' have different vocabularies"):
    mixed(Bytes(extra_ids=0))


def test_passes_are_fresh_corruptions_of_the_same_text(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(50)])
  stream = stream_of(
    JsonLines(files=str(tmp_path / 'x.jsonl')),
    task='span_corruption',
    lengths={'inputs': 128},
    passes=2,
  )
  frozen = opened(stream, tmp_path / 'cache')
  a, b = (frozen.examples(range(len(frozen)), number) for number in (0, 1))
  assert any((a[k] != b[k]).any() for k in a)
  shards = frozen.manifest['shards']
  assert shards[0][0]['sha256'] != shards[1][0]['sha256']
  assert abs(shards[0][0]['examples'] - shards[1][0]['examples']) <= 2


TASKS = textwrap.dedent("""
  import functools, seqio, tensorflow as tf
  features = {k: seqio.Feature(seqio.ByteVocabulary(), add_eos=True) for k in ('inputs', 'targets')}
  def source(split, shuffle_files, seed=None):
    n = 90 if split == 'train' else 9
    return tf.data.Dataset.range(n).map(
      lambda i: {'inputs': tf.strings.as_string(i), 'targets': tf.strings.as_string(i * i)})
  for name in ('squares', 'more_squares'):
    seqio.TaskRegistry.add(
      name, source=seqio.FunctionDataSource(source, splits=['train', 'validation']),
      preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
      output_features=features, shuffle_buffer_size=100)
  seqio.MixtureRegistry.add('both', [('squares', 1), ('more_squares', 2)])
""")


@pytest.fixture(scope='module')
def registered(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tasks')
  (folder / 'my_squares.py').write_text(TASKS)
  sys.path.insert(0, str(folder))
  yield 'my_squares'
  sys.path.remove(str(folder))


def test_a_registered_task_and_a_mixture_run_as_in_t5x(registered, tmp_path):
  lengths = {'inputs': 16, 'targets': 32}
  stream = Stream(task='squares', module=registered, lengths=lengths)
  frozen = opened(stream, tmp_path)
  assert frozen.features['encoder_input_tokens'][0] == (16,)
  rows = frozen.examples(range(len(frozen)))
  pairs = set()
  for i in range(len(frozen)):
    for s in range(1, rows['encoder_segment_ids'][i].max() + 1):
      sides = [
        rows[f'{side}_tokens'][i][rows[f'{side.split("_")[0]}_segment_ids'][i] == s]
        for side in ('encoder_input', 'decoder_target')
      ]
      pairs.add(tuple(int(bytes((t[t > 2] - 3).astype(np.uint8))) for t in sides))
  assert pairs == {(i, i * i) for i in range(90)}
  decoder = opened(
    Stream(task='both', module=registered, lengths=lengths, architecture='decoder'), tmp_path
  )
  assert decoder.features['decoder_causal_attention'][0] == (48,)


def test_a_misspelt_registered_task_and_split(registered, tmp_path):
  lengths = {'inputs': 16, 'targets': 32}
  with pytest.raises(UserError, match=r"registers no seqio task .* 'sqares'. Did you mean squares"):
    opened(Stream(task='sqares', module=registered, lengths=lengths), tmp_path)
  with pytest.raises(UserError, match=r"no split 'trian'. Did you mean train"):
    opened(Stream(task='squares', split='trian', module=registered, lengths=lengths), tmp_path)


def child(stream, cache, **env):
  command = [sys.executable, '-m', 'research.freeze', f'--cache={cache}']
  command.append(f'--spec={json.dumps([stream.spec()])}')
  quiet = {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''}
  pipe = subprocess.PIPE
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | quiet | env,
    stdout=pipe,
    stderr=subprocess.STDOUT,
    text=True,
  )


def digests(folder):
  return [json.loads(p.read_text())['sha256'] for p in sorted(folder.glob('pass*.json'))]


@pytest.mark.slow
def test_a_killed_freeze_resumes_and_two_writers_end_with_the_same_hashes(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(600)])
  corpus = JsonLines(files=str(tmp_path / 'x.jsonl'), piece_bytes=60_000)
  stream = stream_of(corpus, task='span_corruption', lengths={'inputs': 128}, passes=2)
  want = opened(stream, tmp_path / 'whole')
  folder = tmp_path / 'killed' / 'streams' / stream.key()
  process = child(stream, tmp_path / 'killed')
  while len(list(folder.glob('pass*.json'))) < 2:
    time.sleep(0.01)
    assert process.poll() is None, process.communicate()
  process.send_signal(signal.SIGKILL)
  process.communicate()
  done = len(digests(folder))
  assert 2 <= done < len(digests(want.folder))
  writers = [child(stream, tmp_path / 'killed') for _ in range(2)]
  said = [w.communicate()[0] for w in writers]
  assert [w.returncode for w in writers] == [0, 0], said
  assert digests(folder) == digests(want.folder)
  assert any('another process that writes' in s for s in said)
  assert not list(folder.glob('*.partial'))
  assert batches.Frozen(folder, stream).fingerprint == want.fingerprint


@pytest.mark.slow
def test_more_workers_write_the_same_files(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts(300)])
  corpus = JsonLines(files=str(tmp_path / 'x.jsonl'), piece_bytes=20_000)
  stream = stream_of(corpus, lengths={'targets': 128})
  one = opened(stream, tmp_path / 'one')
  freezing.freeze([stream], tmp_path / 'two', silent, workers=2)
  assert digests(tmp_path / 'two' / 'streams' / stream.key()) == digests(one.folder)


@pytest.mark.slow
def test_open_stream_freezes_in_a_process_of_its_own_and_relays_its_errors(tmp_path):
  jsonl(tmp_path / 'x.jsonl', [{'text': t} for t in texts()])
  lines = []
  stream = stream_of(JsonLines(files=str(tmp_path / 'x.jsonl')))
  frozen = open_stream(stream, tmp_path / 'cache', lines.append)
  assert any('freezing causal_lm train' in line for line in lines)
  start = time.monotonic()
  again = open_stream(stream, tmp_path / 'cache', lines.append)
  assert time.monotonic() - start < 1
  assert again.fingerprint == frozen.fingerprint
  bad = stream_of(JsonLines(files=str(tmp_path / 'x.jsonl'), field='txt'))
  with pytest.raises(UserError, match=r"line 1 has no text field 'txt'. Did you mean text"):
    open_stream(bad, tmp_path / 'cache', lines.append)


def test_what_is_shown_can_be_read(tmp_path, capsys):
  jsonl(tmp_path / 'x.jsonl', [{'q': 'two plus two?', 'a': 'four'}, {'q': 'why?', 'a': 'so\nso'}])
  corpus = JsonLines(
    files=str(tmp_path / 'x.jsonl'), field='a', prompt='q', validation_fraction=1e-9
  )
  stream = stream_of(corpus, task='instructions', lengths={'targets': 64})
  frozen = opened(stream, tmp_path / 'cache')
  freeze.report(frozen, tmp_path / 'cache', show=1)
  out = capsys.readouterr().out
  assert '2 document parts; decoder' in out
  assert '‹two plus two?›four<eos>' in out
  assert '‹why?›so\\nso<eos>' in out
