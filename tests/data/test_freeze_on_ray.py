"""A freeze on three hosts, one of which is killed, has the bytes of a freeze by one process."""

import dataclasses
import json
import random
import re
import threading
import time

import pytest

from research.core.errors import UserError
from research.data import cleaning, corpora, vocabularies
from research.data.streams import Stream
from tests import raylets

# Ray leaves files and processes to the garbage collector, and forks while jax has threads (to exec at once).
pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
  'ignore:os.fork:RuntimeWarning',
)
WORDS = [f'word{i}' for i in range(2000)]
PAIRS = 150  # of near-duplicates


def write_corpus(folder, files: int, documents: int) -> None:
  """JSON-lines files; each near-duplicate lies in another file than the document that it repeats."""
  chance = random.Random(0)
  lines = [[' '.join(chance.choices(WORDS, k=200)) for _ in range(documents)] for _ in range(files)]
  for pair in range(PAIRS):
    words = [f'pair{pair:04d}', *chance.choices(WORDS, k=200)]
    changed = list(words)
    for place in chance.sample(range(1, len(words)), 3):
      changed[place] = 'other'
    lines[pair % files].append(' '.join(words))
    lines[(pair + 1 + pair // files % (files - 1)) % files].append(' '.join(changed))
    if pair % 5 == 0:
      lines[(pair + 1) % files].append(' '.join(words))
  folder.mkdir()
  for number, texts in enumerate(lines):
    text = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
    (folder / f'{number}.jsonl').write_text(text)


@pytest.fixture
def make(tmp_path):
  """A stream over so many files of so many documents each, 1.4 kB long."""

  def make(files: int, documents: int) -> Stream:
    write_corpus(tmp_path / 'text', files, documents)
    corpus = corpora.JsonLines(
      files=str(tmp_path / 'text' / '*.jsonl'),
      near_duplicates=cleaning.NearDuplicates(),
      contamination=cleaning.Contamination(),
      piece_bytes=300_000,
    )
    return Stream(corpus=corpus, vocabulary=vocabularies.Bytes(), lengths={'targets': 256})

  return make


def files_in(folder) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and path.suffix != '.lock' and not path.name.startswith('.shared')
  }


def pairs_found(files: dict[str, bytes]) -> int:
  """How many of the planted pairs have one document left."""
  text = b''.join(data for name, data in files.items() if name.endswith('.txt'))
  counts = [text.count(f'pair{pair:04d}'.encode()) for pair in range(PAIRS)]
  assert min(counts) == 1
  return counts.count(1)


def frozen(stream: Stream, cache, engine=None, log=lambda line: None) -> dict[str, bytes]:
  """The files of a freeze."""
  import tasks.objectives  # noqa: F401
  from tasks import freezing

  cache.mkdir(exist_ok=True)
  freezing.freeze([stream], cache, log=log, engine=engine)
  return files_in(cache)


@pytest.mark.slow
def test_the_bytes_are_those_of_one_process(make, tmp_path, ray_hosts):
  """3 MB of text; a host is killed while it writes a shard, and another one joins."""
  from tasks import on_ray

  stream = make(files=6, documents=300)
  one = frozen(stream, tmp_path / 'one')
  lines: list[str] = []

  def kill_a_host():
    while not (busy := [each for each in ray_hosts.raylets if ray_hosts.busy(each, 'write_shard')]):
      time.sleep(0.02)
    ray_hosts.kill(busy[0])
    ray_hosts.add()

  killer = threading.Thread(target=kill_a_host, daemon=True)
  killer.start()
  (tmp_path / 'many').mkdir()
  engine = on_ray.Engine(ray_hosts.address, tmp_path / 'many', lines.append)
  many = frozen(stream, tmp_path / 'many', engine, lines.append)
  killer.join(60)
  assert not killer.is_alive()
  assert many == one
  assert any('is done again' in line for line in lines)
  assert 0.9 * PAIRS < pairs_found(many) == pairs_found(one)


@pytest.mark.slow
def test_near_duplicates_are_found_across_files_that_different_hosts_read(
  make, tmp_path, ray_hosts
):
  """Three files of which each host reads one: every pair has its documents on two hosts."""
  from tasks import on_ray

  (tmp_path / 'meeting').mkdir()
  together = raylets.Together(str(tmp_path / 'meeting'), 3)
  stream = make(files=3, documents=500)
  stream = dataclasses.replace(
    stream, corpus=dataclasses.replace(stream.corpus, filters=(together,))
  )
  lines: list[str] = []
  (tmp_path / 'many').mkdir()
  engine = on_ray.Engine(ray_hosts.address, tmp_path / 'many', lines.append)
  many = frozen(stream, tmp_path / 'many', engine, lines.append)
  one = frozen(stream, tmp_path / 'one')  # after the three, which it does not wait for
  assert any(re.match(r'jsonl, read: 3 of 3 tasks, on 3 nodes', line) for line in lines), lines
  (manifest,) = (
    json.loads(path.read_text()) for path in (tmp_path / 'many').rglob('manifest.json')
  )
  # Three changed words of 200 leave a similarity of about .93: nearly all are found.
  assert manifest['dropped'] == {'exact duplicates': 30, 'near duplicates': pairs_found(many)}
  assert 0.9 * PAIRS < pairs_found(many) == pairs_found(one)
  assert many == one


@pytest.mark.slow
def test_hosts_freeze_the_shards_of_a_registered_task(tmp_path, ray_hosts):
  from tasks import on_ray

  stream = Stream(task='pages', module='tests.pages', lengths={'targets': 128}, source_shards=True)
  one = frozen(stream, tmp_path / 'one')
  lines: list[str] = []
  (tmp_path / 'many').mkdir()
  engine = on_ray.Engine(ray_hosts.address, tmp_path / 'many', lines.append)
  many = frozen(stream, tmp_path / 'many', engine, lines.append)
  assert many == one
  assert len([name for name in many if name.endswith('.bin')]) == 3
  assert any(re.match(r'pages train: 3 of 3 tasks', line) for line in lines), lines


def test_the_flags_of_an_engine_go_together(tmp_path):
  from research import freeze

  for flags, why in (
    (['--address=a:1'], '--address=a:1 goes with --engine=ray'),
    (['--engine=ray', '--workers=2'], '--workers=2 goes with --engine=local'),
  ):
    with pytest.raises(UserError, match=why):
      freeze.main(['--gin_file=gin/runs/tiny.gin', f'--cache={tmp_path}', *flags])
