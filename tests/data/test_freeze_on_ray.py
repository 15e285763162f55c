"""A freeze on three hosts, one of which is killed, has the bytes of a freeze by one process."""

import json
import random
import threading
import time

import pytest

from research.core.errors import UserError
from research.data import cleaning, corpora, vocabularies
from research.data.streams import Stream

# Ray leaves files and processes to the garbage collector, and forks while jax has threads (to exec at once).
pytestmark = pytest.mark.filterwarnings(
  'ignore::ResourceWarning',
  'ignore::pytest.PytestUnraisableExceptionWarning',
  'ignore:os.fork:RuntimeWarning',
)


@pytest.fixture
def stream(tmp_path) -> Stream:
  """A stream over six files in which some documents nearly repeat those of other files."""
  chance = random.Random(0)
  words = [f'word{i}' for i in range(500)]
  texts = [' '.join(chance.choices(words, k=120)) for _ in range(100)]
  (tmp_path / 'text').mkdir()
  for i in range(6):
    mine = [' '.join(chance.choices(words, k=120)) for _ in range(100)]
    mine += chance.sample(texts, 10)
    mine += [text + ' and more' for text in chance.sample(texts, 30)]
    lines = ''.join(json.dumps({'text': text}) + '\n' for text in mine)
    (tmp_path / 'text' / f'{i}.jsonl').write_text(lines)
  corpus = corpora.JsonLines(
    files=str(tmp_path / 'text' / '*.jsonl'),
    near_duplicates=cleaning.NearDuplicates(permutations=32),
    contamination=cleaning.Contamination(),
    piece_bytes=50_000,
  )
  return Stream(corpus=corpus, vocabulary=vocabularies.Bytes(), lengths={'targets': 64})


def files_in(folder) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file() and path.suffix != '.lock' and not path.name.startswith('.shared')
  }


@pytest.mark.slow
def test_the_bytes_are_those_of_one_process(stream, tmp_path, ray_hosts):
  from tasks import freezing, on_ray

  lines: list[str] = []
  one, many = tmp_path / 'one', tmp_path / 'many'
  one.mkdir()
  many.mkdir()
  freezing.freeze([stream], one, log=lambda line: None)

  def kill_a_host():
    while (raylet := ray_hosts.busy_with('write_shard')) is None:
      time.sleep(0.05)
    ray_hosts.kill(raylet)
    ray_hosts.add()

  killer = threading.Thread(target=kill_a_host)
  killer.start()
  engine = on_ray.Engine(ray_hosts.address, many, lines.append)
  freezing.freeze([stream], many, log=lines.append, engine=engine)
  killer.join()
  assert files_in(many) == files_in(one)
  (manifest,) = (json.loads(path.read_text()) for path in one.glob('corpora/*/manifest.json'))
  assert manifest['dropped']['near duplicates'] > 50
  assert manifest['splits']['train']['pieces'] > 5
  assert any('is done again' in line for line in lines)


def test_the_flags_of_an_engine_go_together(tmp_path):
  from research import freeze

  for flags, why in (
    (['--address=a:1'], '--address=a:1 goes with --engine=ray'),
    (['--engine=ray', '--workers=2'], '--workers=2 is of --engine=local'),
  ):
    with pytest.raises(UserError, match=why):
      freeze.main(['--gin_file=gin/runs/tiny.gin', f'--cache={tmp_path}', *flags])
