"""Files as other people have them: each gives its text, or one sentence with the file's name and the line."""

import bz2
import gzip
import json
import lzma
import pathlib
import re

import numpy as np
import pytest

from research import freeze
from research.core.errors import Invalid, UserError
from research.data import batches
from research.data.corpora import HuggingFace, JsonLines, Parquet, TextFiles
from research.data.objectives import OBJECTIVES
from research.data.streams import Stream
from research.data.vocabularies import Bytes, HuggingFaceTokenizer, SentencePiece
from tasks import files, freezing, readers

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import
CASES = pathlib.Path(__file__).resolve().parent.parent.parent.parent / 'shared' / 'cases'


def silent(line):
  del line


def case(name: str) -> str:
  if not CASES.is_dir():
    pytest.skip('the folder of failing inputs is not beside the checkout')
  return str(CASES / name)


def texts_of(corpus) -> list[str]:
  return [text.decode() for _, text in readers.read(corpus, files.Dropped())]


def zstd(data: bytes) -> bytes:
  import pyarrow

  return pyarrow.compress(data, 'zstd', asbytes=True)


COMPRESSED = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress, 'zst': zstd}
LINES = ''.join(json.dumps({'text': f'text {i}'}) + '\n' for i in range(3000)).encode()


@pytest.mark.parametrize('named', [True, False])
@pytest.mark.parametrize('suffix', COMPRESSED)
def test_every_compression_is_read_by_its_content(tmp_path, suffix, named):
  path = tmp_path / (f'a.jsonl.{suffix}' if named else 'a.jsonl')
  path.write_bytes(COMPRESSED[suffix](LINES))
  assert texts_of(JsonLines(files=str(path))) == [f'text {i}' for i in range(3000)]


@pytest.mark.parametrize('suffix', COMPRESSED)
def test_a_compressed_file_that_is_cut_is_refused(tmp_path, suffix):
  path = tmp_path / f'a.jsonl.{suffix}'
  data = COMPRESSED[suffix](LINES)
  path.write_bytes(data[: len(data) * 2 // 3])
  with pytest.raises(UserError, match=rf'a.jsonl.{suffix}: .*(ends in the middle|cannot be read)'):
    texts_of(JsonLines(files=str(path)))


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'PK\x03\x04' + b'x' * 50, 'it is a zip archive: unpack it'),
    (b'\x04\x22\x4d\x18' + b'x' * 50, 'compressed with lz4'),
    (b'PAR1' + b'x' * 50, 'a Parquet file: read it with corpora.Parquet'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n', 'git lfs pull'),
  ],
)
@pytest.mark.parametrize('kind', [JsonLines, TextFiles])
def test_a_file_of_another_kind_is_named(tmp_path, kind, content, message):
  path = tmp_path / 'a.jsonl'
  path.write_bytes(content)
  with pytest.raises(UserError, match=message):
    texts_of(kind(files=str(path)))


def test_a_path_that_exists_is_that_file_whatever_brackets_it_has(tmp_path):
  folder = tmp_path / 'dir [v2] #1?'
  folder.mkdir()
  for name in ('a[1].txt', 'b[1].txt', 'a1.txt'):
    (folder / name).write_text(f'text of {name}')
  assert texts_of(TextFiles(files=str(folder / 'a[1].txt'))) == ['text of a[1].txt']
  assert len(texts_of(TextFiles(files=str(folder / '*.txt')))) == 3
  assert texts_of(TextFiles(files=str(folder / 'a[0-9].txt'))) == ['text of a1.txt']
  with pytest.raises(Invalid, match=r"no file matches '.*a\[2\].txt'"):
    TextFiles(files=str(folder / 'a[2].txt'))


JSON_LINES = {
  'nested deeply': ('[' * 200_000, r'line 2 is JSON that is nested too deeply'),
  'huge integer': (
    '{"text": "x", "n": ' + '1' * 5000 + '}',
    r'line 2 cannot be read as JSON \(Exceeds',
  ),
  'null': ('{"text": null}', r"line 2 has no text field 'text': it is null"),
  'number': ('{"text": 3}', r"line 2 has no text field 'text'. It is of type int"),
  'array': ('[1, 2]', r'line 2 is an array and not a JSON object'),
  'null record': ('null', r'line 2 is null and not a JSON object'),
  'string': ('"x"', r'line 2 is a string and not a JSON object'),
  'zero bytes': ('\0{\0"\0', r'line 2 (is not|cannot be read as) JSON'),
  'no field': ('{"txt": "x"}', r"line 2 has no text field 'text'. Did you mean txt\?"),
}


