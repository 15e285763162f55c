"""Answers requests with a model: batches of rows through full forward passes, no cache.

The number of rows in a batch is fixed and the padded length of a row depends on that row alone, so only a few
programs are compiled, and an answer does not depend on the order or the company of its request. A batch size of
its own can move a sum in its last digits, as any other shape of a matrix product does.

Generation runs the whole sequence again for every token. That is right for every part that a model may have,
and slow: its cost grows with the square of the length.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid
from research.data.encoding import Encoding
from research.evaluation.requests import (
  Answer,
  Embed,
  Embedding,
  Failed,
  GenerateUntil,
  Generation,
  Likelihood,
  Request,
)
from research.evaluation.rows import Row, Settings, batch_of, bucket, rows_of
from research.parallel.hosts import place
from research.training.cross_entropy import default_chunks, token_losses

# One program for each model and shape, however many engines there are.
compiled_once = functools.partial(jax.jit, static_argnums=0)


class Engine:
  """A model that answers requests. Use it under the mesh on which its parameters lie.

  Args:
    graphdef, params: the model, as `nnx.merge` takes it.
    encoding: its tokenizer.
    settings: how requests become rows.
    batch_size: rows of a batch, over all devices.
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

  def answer(
    self, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda done, of: None
  ) -> list[Answer]:
    """The answers, in the order of the requests.

    Args:
      progress: called with the rows that are done, and how many there are.
    """
    answers: list[Answer | None] = [None] * len(requests)
    groups: dict[tuple, list[Row]] = collections.defaultdict(list)
    total = 0
    for number, request in enumerate(requests):
      rows = rows_of(number, request, self.encoding, self.settings)
      if isinstance(rows, Failed):
        answers[number] = rows
        continue
      total += len(rows)
      for row in rows:
        groups[self._group(row, request)].append(row)
    likelihoods: dict[int, list[tuple[Row, float, bool]]] = collections.defaultdict(list)
    done = 0
    # The longest first, so that a batch that does not fit the memory fails at once.
    for group in sorted(groups, key=lambda group: (group[1], group[2], str(group)), reverse=True):
      for rows in _in_batches(groups[group], self.batch_size):
        self._do(group, rows, requests, likelihoods, answers)
        done += len(rows)
        progress(done, total)
    for number, parts in likelihoods.items():
      answers[number] = _joined(parts)
    return answers

  def _group(self, row: Row, request: Request) -> tuple:
    """(kind, padded length, the encoder's, tokens to generate, pooling): rows that share one program."""
    encoder = bucket(len(row.encoder), self.settings.length) if row.encoder else 0
    match request:
      case GenerateUntil():
        longest = len(row.inputs) + request.max_tokens
        return 'generate', bucket(longest, self.settings.length), encoder, request.max_tokens, ''
      case Embed():
        return 'embed', bucket(len(row.inputs), self.settings.length), encoder, 0, request.pooling
    return 'score', bucket(len(row.inputs), self.settings.length), encoder, 0, ''

  def _do(self, group, rows: list[Row], requests, likelihoods, answers) -> None:
    kind, length, encoder_length, max_tokens, pooling = group
    # The last batch of a group is filled up with copies of a row, which are never looked at.
    full = rows + rows[:1] * (self.batch_size - len(rows))
    batch = batch_of(full, length, encoder_length, self.settings.architecture == 'prefix')
    if kind == 'score':
      nll, greedy = jax.device_get(score(self.graphdef, self.params, place(batch)))
      for i, row in enumerate(rows):
        scored = slice(len(row.targets) - row.scored, len(row.targets))
        nats = -float(np.sum(nll[i, scored], dtype=np.float64))
        likelihoods[row.request].append((row, nats, bool(np.all(greedy[i, scored]))))
    elif kind == 'embed':
      x = np.asarray(jax.device_get(features(self.graphdef, self.params, place(batch))), np.float32)
      for i, row in enumerate(rows):
        tokens = x[i, : len(row.inputs)]
        vector = tokens.mean(0, dtype=np.float64) if pooling == 'mean' else tokens[-1]
        answers[row.request] = Embedding(vector.astype(np.float32), row.cut)
    else:
      until = [requests[row.request].until for row in rows]
      for row, generation in zip(rows, self._generate(rows, batch, until, max_tokens), strict=True):
        answers[row.request] = generation

  def _generate(self, rows, batch, until, max_tokens: int) -> list[Generation]:
    """Greedy generation of a batch, a token at a time, until every row has stopped."""
    places = np.array([len(row.inputs) for row in rows])
    texts: list[Generation | None] = [None] * len(rows)
    generated: list[list[int]] = [[] for _ in rows]
    for _ in range(max_tokens):
      tokens = jax.device_get(next_tokens(self.graphdef, self.params, place(batch)))
      for i, row in enumerate(rows):
        if texts[i] is not None:
          continue
        token = int(tokens[i, places[i] - 1])
        generated[i].append(token)
        text = self.encoding.decode(generated[i])
        stops = [text.index(stop) for stop in until[i] if stop in text]
        if stops or token == self.encoding.end:
          text = text[: min(stops)] if stops else text
          texts[i] = Generation(text, len(generated[i]), True, row.cut)
        elif len(generated[i]) < max_tokens:
          batch['decoder_input_tokens'][i, places[i]] = token
          places[i] += 1
      if all(text is not None for text in texts):
        break
    return [
      text or Generation(self.encoding.decode(tokens), len(tokens), False, row.cut)
      for text, tokens, row in zip(texts, generated, rows, strict=True)
    ]


