"""Continuous batching: requests enter and leave the slots of one cache, and no shape ever changes.

A prompt is read alone or in a group of a fixed size, padded to one of a few lengths; a long prompt in chunks.
Its row of the cache then goes to a free slot, and every step generates a token for all active slots. So few
programs are compiled, and a request's answer does not depend on the other requests (JetStream; Yu et al. 2022,
"Orca").

    engine = Engine(graphdef, params, slots=8, room=512)
    for completion in engine.run(requests):
      ...
"""

import collections
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid
from research.inference import decode as decoding
from research.inference import programs, sampling
from research.inference.answering import Answering, Event
from research.inference.graph import graph_of
from research.inference.padding import for_mesh, padded_length, padded_rows
from research.inference.programs import Plan, Slots
from research.inference.prompts import PromptReader, Reading, Result
from research.inference.request import Completion, Request
from research.inference.request_check import check_model, check_request
from research.inference.sampling import Sampling
from research.inference.text import TextStream
from research.inference.work import Work
from research.parallel.axes import axis_size


class Engine(Answering):
  """Answers requests with a model. Use it under the mesh of the parameters.

  Args:
    graphdef: the structure of the model.
    params: its parameters.
    decode: maps token ids to text; None to answer with ids alone.
    slots: how many requests are active at once.
    room: the most tokens of a request, its prompt included.
    chunk: the most tokens of a prompt that are read at once.
    encoder_room: the most tokens that an encoder reads; 0 for a decoder.
    prefix: prompts see themselves both ways (prefix-LM); they are read in one piece.
    int8: stores keys and values in int8.
    pieces: the most chunks of prompts that a step reads while other requests are active, so that they do not
      wait for long prompts; None for all prompts that have a slot.
    kept: how many prompts stay in the cache, for later prompts that begin with them (`PromptReader`).
    together: how many prompts of at most `chunk` tokens are read at once. More than one is faster for many
      requests that are there from the start, and slower for a single one: a group always has so many rows, so
      that its company does not change an answer. Short prompts wait until so many slots are free.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    params: dict,
    *,
    decode: Callable[[list[int]], str] | None = None,
    slots: int = 8,
    room: int = 512,
    chunk: int = 256,
    encoder_room: int = 0,
    prefix: bool = False,
    int8: bool = False,
    pieces: int | None = None,
    kept: int = 0,
    together: int = 1,
  ):
    counts = {'slots': slots, 'room': room, 'chunk': chunk, 'pieces': pieces, 'together': together}
    for field, value in counts.items():
      if value is not None and value < 1:
        raise Invalid(Engine, field, f'{value!r} must be 1 or more.')
    split = axis_size('batch')
    if slots % split:
      why = f'{slots} must be a multiple of {split}, because the mesh splits the slots into so many parts.'
      raise Invalid(Engine, 'slots', why)
    if together > slots:
      raise Invalid(Engine, 'together', f'{together} must be at most the {slots} slots.')
    if together > 1 and together % split:
      why = f'{together} must be 1 or a multiple of {split}, because the mesh splits rows into so many parts.'
      raise Invalid(Engine, 'together', why)
    self._training_graph = graphdef
    self.decode = decode
    self.room = room
    self.prefix = prefix
    self.int8 = int8
    self.chunk = room if prefix else min(chunk, room)
    self.encoder_room = encoder_room
    self.pieces = pieces
    self.together = together
    # A prompt that sees itself both ways cannot continue the cache of a shorter one.
    self._reader = PromptReader(
      self._read, self._read_more, self.chunk, 0 if prefix else kept, together
    )
    self._reading: tuple[list[Work], Reading] | None = None
    self.load(params)
    model = jax.eval_shape(lambda params: nnx.merge(graphdef, params), params)
    self.vocab = model.vocab
    check_model(Engine, model, room, encoder_room)
    self._waiting: collections.deque[Work] = collections.deque()
    self._active: list[Work | None] = [None] * slots
    self._count = 0
    self._changed()
    self.slots = self._empty(slots)

  def load(self, params: dict) -> None:
    """Replaces the parameters, for all tokens from now on."""
    graphdef, self.params = decoding.for_backend(self._training_graph, params)
    self.graphdef = graph_of(graphdef)
    self._reader.forget()
    self._reading = None

  def _empty(self, slots: int) -> Slots:
    """Returns slots without requests. Their shapes are those of a short prompt's cache."""
    request = Request(prompt=(1,), encoder=(1,) if self.encoder_room else ())
    batch = self._batch([request.prompt], [request])
    knobs = {'room': self.room, 'ahead': self.chunk, 'int8': self.int8}
    read = functools.partial(programs.read, self.graphdef, batch=batch, **knobs)
    logits, cache = jax.eval_shape(read, self.params)

    def zeros(x):
      return jax.sharding.reshard(jnp.zeros((slots, *x.shape[1:]), x.dtype), x.sharding.spec)

    table = slots, self.vocab

    # Compiled, because otherwise one device would hold a whole cache before it is split.
    @jax.jit
    def make():
      return Slots(
        logits=jnp.zeros(table, logits.dtype),
        cache=jax.tree.map(zeros, cache),
        occurred=jnp.zeros(table, bool),
        generated=jnp.zeros(table, jnp.int32),
        number=jnp.zeros(slots, jnp.int32),
      )

    return make()

  def submit(self, request: Request) -> int:
    check_request(request, self.vocab, self.room, self.encoder_room, self.decode is not None)
    stream = None
    if self.decode is not None:
      prompt = () if self.encoder_room else request.prompt
      stream = TextStream(self.decode, prompt, request.stop)
    work = Work(self._count, request, Completion(), stream)
    self._waiting.append(work)
    self._count += 1
    return work.number

  @property
  def busy(self) -> bool:
    return bool(self._waiting) or any(self._active)

  def step(self) -> list[Event]:
    """Admits requests that wait, generates a token for each active one, and returns the results."""
    self._admit()
    if not any(self._active):
      return []
    chosen = programs.choose(self.slots, self._rows, self._adjustment(), plan=self._plan)
    active = np.array([work is not None for work in self._active])
    # The devices compute the next step while the host reads the tokens of this one.
    self.slots = programs.advance(
      self.graphdef,
      self.params,
      self.slots,
      chosen['tokens'],
      active,
      penalises=self._plan.penalises,
    )
    host = jax.device_get(chosen)
    events = []
    for slot, work in enumerate(self._active):
      if work is None:
        continue
      text = work.record({key: value[slot] for key, value in host.items()})
      events.append(Event(work.number, text, work.completion))
      if work.completion.finish:
        self._active[slot] = None
        self._changed()
    return events

  def cancel(self, number: int) -> None:
    """Drops a request that waits or is active."""
    self._waiting = collections.deque(work for work in self._waiting if work.number != number)
    if self._reading and any(work.number == number for work in self._reading[0]):
      self._reading = None
    for slot, work in enumerate(self._active):
      if work is not None and work.number == number:
        self._active[slot] = None
        self._changed()

  def _admit(self) -> None:
    """Reads waiting prompts into free slots; at most `pieces` pieces while other requests are active."""
    read = 0
    while self._waiting and self._active.count(None) >= self._slots_wanted():
      if self._reading is None:
        works = self._next_group()
        self._reading = works, self._reader.begin([work.request for work in works])
      works, reading = self._reading
      while not reading.done:
        if self.pieces is not None and any(self._active):
          if read == self.pieces:
            return
          read += 1
        reading.step()
      self._reading = None
      for work, result in zip(works, reading.results, strict=True):
        self._waiting.remove(work)
        self._put(work, self._active.index(None), result)

  def _slots_wanted(self) -> int:
    """Returns how many slots must be free before the next prompts are read."""
    in_group = self._reader.fits_a_group(self._waiting[0].request)
    return min(self.together, len(self._waiting)) if in_group else 1

  def _next_group(self) -> list[Work]:
    """Returns the requests that are read next: the first that waits, and those that can be read with it."""
    free = self._active.count(None)
    group = self._reader.group((work.request for work in self._waiting), free)
    return [self._waiting[place] for place in group]

  def _put(self, new: Work, slot: int, result: Result) -> None:
    """Puts a request whose prompt has been read into a slot."""
    self._reader.keep(new.request, result)
    tokens = np.full(padded_length(len(new.request.prompt), self.room), -1, np.int32)
    tokens[: len(new.request.prompt)] = new.request.prompt
    self.slots = programs.admit(self.slots, slot, *result, tokens)
    self._active[slot] = new
    self._changed()

  def _read(self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]) -> Result:
    return programs.read(
      self.graphdef, self.params, self._batch(prompts, requests),
      room=self.room, ahead=self.chunk, int8=self.int8,
    )  # fmt: skip

  def _read_more(self, tokens: np.ndarray, cache: decoding.Cache) -> Result:
    batch = for_mesh({'decoder_input_tokens': tokens})
    return programs.read_more(self.graphdef, self.params, batch['decoder_input_tokens'], cache)

  def _batch(
    self, prompts: Sequence[Sequence[int]], requests: Sequence[Request]
  ) -> dict[str, np.ndarray]:
    """Returns a batch of the beginnings of these requests' prompts."""
    length = padded_length(max(map(len, prompts)), self.chunk)
    batch = padded_rows('decoder', prompts, length)
    if self.prefix:
      batch['decoder_causal_attention'] = batch['decoder_segment_ids']
    if self.encoder_room:
      texts = [request.encoder for request in requests]
      batch |= padded_rows('encoder', texts, self.encoder_room)
    return for_mesh(batch)

  def _changed(self) -> None:
    """Updates the settings of the steps after the active requests have changed."""
    requests = [work.request if work else None for work in self._active]
    settings = [request.sampling if request else Sampling() for request in requests]
    active = [request for request in requests if request]
    self._rows = sampling.as_rows(settings)
    self._plan = Plan(
      draws=any(s.draws for s in settings),
      filters=any(s.filters for s in settings),
      penalises=any(s.penalises for s in settings),
      adjusts=any(r.sampling.logit_bias or r.mask for r in active),
      top=max((request.top for request in active), default=0),
    )

  def _adjustment(self) -> np.ndarray | None:
    """Returns what is added to the logits, [slots, vocab]: biases, and minus infinity for masked tokens."""
    if not self._plan.adjusts:
      return None
    adjustment = np.zeros((len(self._active), self.vocab), np.float32)
    for slot, work in enumerate(self._active):
      if work is None:
        continue
      for token, bias in work.request.sampling.logit_bias.items():
        adjustment[slot, token] += bias
      if work.request.mask is not None:
        allowed = np.asarray(work.request.mask(tuple(work.completion.tokens)))
        if allowed.dtype != bool or allowed.shape != (self.vocab,):
          why = f'it returned {allowed.dtype}{list(allowed.shape)}; return bool[{self.vocab}].'
          raise Invalid(Request, 'mask', why)
        adjustment[slot, ~allowed] = -np.inf
    return adjustment
