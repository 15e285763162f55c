"""Freeze data streams: seqio task -> fixed-shape examples on disk, which training reads as memory.

A run does this by itself, in a process of its own, for a stream that is not there yet. By hand:

    python -m research.freeze --gin_file=gin/runs/tiny.gin            # every stream of the run
    python -m research.freeze --gin_file=gin/runs/tiny.gin --show=2   # and print what a model sees
    python -m research.freeze --gin_file=gin/objectives/ul2.gin --gin.Stream.examples=100 --show

Each shard is made from one piece of the corpus and written whole or not at all: a freeze that was killed
goes on with the next shard and ends with the same bytes.
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
  except OSError as e:
    raise UserError(f'cannot write {e.filename or cache}: {e.strerror or e}') from e
  if not flags.spec:
    for stream in streams:
      report(batches.Frozen(cache / 'streams' / stream.key(), stream), cache, flags.show)
  return 0


def engine_of(flags, cache: pathlib.Path):
  """What --engine names; None for processes of this machine.

  Raises:
    UserError: the flags do not go together, or the cluster cannot be joined.
  """
  if flags.engine == 'local':
    if flags.address:
      raise UserError(f'--address={flags.address} goes with --engine=ray.')
    return None
  if flags.workers > 1:
    raise UserError(
      f'--workers={flags.workers} is of --engine=local; Ray starts a task on every CPU it has.'
    )
  from tasks.on_ray import Engine

  return Engine(flags.address, cache, say)


def configured(files: list[str], bindings: list[str]) -> list[Stream]:
  """Every stream in what gin files describe, each once."""
  from research.core import configs

  found = {}
  config = configs.load(files, bindings)
  if not config.macros.keys() & set(ROOTS) and any(t is Stream for _, t, _ in config.bindings):
    config.read_binding('STREAM=@Stream()')  # the file of an objective, by itself
  config.root = next((r for r in ROOTS if r in config.macros), 'RUN')
  for stream in streams_in(config.tree()):
    found[json.dumps(stream.spec())] = stream
  if not found:
    raise UserError(f'{files[-1]} sets no stream (@streams.Stream()).')
  return list(found.values())


def streams_in(tree):
  """The streams in a tree of partials, containers and dataclasses."""
  if isinstance(tree, Stream):
    yield tree.unscored  # a model's scores are frozen by the run that reads them
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
  """Prints what a stream holds, and `show` of its examples."""
  stream, n = frozen.stream, len(frozen)
  print(f'{stream.name} {stream.split}: {n} examples in {frozen.folder}')
  if corpus := frozen.manifest['corpus']:
    dropped = left_out(corpus['dropped'])
    print(
      f'  {corpus["corpus"]}: {corpus["documents"]} documents, {corpus["bytes"]:,} bytes'
      + (f' (left out of the files: {dropped})' if dropped else '')
    )
  counts = collections.Counter()
  for facts in frozen.manifest['shards'][0]:
    counts.update(facts.get('left_out', {}))
  if counts:
    print(f'  left out of the rows, or shortened: {left_out(counts)}')
  for length in sorted({shape[0] for shape, _ in frozen.features.values()}):
    names = (k for k, (shape, _) in frozen.features.items() if shape[0] == length)
    print(f'  of length {length}: {", ".join(names)}')
  print(
    f'  {frozen.fill:.1%} of target positions carry loss, '
    f'and each of these stands for {frozen.bytes_per_token:.3f} bytes of text'
  )
  if show:
    from tasks import show as shown

    vocabulary = writer(stream, frozen.folder, cache, say).vocabulary
    print(shown.render(frozen.examples(range(min(show, n))), vocabulary, stream))


if __name__ == '__main__':
  cli.run(main)
