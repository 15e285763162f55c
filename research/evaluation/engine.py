"""Answers requests with a model.

The shapes that answer a request follow from that request alone: the padded lengths of its context and of its
continuation, and a number of rows that is fixed. So few programs are compiled, and an answer does not depend on
the order or the company of its request. Another batch size can move a sum in its last digits, as any other
shape of a matrix product does.

A context with several continuations (a question with its choices) is read once: every continuation goes on from
what the model keeps of it. Text is generated in the slots of `inference.engine`.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from research.core.errors import Invalid, UserError
from research.data.encoding import Encoding
from research.evaluation import programs
from research.evaluation.collected import Collected, Keep, generation_of
from research.evaluation.requests import (
  Answer,
  Embed,
  Embedding,
  Failed,
  GenerateUntil,
  Request,
  RollingLogLikelihood,
)
from research.evaluation.rows import Row, Settings, batch_of, bucket, rows_of
from research.inference import decode
from research.inference import engine as slots
from research.inference import request as generation
from research.parallel.hosts import place
from research.parallel.mesh import Mesh

Progress = Callable[[int, int], None]
# The least padded length of a continuation: those of one token and of a few share one reading of their context.
SHORTEST_CONTINUATION = 8


@dataclasses.dataclass(frozen=True, order=True)
class Group:
  """Rows that share a program.

  Attributes:
    length: padded tokens of a row, or of its context.
    encoder: padded tokens of the encoder.
    kind: 'score' (a whole row), 'after' (a continuation), 'generate' or 'embed'.
    continuation: padded tokens after the context.
  """

  length: int
  encoder: int
  kind: str
  continuation: int = 0


class Engine:
  """A model that answers requests. Use it under the mesh on which its parameters lie.

  Args:
    graphdef, params: the model, as `nnx.merge` takes it.
    encoding: its tokenizer.
    settings: how requests become rows.
    batch_size: rows of a batch, over all devices; also the texts that are generated at a time.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    params: dict,
    encoding: Encoding,
    settings: Settings,
    batch_size: int = 16,
  ):
    if batch_size < 1:
      raise Invalid(Engine, 'batch_size', f'{batch_size!r} must be positive.')
    self.graphdef, self.params, self.encoding, self.settings = graphdef, params, encoding, settings
    self.batch_size = batch_size
    self.cannot_decode = self._why_not()

  def _why_not(self) -> str | None:
    """Why this model reads whole rows only; None where it decodes. Nothing is computed."""
    two_sided = self.settings.architecture == 'encoder_decoder'
    row = Row(0, (1,), encoder=(1,) if two_sided else ())
    batch = place(batch_of([row] * self.batch_size, 1, int(two_sided)))
    try:
      jax.eval_shape(
        lambda params: decode.prefill(nnx.merge(self.graphdef, params), batch, room=2), self.params
      )
    except UserError as error:
      return str(error)
    return None

  def answer(
    self,
    requests: Sequence[Request],
    progress: Progress = lambda done, of: None,
    keep: Keep = lambda number, answer: None,
  ) -> list[Answer]:
    """The answers, in the order of the requests.

    Args:
      progress: called with the rows that are done, and how many there are.
      keep: called with each answer as it comes, in any order.
    """
    work = Collected(requests, keep)
    groups: dict[Group, list[Row]] = collections.defaultdict(list)
    for number, request in enumerate(requests):
      rows = rows_of(number, request, self.encoding, self.settings)
      if isinstance(rows, Failed):
        work.finish(number, rows)
        continue
      work.expect(number, len(rows))
      for row in rows:
        groups[self._group(row, request)].append(row)
    total, done = sum(map(len, groups.values())), 0
    # The longest first, so that a batch that does not fit the memory fails at once.
    for group in sorted(groups, reverse=True):
      for count in self._do(group, groups[group], work):
        done += count
        progress(done, total)
    return work.answers

  def _group(self, row: Row, request: Request) -> Group:
    length = self.settings.length
    encoder = bucket(len(row.encoder), length) if row.encoder else 0
    match request:
      case GenerateUntil():
        return Group(bucket(len(row.inputs) + request.max_tokens, length), encoder, 'generate')
      case Embed():
        return Group(bucket(len(row.inputs), length), encoder, 'embed')
    whole = Group(bucket(len(row.inputs), length), encoder, 'score')
    if isinstance(request, RollingLogLikelihood) or self.cannot_decode:
      return whole
    context = len(row.inputs) - row.scored + 1
    after = bucket(max(row.scored - 1, 1), length, SHORTEST_CONTINUATION)
    # Padding behind the last learned position has no embedding, and a short context is not worth sharing.
    if context + after > length or len(row.encoder) + context < after:
      return whole
    return Group(bucket(context, length), encoder, 'after', after)

  def _do(self, group: Group, rows: list[Row], work: Collected) -> Iterator[int]:
    """Does the rows of a group; yields how many are done now."""
    if group.kind == 'after':
      yield from self._score_after(group, rows, work)
    elif group.kind == 'generate':
      yield from self._generate(group, rows, work)
    else:
      for part in _in_batches(rows, self.batch_size):
        batch = self._batch(part, group)
        if group.kind == 'score':
          self._score(part, batch, work)
        else:
          self._embed(part, batch, work)
        yield len(part)

  def _batch(self, rows: list[Row], group: Group, marked: bool = False) -> dict[str, jax.Array]:
    # A batch is filled up with copies of a row, which are never looked at.
    full = rows + rows[:1] * (self.batch_size - len(rows))
    prefix = self.settings.architecture == 'prefix'
    return place(batch_of(full, group.length, group.encoder, prefix, marked))

  def _score(self, rows: list[Row], batch: Mapping, work: Collected) -> None:
    nats, greedy = jax.device_get(programs.score(self.graphdef, self.params, batch))
    for i, row in enumerate(rows):
      scored = slice(len(row.targets) - row.scored, len(row.targets))
      work.add(row, nats[i, scored], greedy[i, scored])

  def _score_after(self, group: Group, rows: list[Row], work: Collected) -> Iterator[int]:
    by_context: dict[tuple, list[Row]] = collections.defaultdict(list)
    for row in rows:
      by_context[row.encoder, row.inputs[: len(row.inputs) - row.scored + 1]].append(row)
    for contexts in _in_batches(list(by_context), self.batch_size):
      heads = [
        Row(0, inputs, prefix=by_context[encoder, inputs][0].prefix, encoder=encoder)
        for encoder, inputs in contexts
      ]
      batch = self._batch(heads, group, marked=True)
      log_p, cache = programs.read(
        self.graphdef, self.params, batch,
        room=group.length + group.continuation, ahead=group.continuation,
      )  # fmt: skip
      log_p = jax.device_get(log_p)
      asked = [(i, row) for i, context in enumerate(contexts) for row in by_context[context]]
      for part in _in_batches(asked, self.batch_size):
        self._score_continuations(group, part, log_p, cache, work)
        yield len(part)

  def _score_continuations(self, group, asked: list[tuple[int, Row]], log_p, cache, work) -> None:
    """Scores at most a batch of continuations after their contexts."""
    full = asked + asked[:1] * (self.batch_size - len(asked))
    first = [row.targets[len(row.targets) - row.scored] for _, row in asked]
    nats = np.array([[-log_p[i, token]] for (i, _), token in zip(asked, first, strict=True)])
    greedy = np.array(
      [[np.argmax(log_p[i]) == token] for (i, _), token in zip(asked, first, strict=True)]
    )
    if any(row.scored > 1 for _, row in asked):
      tails = [
        Row(0, row.inputs[len(row.inputs) - row.scored + 1 :], row.targets[len(row.targets) - row.scored + 1 :])
        for _, row in full
      ]  # fmt: skip
      contexts = np.array([[i] for i, _ in full], np.int32)
      batch = place(batch_of(tails, group.continuation) | {'contexts': contexts})
      more = jax.device_get(programs.score_after(self.graphdef, self.params, cache, batch))
      nats, greedy = (
        np.concatenate([a, b[: len(asked)]], axis=1)
        for a, b in zip((nats, greedy), more, strict=True)
      )
    for i, (_, row) in enumerate(asked):
      work.add(row, nats[i, : row.scored], greedy[i, : row.scored])

  def _embed(self, rows: list[Row], batch: Mapping, work: Collected) -> None:
    x = jax.device_get(programs.features(self.graphdef, self.params, batch))
    for i, row in enumerate(rows):
      tokens = np.asarray(x[i, : len(row.inputs)], np.float64)
      mean = work.requests[row.request].pooling == 'mean'
      vector = (tokens.mean(0) if mean else tokens[-1]).astype(np.float32)
      finite = np.all(np.isfinite(vector))
      why = Failed('the features are not finite: the model gives no numbers here.')
      work.finish(row.request, Embedding(vector, row.cut) if finite else why)

  def _generate(self, group: Group, rows: list[Row], work: Collected) -> Iterator[int]:
    if self.cannot_decode:
      for row in rows:
        work.finish(row.request, Failed(self.cannot_decode))
      yield len(rows)
      return
    with self._on_first_device() as params:
      yield from self._generate_in_slots(params, group, rows, work)

  @contextlib.contextmanager
  def _on_first_device(self):
    """The parameters under a mesh of one device: a prompt is read alone, and one row is not divided."""
    mesh = jax.sharding.get_mesh()
    if mesh.size == 1:
      yield self.params
      return
    with Mesh(data=1).use(list(mesh.devices.flat[:1])):
      here = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
      yield jax.device_put(jax.device_get(self.params), here)

  def _generate_in_slots(
    self, params: dict, group: Group, rows: list[Row], work: Collected
  ) -> Iterator[int]:
    engine = slots.Engine(
      self.graphdef, params, decode=self.encoding.decode, slots=self.batch_size,
      room=group.length, encoder_room=group.encoder, prefix=self.settings.architecture == 'prefix',
    )  # fmt: skip
    at_work = {}
    for row in rows:
      request = work.requests[row.request]
      at_work[engine.submit(self._to_generate(row, request))] = row
    while engine.busy:
      ended = [event for event in engine.step() if event.completion.finish]
      for event in ended:
        row = at_work[event.number]
        work.finish(row.request, generation_of(event.completion, row))
      yield len(ended)

  def _to_generate(self, row: Row, request: GenerateUntil) -> generation.Request:
    ends = [self.encoding.end, *getattr(self.encoding, 'ends', ())]
    # A stop may be a special token, which is no part of any text.
    for stop in request.until:
      ids = self.encoding.encode(stop)
      if len(ids) == 1 and not self.encoding.decode(ids):
        ends += ids
    return generation.Request(
      prompt=row.inputs, encoder=row.encoder, max_tokens=request.max_tokens,
      sampling=request.sampling, stop_tokens=tuple(ends), stop=request.until,
    )  # fmt: skip


def _in_batches(rows: list, size: int) -> Iterator[list]:
  for first in range(0, len(rows), size):
    yield rows[first : first + size]
