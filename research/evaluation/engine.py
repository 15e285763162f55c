"""Answers requests with a model.

The shapes that answer a request follow from that request alone: the padded lengths of its context and of its
continuation, and a fixed number of rows. So few programs are compiled, and an answer does not depend on the
order of the requests or on what else is asked. Another batch size changes the shapes, and so the last digits.

A context with several continuations (a question with its choices) is read once: every continuation goes on from
its cache. Text is generated in the slots of `inference.engine`.
"""

import collections
import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx

from research.core.errors import Invalid, UserError
from research.data.encoding import Encoding
from research.evaluation import programs
from research.evaluation.batches import batch_of
from research.evaluation.callbacks import Keep, Progress, keep_nothing, no_progress
from research.evaluation.collected import Collected, to_generation
from research.evaluation.requests import (
  Answer,
  Embed,
  Embedding,
  Failed,
  GenerateUntil,
  Request,
)
from research.evaluation.rows import Row, Settings, rows_of
from research.inference import decode
from research.inference import engine as slots
from research.inference import request as generation
from research.inference.padding import padded_length
from research.parallel.hosts import place
from research.parallel.mesh import Mesh

# The least padded lengths. A continuation of one token and one of a few share a reading of their context.
SHORTEST_ROW = 16
SHORTEST_CONTINUATION = 8


