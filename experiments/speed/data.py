"""How fast streams are frozen and read.

    python experiments/speed/data.py [--bytes 4000000] [--cache DIR]

Freezing: text of the embedded corpus becomes packed rows in a shard, through the writer of `research.freeze`,
for every objective. The rates are text tokens per second of CPU time (one core) and of wall time, the
best of three. Fill is the share of target positions that carry loss. Reading: shuffled batches of a frozen
stream, in this process, before it imports TensorFlow.
Targets: 500k text tokens/s a core for a causal LM on bytes, 300k for span corruption with
SentencePiece; 10M tokens/s read, under 5% of a core at the rate of the quickstart's smallest model.
"""

import argparse
import csv
import json
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from research.data import batches, corpora, vocabularies  # noqa: E402
from research.data.cache import default_cache, open_stream  # noqa: E402
from research.data.streams import Stream  # noqa: E402


def pairs(cache: pathlib.Path, size: int) -> corpora.JsonLines:
  """Instruction pairs from the embedded corpus: of every five lines the first asks for the rest."""
  file = cache / f'pairs-{size}.jsonl'
  if not file.exists():
    from tasks import store

    with open(file, 'w') as out:
      text = store.open_store(corpora.PythonSources(), cache, lambda line: None)
      for document in text.documents('train', 0):
        lines = document.decode().splitlines()
        for i in range(0, len(lines), 5):
          pair = {'prompt': lines[i], 'completion': '\n'.join(lines[i + 1 : i + 5])}
          out.write(json.dumps(pair) + '\n')
        if out.tell() > size:
          break
  return corpora.JsonLines(files=str(file), prompt='prompt', field='completion')


def streams(cache: pathlib.Path, size: int):
  """Every objective on bytes, those that papers train with SentencePiece on that as well."""
  pieces = vocabularies.SentencePiece(size=8192, extra_ids=256)
  raw = vocabularies.Bytes(extra_ids=253)
  both = {'inputs': 512, 'targets': 512}
  yield Stream(task='causal_lm', lengths={'targets': 128}, vocabulary=raw)
  yield Stream(task='causal_lm', lengths={'targets': 512}, vocabulary=raw)
  yield Stream(task='causal_lm', lengths={'targets': 512}, vocabulary=pieces)
  yield Stream(task='prefix_lm', lengths={'targets': 512}, vocabulary=raw)
  yield Stream(task='span_corruption', lengths={'inputs': 512}, vocabulary=raw)
  yield Stream(task='span_corruption', lengths={'inputs': 512}, vocabulary=pieces)
  yield Stream(task='ul2', lengths=both, vocabulary=pieces)
  yield Stream(task='masked_lm', lengths={'targets': 512}, vocabulary=pieces)
  yield Stream(task='fim', lengths={'targets': 512}, vocabulary=pieces)
  corpus = pairs(cache, size)
  yield Stream(task='instructions', lengths={'targets': 512}, vocabulary=raw, corpus=corpus)


def freeze_one(stream: Stream, size: int, cache: pathlib.Path, repeats: int = 3) -> dict:
  """Tokens, and the least seconds that they took: of CPU, by the clock, of CPU in the tokenizer."""
  from research.data import shards
  from tasks import recipes, writers
  from tasks import vocabularies as tokenizers

  writer = writers.writer(stream, cache / 'unused', cache, lambda line: None)
  documents = []
  total = 0
  for piece in range(writer.pieces):
    for document in writer.store.documents('train', piece):
      if total < size:
        documents.append(document)
        total += len(document)
  # Once on a little text, so that the start-up of TensorFlow is not measured.
  few = tokenizers.encode(writer.vocabulary, documents[:3], stream.task.reads == 'pairs')
  list(recipes.blocks(writer.recipe, few, stream.lengths, 0))
  times = []
  for _ in range(repeats):
    clock = time.perf_counter()
    cpu = time.process_time()
    encoded = tokenizers.encode(writer.vocabulary, documents, stream.task.reads == 'pairs')
    tokenized = time.process_time() - cpu
    with (
      tempfile.TemporaryDirectory() as folder,
      shards.Shard(pathlib.Path(folder), 0, 0, writer.token_bytes, True) as shard,
    ):
      for rows in recipes.blocks(writer.recipe, encoded, stream.lengths, 1):
        shard.write(rows)
    times.append((time.process_time() - cpu, time.perf_counter() - clock, tokenized))
  cpu, clock, tokenized = map(min, zip(*times, strict=True))
  fill = shard.facts['target_tokens'] / shard.facts['positions']
  tokens = sum(len(side) for d in encoded for side in d.values())
  return {'tokens': tokens, 'cpu': cpu, 'clock': clock, 'tokenize': tokenized, 'fill': fill}


def smallest_rate() -> float:
  """Tokens per second that the quickstart's smallest model was trained at, on two cores."""
  with open(ROOT / 'experiments' / 'quickstart' / 'results.csv') as f:
    run = min(csv.DictReader(f), key=lambda r: int(r['params_total']))
  return float(run['tokens']) / float(run['seconds'])


def read(cache: pathlib.Path, length: int = 512):
  """Prints tokens/s read in shuffled batches, and the share of a core at a small model's rate."""
  stream = Stream(lengths={'targets': length}, examples=30_000)
  frozen = open_stream(stream, cache, lambda line: None)
  rate = smallest_rate()
  for prefetch in (0, 2):
    reader = batches.batches(frozen, 64, seed=0, prefetch=prefetch)
    for _ in range(20):
      next(reader)
    clock_start = time.perf_counter()
    cpu_start = time.process_time()
    n = 0
    while time.perf_counter() - clock_start < 3:
      n += next(reader)['decoder_target_tokens'].size
    clock = time.perf_counter() - clock_start
    cpu = time.process_time() - cpu_start
    print(
      f'read, prefetch {prefetch}: {n / clock / 1e6:6.1f}M tokens/s by the clock, '
      f'{n / cpu / 1e6:6.1f}M a core; {rate / (n / cpu):.2%} of a core at {rate:,.0f} tokens/s'
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--bytes', type=int, default=4_000_000, help='text per objective')
  parser.add_argument('--cache', default=None, help='default: $ISOFLOP_CACHE or ~/.cache/isoflop')
  flags = parser.parse_args()
  cache = pathlib.Path(flags.cache or default_cache()).expanduser()
  os.environ |= {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''}
  read(cache)
  print(f'{"objective":16}{"vocabulary":15}{"length":>7}{"text tokens/s a core":>22}'
        f'{"by the clock":>14}{"tokenizing":>12}{"fill":>7}')  # fmt: skip
  for stream in streams(cache, flags.bytes):
    result = freeze_one(stream, flags.bytes, cache)
    print(
      f'{stream.name:16}{stream.vocabulary.name:15}{max(stream.lengths.values()):7d}'
      f'{result["tokens"] / result["cpu"]:22,.0f}{result["tokens"] / result["clock"]:14,.0f}'
      f'{result["tokenize"] / result["cpu"]:12.0%}{result["fill"]:7.1%}',
      flush=True,
    )


if __name__ == '__main__':
  main()
