"""Freezes streams on a Ray cluster whose hosts share the cache: pieces of the corpus, then shards, as tasks."""

import functools
import json
import pathlib
import time

from research.data import shards
from research.data.spec import from_spec
from research.parallel import ray_cluster, ray_tasks
from tasks import shuffle, store
from tasks.writers import writer


class Engine:
  """Makes the tasks of one freeze.

  Args:
    address: of the cluster, as `ray_cluster.connect` takes it.
    cache: a folder on a disk that all hosts share.
    log: called with lines of progress.

  Raises:
    UserError: the cluster cannot be joined, or, later, its hosts do not share the cache.
  """

  def __init__(self, address: str | None, cache: pathlib.Path, log):
    ray_cluster.connect(address, '--engine=ray')
    self.cache = cache
    self.log = log
    needs = ray_cluster.Needs(cpus=1)
    self.stages = ray_tasks.Tasks('tasks.shuffle', 'do', needs, [cache])
    self.shards = ray_tasks.Tasks('tasks.on_ray', 'write_shard', needs, [cache])

  def open_store(self, corpus) -> store.Store:
    """The store of a corpus; where it is missing, the hosts build it. Hold the cache's lock."""

    def build(corpus, folder, log):
      work = str(folder / 'tasks')

      def run(name: str, calls: dict) -> dict:
        tasks = {key: (name, work, key, *arguments) for key, arguments in calls.items()}
        values = self._do(self.stages, tasks, f'{corpus.name}, {name}')
        return {key: values[key] for key in calls}

      return shuffle.build(corpus, folder, run, log)

    # What a freeze that was stopped left is of use only to the same code.
    partial = f'.{ray_tasks.project_digest(str(ray_tasks.ROOT))}.tasks'
    return store.open_store(corpus, self.cache, self.log, build, resumes=partial)

  def write(self, stream, new) -> None:
    """Writes the missing shards of a stream, whose writer in this process is `new`."""
    spec = json.dumps(stream.spec())
    for number in range(stream.passes):
      while shards.facts_of(new.folder, number, stream.examples) is None:
        missing = [
          piece for piece in range(new.pieces) if not shards.is_written(new.folder, number, piece)
        ]
        if stream.examples is not None:  # how many pieces give them is known when they are written
          missing = missing[: max(1, self.shards.slots())]
        place = (spec, str(new.folder), str(self.cache))
        calls = {piece: (*place, number, piece) for piece in missing}
        self._do(self.shards, calls, f'{stream.name} {stream.split}')

  def _do(self, tasks: ray_tasks.Tasks, calls: dict, what: str) -> dict:
    done = 0
    nodes = set()
    last_logged = time.monotonic()

    def ended(outcome: ray_tasks.Outcome) -> None:
      nonlocal done, last_logged
      if outcome.lost:
        self.log(f'{what}: a task is done again ({outcome.lost})')
        return
      done += 1
      nodes.add(outcome.node)
      if time.monotonic() - last_logged > 2 or done == len(calls):
        last_logged = time.monotonic()
        self.log(f'{what}: {done} of {len(calls)} tasks, on {len(nodes)} nodes')

    return ray_tasks.do_all(tasks, calls, ended)


def write_shard(spec: str, folder: str, cache: str, number: int, piece: int) -> None:
  """Writes the shard of one pass over one piece, on whichever host this is."""
  _writer(spec, folder, cache).shard(number, piece)


@functools.lru_cache(maxsize=2)
def _writer(spec: str, folder: str, cache: str):
  stream = from_spec(json.loads(spec))
  return writer(stream, pathlib.Path(folder), pathlib.Path(cache), lambda line: None)
