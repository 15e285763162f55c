"""Whole models: from a batch to logits.

A model has `features(batch) -> (x [batch, length, embed], penalties)` and `logits(x)`. They are separate, so
that a loss need not have the logits of a whole batch in memory. Batches have seqio's keys.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.data.batches import ROW_SEEDS
from research.model.parameters import check_sizes, size
from research.model.part import Context, Cost, DecodingState, Factory, cost_of
from research.model.weights import used_by_default
from research.parallel.axes import spec


def _embed(model, batch: dict, name: str, positions: jax.Array) -> jax.Array:
  """The vectors of the 'encoder' or 'decoder' tokens of a batch, in training with the embedder's noise."""
  tokens = batch[f'{name}_input_tokens']
  if ROW_SEEDS not in batch:
    return model.embedder(tokens, positions, model.dtype)
  # The two sides of a pair have noise of their own.
  seeds = batch[ROW_SEEDS] ^ np.uint32(name == 'encoder')
  segments = batch.get(f'{name}_segment_ids')
  return model.embedder(tokens, positions, model.dtype, seeds, segments)


def _turns(batch: dict) -> jax.Array | None:
  """`Context.turns` of a batch. Both seeds of a row are even (training/row_seeds.py)."""
  return jnp.sum(batch[ROW_SEEDS] // 2, axis=1, dtype=jnp.uint32) if ROW_SEEDS in batch else None


def _positions(batch: dict, name: str) -> jax.Array:
  """Returns the positions [batch, length] of a batch; unpacked rows have none and count from 0."""
  if f'{name}_positions' in batch:
    return batch[f'{name}_positions']
  shape = batch[f'{name}_input_tokens'].shape
  positions = np.arange(shape[1], dtype=np.int32)
  return jnp.broadcast_to(positions, shape, out_sharding=spec('batch', None))


class LanguageModel(nnx.Module):
  """A model of one stack: GPT, LLaMA and Mamba if `causal`, BERT if not, GLM by the batch's prefix.

  Args:
    vocab: number of logits; at least the vocabulary of the data.
    embed: width of the residual stream.
    embedder: makes the first layer, such as `embedder.Embedder`.
    stack: makes the layers, such as `stack.Stack`.
    head: makes the last layer, such as `heads.TiedHead`.
    value: makes a second head, `heads.ScalarHead`: the value function of reinforcement learning. None for none.
    causal: a token sees no later one.
    weight: makes every matrix of the model (see `weights`); None makes plain parameters.
    dtype: the dtype of activations and so of the computation. Parameters, logits and loss are float32.
  """

  inputs = ('decoder',)

  def __init__(
    self,
    *,
    vocab: int,
    embed: int,
    embedder: Factory,
    stack: Factory,
    head: Factory,
    value: Factory | None = None,
    causal: bool = True,
    weight: Factory | None = None,
    dtype='float32',
    rngs: nnx.Rngs,
  ):
    check_sizes(LanguageModel, vocab=vocab, embed=embed)
    self.vocab = vocab
    self.causal = causal
    self.dtype = jnp.dtype(dtype)
    with used_by_default(weight):
      self.embedder = embedder(embed, vocab, rngs=rngs)
      self.stack = stack(embed, rngs=rngs)
      self.head = head(embed, vocab, rngs=rngs)
      self.value = value(embed, vocab, rngs=rngs) if value else None

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The cost of a sequence. Without a causal mask `visible` equals `full`."""
    stack = cost_of(self.stack, length, encoder_length)
    if not self.causal:
      stack = dataclasses.replace(stack, visible=stack.full)
    ends = (self.embedder, self.head, self.value) if self.value else (self.embedder, self.head)
    return _with_ends(stack, ends, length, encoder_length)

  def features(self, batch: dict[str, jax.Array], state: DecodingState | None = None):
    """Returns features [batch, length, embed], and penalties by name.

    Args:
      batch: arrays [batch, length] by seqio's keys.
      state: in decoding, the cache of earlier tokens.
    """
    positions = _positions(batch, 'decoder')
    context = Context(
      positions=positions,
      segments=batch.get('decoder_segment_ids'),
      prefix=_as_bool(batch.get('decoder_causal_attention')),
      causal=self.causal,
      state=state,
      turns=_turns(batch),
    )
    return self.stack(_embed(self, batch, 'decoder', positions), context)

  def values(self, x: jax.Array) -> jax.Array:
    """Returns the value before each token, [batch, length], of features [batch, length, embed]."""
    return self.value(x, self.value.weights(self.embedder, self.dtype))[..., 0]

  def readout(self) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from features to logits, which gathers the matrix of the head only once."""
    return _readout(self)

  def logits(self, x: jax.Array) -> jax.Array:
    return self.readout()(x)

  def __call__(self, batch: dict[str, jax.Array]):
    x, penalties = self.features(batch)
    return self.logits(x), penalties


class EncoderDecoder(nnx.Module):
  """A bidirectional encoder, and a causal decoder with attention to its output (T5)."""

  inputs = ('encoder', 'decoder')

  def __init__(
    self,
    *,
    vocab: int,
    embed: int,
    embedder: Factory,
    encoder: Factory,
    decoder: Factory,
    head: Factory,
    weight: Factory | None = None,
    dtype='float32',
    rngs: nnx.Rngs,
  ):
    check_sizes(EncoderDecoder, vocab=vocab, embed=embed)
    self.vocab = vocab
    self.embed = embed
    self.dtype = jnp.dtype(dtype)
    with used_by_default(weight):
      self.embedder = embedder(embed, vocab, rngs=rngs)
      self.encoder = encoder(embed, rngs=rngs)
      self.decoder = decoder(embed, rngs=rngs)
      self.head = head(embed, vocab, rngs=rngs)

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The cost of a pair of sequences, target and input."""
    encoder = cost_of(self.encoder, encoder_length, encoder_length)
    # The encoder is bidirectional, caches nothing for decoding, and its parameters meet only input tokens.
    encoder = dataclasses.replace(
      encoder,
      visible=encoder.full,
      cached=0,
      encoder_params=size(self.encoder),
      encoder_matrices=size(self.encoder, 'matrix'),
    )
    decoder = cost_of(self.decoder, length, encoder_length)
    return _with_ends(encoder + decoder, (self.embedder, self.head), length, encoder_length)

  def encode(self, batch: dict[str, jax.Array]):
    """Returns the encoder's output [batch, encoder length, embed], its segments, and penalties."""
    # A decoding step needs no encoder: its state has the keys and values of the encoder's output.
    if 'encoder_input_tokens' not in batch:
      rows = batch['decoder_input_tokens'].shape[0]
      return jnp.zeros((rows, 0, self.embed), self.dtype), jnp.zeros((rows, 0), jnp.int32), {}
    source = batch['encoder_input_tokens']
    positions = _positions(batch, 'encoder')
    # Unpacked rows have no segments; token 0 is padding, as everywhere in seqio.
    segments = (
      batch['encoder_segment_ids']
      if 'encoder_segment_ids' in batch
      else (source > 0).astype(jnp.int32)
    )
    context = Context(positions=positions, segments=segments, causal=False, turns=_turns(batch))
    encoded, penalties = self.encoder(_embed(self, batch, 'encoder', positions), context)
    return encoded, segments, penalties

  def features(self, batch: dict[str, jax.Array], state: DecodingState | None = None):
    """As `LanguageModel.features`: the features of the target tokens, and penalties of both stacks."""
    encoded, segments, penalties = self.encode(batch)
    positions = _positions(batch, 'decoder')
    if state is not None:
      (segments,) = state.once((segments,))
    context = Context(
      positions=positions,
      segments=batch.get('decoder_segment_ids'),
      encoded=encoded,
      encoded_segments=segments,
      state=state,
      turns=_turns(batch),
    )
    x, more = self.decoder(_embed(self, batch, 'decoder', positions), context)
    return x, {k: penalties.get(k, 0.0) + more.get(k, 0.0) for k in {**penalties, **more}}

  def readout(self) -> Callable[[jax.Array], jax.Array]:
    """Returns the function from features to logits, which gathers the matrix of the head only once."""
    return _readout(self)

  def logits(self, x: jax.Array) -> jax.Array:
    return self.readout()(x)

  def __call__(self, batch: dict[str, jax.Array]):
    x, penalties = self.features(batch)
    return self.logits(x), penalties


def _readout(model) -> Callable[[jax.Array], jax.Array]:
  weights = model.head.weights(model.embedder, model.dtype)

  def readout(x):
    return model.head(x, weights)

  return readout


def _with_ends(layers: Cost, ends: tuple, length: int, encoder_length: int) -> Cost:
  """Returns the cost of the layers, and of the embedder and the heads around them."""
  for end in ends:
    layers = layers + cost_of(end, length, encoder_length)
  return layers


def _as_bool(x):
  return None if x is None else x.astype(bool)