@pytest.mark.parametrize('name', JSON_LINES)
def test_whatever_is_wrong_with_a_json_line_is_that_lines_error(tmp_path, name):
  line, message = JSON_LINES[name]
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "one"}\n' + line + '\n{"text": "three"}\n')
  with pytest.raises(UserError, match=rf'a\.jsonl: {message}'):
    texts_of(JsonLines(files=str(path)))
  assert texts_of(JsonLines(files=str(path), broken='skip')) == ['one', 'three']


def parquet(path):
  import pyarrow
  import pyarrow.parquet

  pyarrow.parquet.write_table(pyarrow.table({'text': [f'text {i}' for i in range(5000)]}), path)
  return path.read_bytes()


@pytest.mark.parametrize('spoil', ['empty', 'cut', 'middle', 'pointer', 'text'])
def test_a_damaged_parquet_file_is_told_in_a_sentence(tmp_path, spoil):
  path = tmp_path / 'a.parquet'
  data = parquet(path)
  path.write_bytes(
    {
      'empty': b'',
      'cut': data[: len(data) // 2],
      'middle': data[:200] + bytes(range(256)) * 8 + data[200 + 2048 :],
      'pointer': b'version https://git-lfs.github.com/spec/v1\n',
      'text': b'hello' * 30,
    }[spoil]
  )
  with pytest.raises(UserError, match=r'a\.parquet: (after line \d+ )?it '):
    texts_of(Parquet(files=str(path)))


@pytest.mark.parametrize(
  'state',
  ['{', '[]', '{}', '{"_data_files": [{"filename": "a.arrow"}]}', '{"_data_files": 3}', None],
)
def test_a_damaged_folder_of_hugging_face_is_told_in_a_sentence(tmp_path, state):
  if state is not None:
    (tmp_path / 'state.json').write_text(state)
  with pytest.raises(UserError, match=rf'{re.escape(str(tmp_path))}: it'):
    texts_of(HuggingFace(files=str(tmp_path)))


CASES_OF_FILES = {
  'bigint.jsonl': r'bigint.jsonl: line \d+ cannot be read as JSON \(Exceeds the limit',
  'deep.jsonl': r'deep.jsonl: line \d+ is JSON that is nested too deeply',
  'null_text.jsonl': r"null_text.jsonl: line 301 has no text field 'text': it is null",
  'gz_no_ext.jsonl': 300,
  'x.jsonl.bz2': 300,
  'x.jsonl.xz': 300,
  'x.jsonl.zst': 300,
  'dir [v2] é/ok.jsonl': 300,
}


@pytest.mark.parametrize('name', CASES_OF_FILES)
def test_the_cases_of_files(name):
  expected = CASES_OF_FILES[name]
  corpus = JsonLines(files=case(f'19-data-files/{name}'))
  if isinstance(expected, int):
    assert len(texts_of(corpus)) == expected
  else:
    with pytest.raises(UserError, match=expected):
      texts_of(corpus)


def test_the_cases_of_tables():
  with pytest.raises(
    UserError, match=r"null.parquet: row \d+ has no text field 'text': it is null"
  ):
    texts_of(Parquet(files=case('19-data-files/null.parquet')))
  with pytest.raises(UserError, match=r'hf_bad: its state.json is damaged'):
    texts_of(HuggingFace(files=case('19-data-files/hf_bad')))


# Vocabularies.


def test_a_sentencepiece_model_that_is_none_is_refused(tmp_path):
  with pytest.raises(Invalid, match=r'lfs.model is a Git LFS pointer'):
    SentencePiece(file=case('18-sentencepiece/lfs.model'))
  path = tmp_path / 'a.model'
  path.write_bytes(b'')
  with pytest.raises(Invalid, match=r'a.model is empty'):
    SentencePiece(file=str(path))
  from tasks import vocabularies

  for content in (b'no model at all', b'\x0a\x05hello', bytes(range(256)) * 4):
    path.write_bytes(content)
    with pytest.raises(Invalid, match=r'SentencePiece.file: .*a.model is no SentencePiece model'):
      vocabularies.build(SentencePiece(file=str(path)), tmp_path, None)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
  from tasks import vocabularies

  path = tmp_path / 'tokenizer.json'
  path.write_text('version https://git-lfs.github.com/spec/v1\n')
  with pytest.raises(Invalid, match=r'tokenizer.json is a Git LFS pointer'):
    HuggingFaceTokenizer(file=str(path))
  for content in ('{', '[]', '{"version": "1.0"}', 'null'):
    path.write_text(content)
    with pytest.raises(Invalid, match=r'tokenizer.json is no tokenizer.json'):
      vocabularies.build(HuggingFaceTokenizer(file=str(path)), tmp_path, None)


def test_a_size_that_cannot_be_learned_is_told_in_ids_that_count_the_extra_ids():
  from tasks import vocabularies

  draw = np.random.default_rng(0)
  words = [''.join(draw.choice(list('abcdefghij'), 8)) for _ in range(60)]
  lines = [' '.join(draw.choice(words, 6)) for _ in range(200)]
  with pytest.raises(Invalid, match=r'SentencePiece.size: 8192 is too many') as error:
    vocabularies.train(SentencePiece(size=8192, extra_ids=128), lines)
  most = int(re.search(r'at most (\d+), the 128 extra ids included', str(error.value))[1])
  assert vocabularies.train(SentencePiece(size=most, extra_ids=128), lines)
  with pytest.raises(Invalid, match=f'at most {most},'):
    vocabularies.train(SentencePiece(size=most + 1, extra_ids=128), lines)


def frozen_of(stream, folder):
  freezing.freeze([stream], folder, silent)
  return batches.Frozen(folder / 'streams' / stream.key(), stream)


def tokenizer(folder, special: list[str]) -> str:
  """A tokenizer of bytes whose first ids are `special`."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  ids = {token: i for i, token in enumerate([*special, *alphabet])}
  made = tokenizers.Tokenizer(models.BPE(ids, []))
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(special)
  path = folder / f'{len(special)}-{special[0].strip("<|/>")}.json'
  made.save(str(path))
  return str(path)


ENDS = {
  'causal_lm': {'lengths': {'targets': 64}},
  'prefix_lm': {'lengths': {'targets': 64}},
  'span_corruption': {'lengths': {'inputs': 64}},
  'instructions': {'lengths': {'targets': 96}},
  'instructions, encoder_decoder': {'lengths': {'inputs': 64, 'targets': 64}},
}


@pytest.mark.parametrize('packing', [True, False])
@pytest.mark.parametrize('name', ENDS)
def test_documents_end_alike_whatever_the_id_of_their_end(tmp_path, name, packing):
  """EOS 0 (GPT-NeoX, Pythia, MPT) and EOS 2 (LLaMA): equal losses, at equal places, on every end."""
  task, _, architecture = name.partition(', ')
  rows = [{'prompt': f'ask {i}', 'text': f'say {i} ' * (1 + i % 9)} for i in range(60)]
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  pairs = OBJECTIVES[task].reads == 'pairs'
  corpus = JsonLines(
    files=str(tmp_path / 'a.jsonl'), prompt='prompt' if pairs else None, validation_fraction=1e-9
  )
  weights = []
  for special in (['<|endoftext|>', '<|padding|>', '<x>'], ['<unk>', '<s>', '</s>']):
    vocabulary = HuggingFaceTokenizer(file=tokenizer(tmp_path, special), extra_ids=20)
    fields = {'task': task, 'packing': packing, 'vocabulary': vocabulary, **ENDS[name]}
    stream = Stream(corpus=corpus, architecture=architecture or None, **fields)
    eos = special.index('</s>' if '</s>' in special else '<|endoftext|>')
    if eos == 0 and not packing and 'inputs' in stream.lengths:
      with pytest.raises(Invalid, match=r'Stream.packing: False tells padding by its id 0'):
        frozen_of(stream, tmp_path / 'cache')
      return
    frozen = frozen_of(stream, tmp_path / 'cache')
    batch = frozen.examples(range(len(frozen)))
    weight, target = batch['decoder_loss_weights'], batch['decoder_target_tokens']
    ends = (target == eos) & (weight > 0)
    if task != 'prefix_lm':
      assert ends.sum() >= 55, 'every document ends once'
    else:
      assert ends.sum() >= 60
    if packing:
      assert not weight[batch['decoder_segment_ids'] == 0].any()
    weights.append(weight)
  np.testing.assert_array_equal(*weights)


def test_pairs_that_no_row_holds_are_counted(tmp_path, capsys):
  rows = [
    {'prompt': 'ask', 'text': 'x' * n} for n in (5, 27, 28, 29, 300)
  ]  # 3 + 28 and EOS are a row of 32
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
  corpus = JsonLines(files=str(tmp_path / 'a.jsonl'), prompt='prompt', validation_fraction=1e-9)
  fields = {'task': 'instructions', 'corpus': corpus, 'vocabulary': Bytes()}
  frozen = frozen_of(Stream(lengths={'targets': 32}, **fields), tmp_path / 'cache')
  targets = frozen.examples(range(len(frozen)))['decoder_target_tokens']
  assert (targets == 1).sum() == 3
  freeze.report(frozen, tmp_path / 'cache', show=0)
  assert '2 pairs longer than a row' in capsys.readouterr().out
  with pytest.raises(UserError, match='left out: 5 pairs longer than a row'):
    frozen_of(Stream(lengths={'targets': 8}, **fields), tmp_path / 'cache')


def test_the_cases_of_an_end_that_is_id_0(tmp_path):
  corpus = JsonLines(files=case('19-data-files/ok.jsonl'), validation_fraction=1e-9)
  for name, eos in (('neox', 0), ('llama', 2)):
    vocabulary = HuggingFaceTokenizer(file=case(f'17-eos-id-0/{name}.json'))
    stream = Stream(corpus=corpus, vocabulary=vocabulary, lengths={'targets': 256})
    assert ('eos 0' in vocabulary.signature()) == (eos == 0)
    frozen = frozen_of(stream, tmp_path)
    batch = frozen.examples(range(len(frozen)))
    ends = (batch['decoder_target_tokens'] == eos) & (batch['decoder_loss_weights'] > 0)
    assert ends.sum() == frozen.manifest['corpus']['documents']


# Tasks that somebody registered with seqio.


@pytest.mark.parametrize(
  ('task', 'message'),
  [
    ('breaks_midway', r'breaks_midway: .*the file behind this is gone'),
    ('no_inputs', r'seqio cannot build no_inputs: .*inputs'),
    ('mix', r'seqio cannot build mix: '),
    ('nofile', r'nofile: .*/nonexistent/file.txt'),
  ],
)
def test_a_registered_task_that_fails_is_told_in_a_sentence(tmp_path, monkeypatch, task, message):
  monkeypatch.syspath_prepend(case('25-seqio-warmstart'))
  stream = Stream(task=task, module='mytasks', lengths={'inputs': 64, 'targets': 64})
  with pytest.raises(UserError, match=message) as error:
    frozen_of(stream, tmp_path)
  assert 'Traceback' not in str(error.value)
  assert '\n' not in str(error.value)
  assert len(str(error.value)) < 500


def test_streams_made_before_keep_their_names_and_bytes(tmp_path, monkeypatch):
  """Names and digests as the version before this layout wrote them, for a fixed file."""
  monkeypatch.chdir(tmp_path)
  path = pathlib.Path('a.jsonl')
  path.write_text(
    ''.join(json.dumps({'text': f'{i} of some text ' * (1 + i % 7)}) + '\n' for i in range(50))
  )
  import os

  os.utime(path, ns=(10**18, 10**18))
  corpus = JsonLines(files='a.jsonl', validation_fraction=1e-9)
  expected = {
    'causal_lm': ('causal_lm-train-3ad5fa15057a729a', 'e4cc821cd7675420'),
    'ul2': ('ul2-train-b9bd8bba43acd3f8', '5d6a7c59694976f7'),
  }
  for task, lengths in (('causal_lm', {'targets': 64}), ('ul2', {'inputs': 64})):
    stream = Stream(task=task, corpus=corpus, vocabulary=Bytes(200), lengths=lengths)
    frozen = frozen_of(stream, tmp_path / 'cache')
    assert (stream.key(), frozen.fingerprint) == expected[task]
