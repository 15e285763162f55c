"""Whole models: a batch in, logits out.

A model has `features(batch) -> (x [batch, length, embed], penalties)` and `logits(x)`; the two are apart so
that a loss need never hold the logits of a whole batch. A head has `weights(embedder, dtype)`, its matrix as it
is multiplied with, and `(x, weights) -> logits`. The keys of a batch are seqio's.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.model.layers import (
  Context,
  Initializer,
  Linear,
  Part,
  check_sizes,
  look_up,
  normal,
  param,
  project,
)
from research.sharding import gather, shard, spec

# A number, or how it follows from `embed`: then it is right at every width of a ladder.
Scale = float | Callable[[int], float]


def inverse_sqrt(embed: int) -> float:
  """embed^-1/2: a `Scale` (T5 1.0, PaLM)."""
  return embed**-0.5


class Embedder(nnx.Module):
  """Tokens (and, where learned, positions and a type) to vectors.

  Knobs:
    positions: how many learned positions there are (GPT-2, BERT); None for none.
    position_offset: the row of position 0 (OPT has 2 rows before it, so its table has 2 more).
    fixed_positions: added too, `positions.sinusoidal`.
    types: how many token types (BERT); tokens are of type 0.
    scale: of the token vectors, a number or a function of embed (Gemma: `math.sqrt`).
    norm: after the sum (BERT, BLOOM).
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    positions: int | None = None,
    position_offset: int = 0,
    fixed_positions: Callable[..., jax.Array] | None = None,
    types: int | None = None,
    scale: Scale = 1.0,
    norm: Part | None = None,
    init: Initializer = normal,
    rngs: nnx.Rngs,
  ):
    check_sizes(Embedder, positions=positions, types=types)
    self.scale = scale(embed) if callable(scale) else scale
    self.position_offset, self.fixed_positions = position_offset, fixed_positions
    table = lambda n, axis: param(rngs, (n, embed), (axis, 'embed'), init) if n else None
    self.tokens, self.positions, self.types = (
      table(vocab, 'vocab'),
      table(positions, None),
      table(types, None),
    )
    self.norm = norm(embed, rngs=rngs) if norm else None

  def __call__(self, tokens: jax.Array, positions: jax.Array, dtype) -> jax.Array:
    x = look_up(self.tokens[...].astype(dtype), 'vocab', tokens) * self.scale
    if self.positions is not None:
      x = x + look_up(self.positions[...].astype(dtype), None, positions + self.position_offset)
    if self.fixed_positions is not None:
      fixed = self.fixed_positions(positions, x.shape[-1]).astype(dtype)
      x = x + shard(fixed, 'batch', 'sequence', None)
    if self.types is not None:
      x = x + shard(self.types[...], None, None)[0].astype(dtype)
    return self.norm(x) if self.norm is not None else x

  def weights(self, dtype) -> jax.Array:
    """The token vectors [vocab, embed], gathered to multiply with."""
    return gather(self.tokens[...].astype(dtype), 'vocab', None)


def _soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def _logits(x: jax.Array, kernel: jax.Array, axes: tuple, **options) -> jax.Array:
  """Float32 logits [batch, length, vocab] of x [batch, length, embed]."""
  return project(x, kernel, axes, ('batch', 'length', 'vocab'), dtype=jnp.float32, **options)


def _against(x: jax.Array, table: jax.Array) -> jax.Array:
  """Float32 logits of x against vectors [vocab, embed]."""
  return _logits(x, table, ('vocab', None), transposed=True)


class TiedHead(nnx.Module):
  """Logits against the token vectors (Press & Wolf 2017, arXiv:1608.05859).

  Knobs:
    scale: of x, a number or a function of embed (T5 1.0: `inverse_sqrt`).
    soft_cap: c in c tanh(logits / c) (Gemma 2).
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    scale: Scale = 1.0,
    soft_cap: float | None = None,
    rngs: nnx.Rngs,
  ):
    self.scale = scale(embed) if callable(scale) else scale
    self.soft_cap = soft_cap

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    return embedder.weights(dtype)

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    return _soft_cap(_against(x * self.scale, weights), self.soft_cap)


class UntiedHead(nnx.Module):
  """Logits by a matrix of their own; with `bias` in GPT-J and Phi, `soft_cap` as in `TiedHead`."""

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    bias: bool = False,
    soft_cap: float | None = None,
    init: Initializer | None = None,
    rngs: nnx.Rngs,
  ):
    init = init or functools.partial(normal, stddev=embed**-0.5)
    self.kernel = param(rngs, (embed, vocab), ('embed', 'vocab'), init)
    self.bias = param(rngs, (vocab,), ('vocab',), nnx.initializers.zeros) if bias else None
    self.soft_cap = soft_cap

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    return gather(self.kernel[...].astype(dtype), None, 'vocab')

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    logits = _logits(x, weights, (None, 'vocab'))
    if self.bias is not None:
      logits = logits + self.bias[...]
    return _soft_cap(logits, self.soft_cap)


class NormalisedHead(nnx.Module):
  """Logits by a matrix whose column for every token has length one (Baichuan 2, arXiv:2309.10305)."""

  def __init__(self, embed: int, vocab: int, *, init: Initializer | None = None, rngs: nnx.Rngs):
    init = init or functools.partial(normal, stddev=embed**-0.5)
    self.kernel = param(rngs, (embed, vocab), ('embed', 'vocab'), init)

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    kernel = self.kernel[...]
    length = jnp.sqrt(jnp.sum(kernel * kernel, axis=0) + 1e-24)
    return gather((kernel / length).astype(dtype), None, 'vocab')

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    return _logits(x, weights, (None, 'vocab'))


class MaskedHead(nnx.Module):
  """BERT's: logits of norm(activation(dense(x))) against the token vectors, plus a bias.

  Devlin et al. 2018, arXiv:1810.04805, as released.
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    norm: Part,
    activation: Callable[[jax.Array], jax.Array],
    linear: Part = Linear,
    rngs: nnx.Rngs,
  ):
    self.activation = activation
    self.dense = linear({'embed': embed}, {None: embed}, bias=True, rngs=rngs)
    self.norm = norm(embed, rngs=rngs)
    self.bias = param(rngs, (vocab,), ('vocab',), nnx.initializers.zeros)

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    return embedder.weights(dtype)

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    return _against(self.norm(self.activation(self.dense(x))), weights) + self.bias[...]


