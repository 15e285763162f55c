"""How fast streams are frozen and read.

    python experiments/speed/data.py [--bytes 4000000] [--cache DIR]

Freezing: text of the embedded corpus -> packed rows in a shard, through `research.freeze`'s own
writer, for every objective; text tokens that enter per second of CPU time, which is what one core
does, and per second of the clock. Fill is the share of target positions that carry loss. Reading:
shuffled batches of a frozen stream, in this process, without TensorFlow. Targets: 500k text tokens/s
a core for a causal LM on bytes, 300k for span corruption with SentencePiece; 10M tokens/s read.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from research import data, objectives, vocabularies  # noqa: E402
from research.streams import Stream, from_spec  # noqa: E402

# The quickstart's smallest model: tokens/s that its training step takes on two cores.
STEP_TOKENS = 75_000


def streams():
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
  yield Stream(task=objectives.FillInTheMiddle(), lengths={'targets': 512}, vocabulary=pieces)


def freeze_one(spec: dict, size: int, cache: pathlib.Path):
  """Prints the rates of one stream, as JSON."""
  from research import freeze, shards
  from tasks import objectives as built
  from tasks import vocabularies as tokenizers

  stream = from_spec(spec)
  writer = freeze.writer(stream, cache / 'unused', cache, lambda line: None)
  documents, held = [], 0
  for piece in range(writer.pieces):
    for document in writer.store.documents('train', piece):
      if held < size:
        documents.append(document)
        held += len(document)
  # Once on a little text, so that nothing is measured of what happens once in a process.
  few = tokenizers.encode(writer.vocabulary, documents[:3], False)
  list(built.blocks(writer.made, few, stream.lengths, 0))
  clock, cpu = time.perf_counter(), time.process_time()
  encoded = tokenizers.encode(writer.vocabulary, documents, False)
  tokenized = time.process_time() - cpu
  with (
    tempfile.TemporaryDirectory() as folder,
    shards.Shard(pathlib.Path(folder), 0, 0, writer.token_bytes, True) as shard,
  ):
    for rows in built.blocks(writer.made, encoded, stream.lengths, 1):
      shard.write(rows)
  clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
  tokens = sum(len(d['targets']) for d in encoded)
  fill = shard.facts['target_tokens'] / shard.facts['positions']
  print(
    json.dumps({'tokens': tokens, 'cpu': cpu, 'clock': clock, 'tokenize': tokenized, 'fill': fill})
  )


def read(cache: pathlib.Path, length: int = 512):
  """Prints tokens/s read in shuffled batches, and the share of a core at a small model's rate."""
  stream = Stream(lengths={'targets': length}, examples=30_000)
  frozen = data.open_stream(stream, cache, lambda line: None)
  for prefetch in (0, 2):
    made = data.batches(frozen, 64, seed=0, prefetch=prefetch)
    for _ in range(20):
      next(made)
    clock, cpu, n = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - clock < 3:
      n += next(made)['decoder_target_tokens'].size
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    print(
      f'read, prefetch {prefetch}: {n / clock / 1e6:6.1f}M tokens/s by the clock, '
      f'{n / cpu / 1e6:6.1f}M a core; {STEP_TOKENS / (n / cpu):.2%} of a core at {STEP_TOKENS} tokens/s'
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--bytes', type=int, default=4_000_000, help='text per objective')
  parser.add_argument('--cache', default=None, help='default: $ISOFLOP_CACHE or ~/.cache/isoflop')
  parser.add_argument('--one', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  cache = pathlib.Path(flags.cache or data.default_cache()).expanduser()
  if flags.one:
    freeze_one(json.loads(flags.one), flags.bytes, cache)
    return
  read(cache)
  print(f'{"objective":16}{"vocabulary":15}{"length":>7}{"text tokens/s a core":>22}'
        f'{"by the clock":>14}{"tokenizing":>12}{"fill":>7}')  # fmt: skip
  for stream in streams():
    command = [sys.executable, __file__, f'--one={json.dumps(stream.spec())}']
    command += [f'--bytes={flags.bytes}', f'--cache={cache}']
    env = os.environ | {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''}
    out = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True).stdout
    got = json.loads(out.splitlines()[-1])
    print(
      f'{stream.name:16}{stream.vocabulary.name:15}{max(stream.lengths.values()):7d}'
      f'{got["tokens"] / got["cpu"]:22,.0f}{got["tokens"] / got["clock"]:14,.0f}'
      f'{got["tokenize"] / got["cpu"]:12.0%}{got["fill"]:7.1%}',
      flush=True,
    )


if __name__ == '__main__':
  main()
