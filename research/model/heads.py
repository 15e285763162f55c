"""The last layer of every model: turns feature vectors into logits.

A head has two methods: `weights(embedder, dtype)` returns its matrix, gathered for the product, and
`head(x, weights)` returns logits. They are separate, so that a loss that cuts the length into chunks gathers
the matrix only once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.embedder import Embedder, Scale
from research.model.layers import Linear
from research.model.parameters import Initializer, normal, param, project
from research.model.part import Cost, Factory
from research.model.weights import Matrix, make_weight
from research.parallel.axes import gather


def _soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
  return logits if cap is None else cap * jnp.tanh(logits / cap)


def _logits(x: jax.Array, kernel: jax.Array, axes: tuple, **options) -> jax.Array:
  """Returns float32 logits [batch, length, vocab] of x [batch, length, embed]."""
  # In float32 whatever the dtype of x: the softmax over a large vocabulary loses too much in bfloat16.
  return project(x, kernel, axes, ('batch', 'length', 'vocab'), dtype=jnp.float32, **options)


def _tied_logits(x: jax.Array, table: jax.Array) -> jax.Array:
  """Returns float32 logits of x by token vectors [vocab, embed]."""
  return _logits(x, table, ('vocab', None), transposed=True)


def _kernel(embed: int, vocab: int, init: Initializer | None, weight: Factory | None, rngs):
  """Makes the matrix [embed, vocab] of an untied head, by default with variance 1/embed."""
  init = init or functools.partial(normal, stddev=embed**-0.5)
  return make_weight(Matrix((embed, vocab), ('embed', 'vocab'), init), weight, rngs=rngs)


def _bias(vocab: int, rngs: nnx.Rngs) -> nnx.Param:
  return param(rngs, (vocab,), ('vocab',), nnx.initializers.zeros, kind='vector')


class Head(nnx.Module):
  """Base class of heads: a matrix of embed x vocab, its own or the embedder's, multiplies every token.

  Class attributes:
    gives: 'logits', or 'scores', which are one number per token. A loss needs one of the two.
  """

  gives = 'logits'

  def __init__(self, embed: int, vocab: int):
    self.logits = embed * vocab

  def cost(self, length: int, encoder_length: int) -> Cost:
    return Cost(logits=self.logits)


class TiedHead(Head):
  """Logits against the token vectors (Press & Wolf 2017, arXiv:1608.05859).

  Knobs:
    scale: factor of x, a number or a function of embed (T5 1.0: `inverse_sqrt`).
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
    super().__init__(embed, vocab)
    self.scale = scale(embed) if callable(scale) else scale
    self.soft_cap = soft_cap

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    return embedder.weights(dtype)

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    return _soft_cap(_tied_logits(x * self.scale, weights), self.soft_cap)


class UntiedHead(Head):
  """Logits by a matrix of its own.

  Knobs:
    bias: adds a bias (GPT-J, Phi).
    scale, soft_cap: as in `TiedHead`.
    weight: makes the matrix (see `weights`); None takes the model's choice.
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    bias: bool = False,
    scale: Scale = 1.0,
    soft_cap: float | None = None,
    init: Initializer | None = None,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(embed, vocab)
    self.kernel = _kernel(embed, vocab, init, weight, rngs)
    self.bias = _bias(vocab, rngs) if bias else None
    self.scale = scale(embed) if callable(scale) else scale
    self.soft_cap = soft_cap

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    return gather(self.kernel[...].astype(dtype), None, 'vocab')

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    logits = _logits(x * self.scale, weights, (None, 'vocab'))
    if self.bias is not None:
      logits = logits + self.bias[...]
    return _soft_cap(logits, self.soft_cap)


class NormalisedHead(Head):
  """Logits by a matrix whose columns are normalised to length 1 (Baichuan 2, arXiv:2309.10305).

  `weight` as in `UntiedHead`.
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    init: Initializer | None = None,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(embed, vocab)
    self.kernel = _kernel(embed, vocab, init, weight, rngs)

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    kernel = self.kernel[...]
    # Under the root: the gradient of sqrt at 0 is infinite.
    length = jnp.sqrt(jnp.sum(kernel * kernel, axis=0) + 1e-24)
    return gather((kernel / length).astype(dtype), None, 'vocab')

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    return _logits(x, weights, (None, 'vocab'))


class MaskedHead(Head):
  """The head of BERT: logits of norm(activation(dense(x))) against the token vectors, plus a bias.

  Devlin et al. 2018, arXiv:1810.04805, as released. Without `tied` the head has a matrix of its own.
  """

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    norm: Factory,
    activation: Callable[[jax.Array], jax.Array],
    tied: bool = True,
    linear: Factory = Linear,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(embed, vocab)
    self.activation = activation
    self.dense = linear({'embed': embed}, {None: embed}, bias=True, rngs=rngs)
    self.norm = norm(embed, rngs=rngs)
    self.bias = _bias(vocab, rngs)
    self.kernel = None if tied else _kernel(embed, vocab, None, weight, rngs)

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    if self.kernel is None:
      return embedder.weights(dtype)
    return gather(self.kernel[...].astype(dtype), None, 'vocab')

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    x = self.norm(self.activation(self.dense(x)))
    logits = (
      _tied_logits(x, weights) if self.kernel is None else _logits(x, weights, (None, 'vocab'))
    )
    return logits + self.bias[...]


class ScalarHead(Head):
  """One number per token in place of logits: a reward model's score, or a value.

  The matrix starts at zero, so every score starts at zero (Ziegler et al. 2019, arXiv:1909.08593, section 2.1,
  use a small start).

  Knobs:
    init: initializer of the matrix [embed, 1].
  """

  gives = 'scores'

  def __init__(
    self,
    embed: int,
    vocab: int,
    *,
    init: Initializer = nnx.initializers.zeros,
    rngs: nnx.Rngs,
  ):
    super().__init__(embed, 1)
    self.kernel = param(rngs, (embed, 1), ('embed', None), init, kind='matrix')

  def weights(self, embedder: Embedder, dtype) -> jax.Array:
    return gather(self.kernel[...].astype(dtype), None, None)

  def __call__(self, x: jax.Array, weights: jax.Array) -> jax.Array:
    return project(x, weights, (None, None), ('batch', 'length', None), dtype=jnp.float32)