def _positions(batch: dict, name: str) -> jax.Array:
  tokens = batch[f'{name}_input_tokens']
  default = lambda: jnp.broadcast_to(
    np.arange(tokens.shape[1], dtype=np.int32), tokens.shape, out_sharding=spec('batch', None)
  )
  return batch[f'{name}_positions'] if f'{name}_positions' in batch else default()


class LanguageModel(nnx.Module):
  """One stack: GPT, LLaMA, Mamba when `causal`; BERT when not; GLM by the batch's prefix.

  Args:
    vocab: logits; at least the vocabulary of the data.
    embed: width of the residual stream.
    dtype: of the activations and so of the computation; parameters, logits and loss are float32.
  """

  inputs = ('decoder',)

  def __init__(
    self,
    *,
    vocab: int,
    embed: int,
    embedder: Part,
    stack: Part,
    head: Part,
    causal: bool = True,
    dtype='float32',
    rngs: nnx.Rngs,
  ):
    check_sizes(LanguageModel, vocab=vocab, embed=embed)
    self.vocab, self.causal, self.dtype = vocab, causal, jnp.dtype(dtype)
    self.embedder = embedder(embed, vocab, rngs=rngs)
    self.stack = stack(embed, rngs=rngs)
    self.head = head(embed, vocab, rngs=rngs)

  def features(self, batch: dict[str, jax.Array]):
    positions = _positions(batch, 'decoder')
    context = Context(
      positions=positions,
      segments=batch.get('decoder_segment_ids'),
      prefix=_as_bool(batch.get('decoder_causal_attention')),
      causal=self.causal,
    )
    return self.stack(self.embedder(batch['decoder_input_tokens'], positions, self.dtype), context)

  def readout(self) -> Callable[[jax.Array], jax.Array]:
    """Features to logits; the head's matrix is gathered here, once for all the calls."""
    weights = self.head.weights(self.embedder, self.dtype)
    return lambda x: self.head(x, weights)

  def logits(self, x: jax.Array) -> jax.Array:
    return self.readout()(x)

  def __call__(self, batch: dict[str, jax.Array]):
    x, penalties = self.features(batch)
    return self.logits(x), penalties


class EncoderDecoder(nnx.Module):
  """An encoder that sees both ways and a causal decoder that also reads it (T5)."""

  inputs = ('encoder', 'decoder')

  def __init__(
    self,
    *,
    vocab: int,
    embed: int,
    embedder: Part,
    encoder: Part,
    decoder: Part,
    head: Part,
    dtype='float32',
    rngs: nnx.Rngs,
  ):
    check_sizes(EncoderDecoder, vocab=vocab, embed=embed)
    self.vocab, self.dtype = vocab, jnp.dtype(dtype)
    self.embedder = embedder(embed, vocab, rngs=rngs)
    self.encoder, self.decoder = encoder(embed, rngs=rngs), decoder(embed, rngs=rngs)
    self.head = head(embed, vocab, rngs=rngs)

  def features(self, batch: dict[str, jax.Array]):
    source, target = batch['encoder_input_tokens'], batch['decoder_input_tokens']
    positions = _positions(batch, 'encoder')
    # Unpacked rows have no segments; token 0 is padding, as everywhere in seqio.
    segments = (
      batch['encoder_segment_ids']
      if 'encoder_segment_ids' in batch
      else (source > 0).astype(jnp.int32)
    )
    context = Context(positions=positions, segments=segments, causal=False)
    encoded, penalties = self.encoder(self.embedder(source, positions, self.dtype), context)
    positions = _positions(batch, 'decoder')
    context = Context(
      positions=positions,
      segments=batch.get('decoder_segment_ids'),
      encoded=encoded,
      encoded_segments=segments,
    )
    x, more = self.decoder(self.embedder(target, positions, self.dtype), context)
    return x, {k: penalties.get(k, 0.0) + more.get(k, 0.0) for k in {**penalties, **more}}

  def readout(self) -> Callable[[jax.Array], jax.Array]:
    """Features to logits; the head's matrix is gathered here, once for all the calls."""
    weights = self.head.weights(self.embedder, self.dtype)
    return lambda x: self.head(x, weights)

  def logits(self, x: jax.Array) -> jax.Array:
    return self.readout()(x)

  def __call__(self, batch: dict[str, jax.Array]):
    x, penalties = self.features(batch)
    return self.logits(x), penalties


def _as_bool(x):
  return None if x is None else x.astype(bool)
