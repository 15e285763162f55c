"""A corpus that tasks build has the bytes of one that a single process builds, whatever is lost on the way."""

import json
import random

import numpy as np
import pytest

from research.core.errors import UserError
from research.data import cleaning, corpora
from tasks import buckets, shuffle, store
from tasks import cleaning as applied


@pytest.fixture(autouse=True)
def few_buckets(monkeypatch):
  """Four tasks of a stage in place of 256, each of which writes a dozen files."""
  monkeypatch.setattr(buckets, 'BUCKETS', 4)


WORDS = [f'w{i:03d}' for i in range(400)]


def write_corpus(folder, files: int = 5, documents: int = 60) -> list[str]:
  """JSON-lines files with exact and near-duplicates across files, and training text that repeats validation."""
  chance = random.Random(1)
  texts = [' '.join(chance.choices(WORDS, k=chance.randint(30, 90))) for _ in range(documents)]
  folder.mkdir()
  for number in range(files):
    mine = [' '.join(chance.choices(WORDS, k=60)) for _ in range(documents)]
    few = documents // 5
    mine += chance.sample(texts, few)  # exact duplicates in other files
    for text in chance.sample(texts, few):  # a few words in common
      mine.append(' '.join([*text.split()[:10], *chance.choices(WORDS, k=60)]))
    for text in chance.sample(texts, few):  # one word of many is another
      words = text.split()
      words[chance.randrange(len(words))] = 'changed'
      mine.append(' '.join(words))
    mine.append('short')
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in mine)
    (folder / f'{number}.jsonl').write_text(lines + 'not json\n')
  return texts


def make(folder, **fields) -> corpora.JsonLines:
  return corpora.JsonLines(
    files=str(folder / '*.jsonl'),
    validation_fraction=0.1,
    broken='skip',
    filters=(cleaning.Length(20),),
    near_duplicates=cleaning.NearDuplicates(threshold=0.7, permutations=64, shingle=2),
    contamination=cleaning.Contamination(ngram=6, drop=fields.pop('drop', True)),
    piece_bytes=fields.pop('piece_bytes', 6000),
    **fields,
  )


def in_this_process(name: str, calls: dict, work) -> dict:
  """The calls of one stage, the last of them first."""
  for key in reversed(calls):
    shuffle.do(name, str(work), key, *calls[key])
  return {key: shuffle.do(name, str(work), key, *calls[key]) for key in calls}


def built(corpus, folder) -> dict[str, bytes]:
  folder.mkdir()
  manifest = store.build(corpus, folder, lambda line: None)
  return files_in(folder) | {'manifest': json.dumps(manifest).encode()}


def built_by_tasks(corpus, folder, fail=lambda name: None) -> dict[str, bytes]:
  def run(name, calls):
    values = in_this_process(name, calls, folder / 'tasks')
    fail(name)
    return values

  manifest = shuffle.build(corpus, folder, run, lambda line: None)
  return files_in(folder) | {'manifest': json.dumps(manifest).encode()}


def files_in(folder) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


@pytest.mark.parametrize('drop', [True, False])
def test_tasks_write_the_bytes_of_one_process(tmp_path, drop, monkeypatch):
  monkeypatch.setattr(buckets, 'SEGMENT', 9000)  # several segments a file
  write_corpus(tmp_path / 'text')
  corpus = make(tmp_path / 'text', drop=drop)
  one = built(corpus, tmp_path / 'one')
  many = built_by_tasks(corpus, tmp_path / 'many')
  assert many == one
  manifest = json.loads(one['manifest'])
  assert manifest['splits']['train']['pieces'] > 5
  dropped = manifest['dropped']
  # The test has something of each kind to find.
  assert dropped['exact duplicates'] > 10
  assert dropped['near duplicates'] > 10
  assert manifest['contamination']['documents'] > 0
  assert ('share an n-gram with validation' in dropped) == drop
  assert dropped['broken: not JSON'] == 5
  assert dropped['Length: under 20 characters'] == 5


def test_more_pieces_than_first_bytes(tmp_path):
  write_corpus(tmp_path / 'text', files=2)
  corpus = make(tmp_path / 'text', piece_bytes=700)
  one = built(corpus, tmp_path / 'one')
  assert json.loads(one['manifest'])['splits']['train']['pieces'] > 10 * buckets.BUCKETS
  assert built_by_tasks(corpus, tmp_path / 'many') == one


def test_files_of_a_named_split(tmp_path):
  write_corpus(tmp_path / 'text', files=3)
  (tmp_path / 'validation').mkdir()
  (tmp_path / 'text' / '0.jsonl').rename(tmp_path / 'validation' / '0.jsonl')
  corpus = make(tmp_path / 'text', validation_files=str(tmp_path / 'validation' / '*.jsonl'))
  assert built_by_tasks(corpus, tmp_path / 'many') == built(corpus, tmp_path / 'one')


@pytest.mark.parametrize('stage', ['read', 'resolve', 'write'])
def test_a_build_that_was_stopped_goes_on(tmp_path, stage):
  write_corpus(tmp_path / 'text', files=2, documents=10)
  corpus = make(tmp_path / 'text')
  one = built(corpus, tmp_path / 'one')

  def fail(name):
    if name == stage:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    built_by_tasks(corpus, tmp_path / 'many', fail)
  work = tmp_path / 'many' / 'tasks'
  done = {path: path.stat().st_mtime_ns for path in work.glob(f'{stage}-*.json')}
  assert done

  def check_kept(name):
    if name == stage:  # what was done is not done again
      assert {path: path.stat().st_mtime_ns for path in done} == done

  assert built_by_tasks(corpus, tmp_path / 'many', check_kept) == one


def test_a_broken_file_is_named(tmp_path):
  write_corpus(tmp_path / 'text', files=2, documents=10)
  corpus = corpora.JsonLines(files=str(tmp_path / 'text' / '*.jsonl'))
  with pytest.raises(UserError, match=r'\.jsonl: line \d+ is not JSON'):
    built_by_tasks(corpus, tmp_path / 'many')


def test_documents_that_share_a_band_are_found_and_no_others():
  rule = cleaning.NearDuplicates(threshold=0.7, permutations=64, shingle=2)
  near = applied.MinHash(rule)
  texts = [b'a b c d e f g h i j k l m n o p q r s t', b'one two three four five six seven']
  signatures = [near.signature(text) for text in texts]
  changed = signatures[0].copy()
  changed[: len(changed) // 2] ^= 1  # the first half of its bands is another
  hashes = np.array([near.band_hashes(s) for s in (*signatures, changed)], np.uint64)
  bands = len(near.bands)
  assert (hashes[0] == hashes[2]).tolist() == [band >= bands // 2 for band in range(bands)]
  assert not (hashes[0] == hashes[1]).any()