@dataclasses.dataclass(frozen=True, order=True)
class Group:
  """The shape of the rows that share a program.

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
    batch_size: rows of a batch, over all devices; also the number of texts that are generated at a time.

  Attributes:
    cannot_decode: why the model cannot decode, so that it reads whole rows only; None where it can.
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
    self.graphdef = graphdef
    self.params = params
    self.encoding = encoding
    self.settings = settings
    self.batch_size = batch_size
    self.cannot_decode = self._why_it_cannot_decode()

  def _why_it_cannot_decode(self) -> str | None:
    """The refusal of a part without a decoding state; nothing is computed, only shapes."""
    has_encoder = self.settings.architecture == 'encoder_decoder'
    row = Row(0, (1,), encoder=(1,) if has_encoder else ())
    batch = place(batch_of([row] * self.batch_size, 1, int(has_encoder)))

    def prefill(params):
      return decode.prefill(nnx.merge(self.graphdef, params), batch, room=2)

    try:
      jax.eval_shape(prefill, self.params)
    except UserError as error:
      return str(error)
    return None

  def answer(
    self,
    requests: Sequence[Request],
    progress: Progress = no_progress,
    keep: Keep = keep_nothing,
  ) -> list[Answer]:
    """The answers, in the order of the requests.

    Args:
      keep: called with each answer as it comes, in any order.
    """
    collected = Collected(requests, keep)
    groups: dict[Group, list[Row]] = collections.defaultdict(list)
    for number, request in enumerate(requests):
      rows = rows_of(number, request, self.encoding, self.settings)
      if isinstance(rows, Failed):
        collected.finish(number, rows)
        continue
      collected.expect(number, len(rows))
      for row in rows:
        groups[self._group_of(row, request)].append(row)
    total = sum(map(len, groups.values()))
    done = 0
    # The longest first, so that a batch that does not fit the memory fails at once.
    for group in sorted(groups, reverse=True):
      for count in self._answer_group(group, groups[group], collected):
        done += count
        progress(done, total)
    return collected.answers

  def _group_of(self, row: Row, request: Request) -> Group:
    most = self.settings.length
    encoder = padded_length(len(row.encoder), most, SHORTEST_ROW) if row.encoder else 0
    generated = request.max_tokens if isinstance(request, GenerateUntil) else 0
    length = padded_length(len(row.inputs) + generated, most, SHORTEST_ROW)
    if isinstance(request, GenerateUntil):
      return Group(length, encoder, 'generate')
    if isinstance(request, Embed):
      return Group(length, encoder, 'embed')
    whole = Group(length, encoder, 'score')
    if request.alone or self.cannot_decode:
      return whole
    continuation = padded_length(row.scored - 1, most, SHORTEST_CONTINUATION)
    # Padding behind the last learned position has no embedding, and a short context is not worth sharing.
    if row.context + continuation > most or len(row.encoder) + row.context < continuation:
      return whole
    context = padded_length(row.context, most, SHORTEST_ROW)
    return Group(context, encoder, 'after', continuation)

  def _answer_group(self, group: Group, rows: list[Row], collected: Collected) -> Iterator[int]:
    """Answers the rows of a group; yields the number of rows of each batch that is done."""
    if group.kind == 'after':
      yield from self._score_after_contexts(group, rows, collected)
      return
    if group.kind == 'generate':
      yield from self._generate(group, rows, collected)
      return
    for part in _in_batches(rows, self.batch_size):
      batch = self._batch(part, group)
      if group.kind == 'score':
        self._score(part, batch, collected)
      else:
        self._embed(part, batch, collected)
      yield len(part)

  def _batch(self, rows: list[Row], group: Group, marked: bool = False) -> dict[str, jax.Array]:
    # A batch is filled up with copies of its first row, whose results are never read.
    full = rows + rows[:1] * (self.batch_size - len(rows))
    prefix = self.settings.architecture == 'prefix'
    return place(batch_of(full, group.length, group.encoder, prefix, marked))

  def _score(self, rows: list[Row], batch: Mapping, collected: Collected) -> None:
    nats, greedy = jax.device_get(programs.score(self.graphdef, self.params, batch))
    for i, row in enumerate(rows):
      scored = slice(len(row.targets) - row.scored, len(row.targets))
      collected.add(row, nats[i, scored], greedy[i, scored])

  def _score_after_contexts(
    self, group: Group, rows: list[Row], collected: Collected
  ) -> Iterator[int]:
    """Reads each context once, then scores all continuations after the contexts of a batch."""
    by_context: dict[tuple, list[Row]] = collections.defaultdict(list)
    for row in rows:
      by_context[row.encoder, row.inputs[: row.context]].append(row)
    for contexts in _in_batches(list(by_context), self.batch_size):
      context_rows = [
        Row(0, inputs, prefix=by_context[encoder, inputs][0].prefix, encoder=encoder)
        for encoder, inputs in contexts
      ]
      batch = self._batch(context_rows, group, marked=True)
      log_p, cache = programs.read(
        self.graphdef, self.params, batch,
        room=group.length + group.continuation, ahead=group.continuation,
      )  # fmt: skip
      log_p = jax.device_get(log_p)
      pairs = [(i, row) for i, context in enumerate(contexts) for row in by_context[context]]
      for part in _in_batches(pairs, self.batch_size):
        self._score_continuations(group, part, log_p, cache, collected)
        yield len(part)

  def _score_continuations(
    self, group: Group, pairs: list[tuple[int, Row]], log_p: np.ndarray, cache, collected: Collected
  ) -> None:
    """Scores at most a batch of continuations after their contexts.

    Args:
      pairs: (the number of its context, row) of each.
      log_p: [contexts, vocab] of the token after each context. It scores the first token of a continuation; the
        model reads the others.
    """
    first = [row.targets[row.context - 1] for _, row in pairs]
    nats = np.array([[-log_p[i, token]] for (i, _), token in zip(pairs, first, strict=True)])
    likeliest = [np.argmax(log_p[i]) for i, _ in pairs]
    greedy = np.array([[a == b] for a, b in zip(likeliest, first, strict=True)])
    if any(row.scored > 1 for _, row in pairs):
      full = pairs + pairs[:1] * (self.batch_size - len(pairs))
      tails = [Row(0, row.inputs[row.context :], row.targets[row.context :]) for _, row in full]
      contexts = np.array([[i] for i, _ in full], np.int32)
      batch = place(batch_of(tails, group.continuation) | {'contexts': contexts})
      scores = programs.score_after(self.graphdef, self.params, cache, batch)
      tail_nats, tail_greedy = jax.device_get(scores)
      nats = np.concatenate([nats, tail_nats[: len(pairs)]], axis=1)
      greedy = np.concatenate([greedy, tail_greedy[: len(pairs)]], axis=1)
    for i, (_, row) in enumerate(pairs):
      collected.add(row, nats[i, : row.scored], greedy[i, : row.scored])

  def _embed(self, rows: list[Row], batch: Mapping, collected: Collected) -> None:
    features = jax.device_get(programs.features(self.graphdef, self.params, batch))
    for i, row in enumerate(rows):
      tokens = np.asarray(features[i, : len(row.inputs)], np.float64)
      pooling = collected.requests[row.request].pooling
      vector = (tokens.mean(0) if pooling == 'mean' else tokens[-1]).astype(np.float32)
      answer = Embedding(vector, row.cut)
      if not np.all(np.isfinite(vector)):
        answer = Failed('the features are not finite: the model gives no numbers here.')
      collected.finish(row.request, answer)

  def _generate(self, group: Group, rows: list[Row], collected: Collected) -> Iterator[int]:
    if self.cannot_decode:
      for row in rows:
        collected.finish(row.request, Failed(self.cannot_decode))
      yield len(rows)
      return
    with self._on_first_device() as params:
      yield from self._generate_in_slots(params, group, rows, collected)

  @contextlib.contextmanager
  def _on_first_device(self) -> Iterator[dict]:
    """The parameters under a mesh of one device: a prompt is one row, which is not divided."""
    mesh = jax.sharding.get_mesh()
    if mesh.size == 1:
      yield self.params
      return
    with Mesh(data=1).use(list(mesh.devices.flat[:1])):
      sharding = jax.NamedSharding(jax.sharding.get_mesh(), jax.P())
      yield jax.device_put(jax.device_get(self.params), sharding)

  def _generate_in_slots(
    self, params: dict, group: Group, rows: list[Row], collected: Collected
  ) -> Iterator[int]:
    engine = slots.Engine(
      self.graphdef, params, decode=self.encoding.decode, slots=self.batch_size,
      room=group.length, encoder_room=group.encoder, prefix=self.settings.architecture == 'prefix',
      together=max(1, self.batch_size // 4),  # larger groups would leave more slots without work
    )  # fmt: skip
    row_by_number = {}
    for row in rows:
      request = self._generation_request(row, collected.requests[row.request])
      row_by_number[engine.submit(request)] = row
    while engine.busy:
      finished = [event for event in engine.step() if event.completion.finish]
      for event in finished:
        row = row_by_number[event.number]
        collected.finish(row.request, to_generation(event.completion, row))
      yield len(finished)

  def _generation_request(self, row: Row, request: GenerateUntil) -> generation.Request:
    stop_tokens = [self.encoding.end, *getattr(self.encoding, 'ends', ())]
    # A stop may be a special token, which decodes to no text: a stop of characters would never match.
    for stop in request.until:
      ids = self.encoding.encode(stop)
      if len(ids) == 1 and not self.encoding.decode(ids):
        stop_tokens += ids
    return generation.Request(
      prompt=row.inputs, encoder=row.encoder, max_tokens=request.max_tokens,
      sampling=request.sampling, stop_tokens=tuple(stop_tokens), stop=request.until,
    )  # fmt: skip


def _in_batches(rows: list, size: int) -> Iterator[list]:
  for first in range(0, len(rows), size):
    yield rows[first : first + size]
