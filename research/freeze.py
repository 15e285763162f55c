"""Freezes data streams: a seqio task becomes fixed-shape examples on disk, which training maps into memory.

A run freezes its streams by itself, in another process. By hand:

    python -m research.freeze --gin_file=gin/runs/tiny.gin            # every stream of the run
    python -m research.freeze --gin_file=gin/runs/tiny.gin --show=2   # and print what a model sees
    python -m research.freeze --gin_file=gin/objectives/ul2.gin --gin.Stream.examples=100 --show

Each shard comes from one piece of the corpus, and is written whole or not at all. So a freeze that was killed
goes on with the next shard, and ends with the same bytes.
"""

import collections
import functools
import json
import pathlib

from research.core import cli
from research.core.errors import UserError
from research.data.mixtures import Mixture
from research.data.spec import from_spec
from research.data.streams import Stream
from tasks.freezing import freeze, say
from tasks.writers import left_out, writer

ROOTS = ('RUN', 'SWEEP', 'STREAM')


def main(argv=None) -> int:
  parser = cli.parser('freeze', __doc__, gin=False)
  parser.add_argument(
    '--gin_file', action='append', metavar='FILE', help='a run, a sweep or an objective'
  )
  parser.add_argument('--show', nargs='?', type=int, const=2, default=0, metavar='N',
                      help='print N examples of each stream, decoded')  # fmt: skip
  parser.add_argument('--cache', metavar='DIR', help='default: $ISOFLOP_CACHE or ~/.cache/isoflop')
  parser.add_argument('--workers', type=int, default=1, help='processes that write shards')
  parser.add_argument('--engine', choices=('local', 'ray'), default='local',
                      help='ray: tasks on a cluster whose hosts share the cache')  # fmt: skip
  parser.add_argument('--address', metavar='HOST:PORT', help="of the Ray cluster's head")
  parser.add_argument('--spec', help='streams as JSON, instead of a gin file')
  flags = cli.parse(parser, argv)
  if flags.spec:
    streams = [from_spec(s) for s in json.loads(flags.spec)]
  elif flags.gin_file:
    streams = configured(flags.gin_file, flags.gin)
  else:
    raise UserError('name a run, a sweep or an objective with --gin_file=FILE.')
  from research.data import batches
  from research.data.cache import default_cache, local_cache

  cache = local_cache(flags.cache) if flags.cache else default_cache()
  try:
    freeze(streams, cache, workers=flags.workers, engine=engine_of(flags, cache))
  except OSError as error:
    why = error.strerror or error
    raise UserError(f'cannot write {error.filename or cache}: {why}') from error
  if not flags.spec:
    for stream in streams:
      report(batches.Frozen(cache / 'streams' / stream.key(), stream), cache, flags.show)
  return 0


def engine_of(flags, cache: pathlib.Path):
  """The engine that --engine names; None for processes of this machine.

  Raises:
    UserError: the flags do not go together, or the cluster cannot be joined.
  """
  if flags.engine == 'local':
    if flags.address:
      raise UserError(f'--address={flags.address} goes with --engine=ray.')
    return None
  if flags.workers > 1:
    raise UserError(
      f'--workers={flags.workers} goes with --engine=local; Ray starts a task on every CPU it has.'
    )
  from tasks.on_ray import Engine

  return Engine(flags.address, cache, say)


def configured(files: list[str], bindings: list[str]) -> list[Stream]:
  """Every stream of a run, a sweep or an objective, each once.

  Raises:
    UserError: the gin files set no stream.
  """
  from research.core import configs

  config = configs.load(files, bindings)
  has_root = any(root in config.macros for root in ROOTS)
  # The file of an objective binds a stream's fields, and no root.
  if not has_root and any(target is Stream for _, target, _ in config.bindings):
    config.read_binding('STREAM=@Stream()')
  config.root = next((root for root in ROOTS if root in config.macros), 'RUN')
  streams = {json.dumps(stream.spec()): stream for stream in streams_in(config.tree())}
  if not streams:
    raise UserError(f'{files[-1]} sets no stream (@streams.Stream()).')
  return list(streams.values())


def streams_in(tree):
  """The streams in a tree of partials, containers and dataclasses."""
  if isinstance(tree, Stream):
    yield tree.unscored  # the run that reads a model's scores freezes them
  elif isinstance(tree, Mixture):
    yield from streams_in(list(tree.streams.values()))
  elif isinstance(tree, functools.partial):
    yield from streams_in([*tree.args, *tree.keywords.values()])
  elif isinstance(tree, dict):
    yield from streams_in(list(tree.values()))
  elif isinstance(tree, list | tuple):
    for part in tree:
      yield from streams_in(part)
  elif hasattr(tree, '__dataclass_fields__') and not isinstance(tree, type):
    yield from streams_in(list(vars(tree).values()))


def report(frozen, cache: pathlib.Path, show: int):
  """Prints the size and shape of a frozen stream, and its first `show` examples."""
  stream = frozen.stream
  print(f'{stream.name} {stream.split}: {len(frozen)} examples in {frozen.folder}')
  if corpus := frozen.manifest['corpus']:
    dropped = left_out(corpus['dropped'])
    note = f' (left out of the files: {dropped})' if dropped else ''
    documents = f'{corpus["documents"]} documents, {corpus["bytes"]:,} bytes'
    print(f'  {corpus["corpus"]}: {documents}{note}')
  counts = collections.Counter()
  for shard in frozen.manifest['shards'][0]:
    counts.update(shard.get('left_out', {}))
  if counts:
    print(f'  left out of the rows, or shortened: {left_out(counts)}')
  for length in sorted({shape[0] for shape, _ in frozen.features.values()}):
    names = [name for name, (shape, _) in frozen.features.items() if shape[0] == length]
    print(f'  of length {length}: {", ".join(names)}')
  print(
    f'  {frozen.fill:.1%} of target positions carry loss, '
    f'and each of these stands for {frozen.bytes_per_token:.3f} bytes of text'
  )
  if show:
    from tasks.show import render

    vocabulary = writer(stream, frozen.folder, cache, say).vocabulary
    examples = frozen.examples(range(min(show, len(frozen))))
    print(render(examples, vocabulary, stream))


if __name__ == '__main__':
  cli.run(main)