@compiled_once
def score(graphdef: nnx.GraphDef, params: dict, batch: dict) -> tuple[jax.Array, jax.Array]:
  """(nats of every target, whether it is the likeliest token), both [batch, length].

  Logits exist for a part of the length at a time, as in training.
  """
  model = nnx.merge(graphdef, params)
  x, _ = model.features(batch)
  readout, targets = model.readout(), batch['decoder_target_tokens']
  parts = default_chunks(*targets.shape, model.vocab)
  nll, greedy = [], []
  for x_part, target in zip(
    jnp.split(x, parts, axis=1), jnp.split(targets, parts, axis=1), strict=True
  ):
    logits = readout(x_part)
    nll.append(token_losses(logits, target, 0.0)[0])
    greedy.append(jnp.argmax(logits, axis=-1) == target)
  return jnp.concatenate(nll, axis=1), jnp.concatenate(greedy, axis=1)


@compiled_once
def next_tokens(graphdef: nnx.GraphDef, params: dict, batch: dict) -> jax.Array:
  """The likeliest token after each, [batch, length]; of equal ones the first."""
  model = nnx.merge(graphdef, params)
  x, _ = model.features(batch)
  readout = model.readout()
  parts = default_chunks(*x.shape[:2], model.vocab)
  tokens = [jnp.argmax(readout(part), axis=-1) for part in jnp.split(x, parts, axis=1)]
  return jnp.concatenate(tokens, axis=1)


@compiled_once
def features(graphdef: nnx.GraphDef, params: dict, batch: dict) -> jax.Array:
  """The last features [batch, length, embed] before the head."""
  return nnx.merge(graphdef, params).features(batch)[0]


def _in_batches(rows: list[Row], size: int) -> Iterator[list[Row]]:
  for first in range(0, len(rows), size):
    yield rows[first : first + size]


def _joined(parts: list[tuple[Row, float, bool]]) -> Likelihood | Failed:
  """One answer of all the rows of a request."""
  nats = sum(nats for _, nats, _ in parts)
  if not np.isfinite(nats):
    return Failed(f'the log-likelihood is {nats}: the model gives no numbers here.')
  return Likelihood(
    nats,
    sum(row.scored for row, _, _ in parts),
    all(greedy for _, _, greedy in parts),
    max(row.cut for row, _, _ in parts),
  )


def as_plain(answer: Answer) -> dict:
  """An answer as JSON values, for logs."""
  fields = dataclasses.asdict(answer)
  if isinstance(answer, Embedding):
    fields['vector'] = answer.vector.tolist()
  return {'kind': type(answer).__name__, **fields}
