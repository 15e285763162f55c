"""The inputs of a model's matrices on a calibration text, and the loss of a model on rows of tokens."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.checkpoints.streamed import nested
from research.model import counts
from research.model.parameters import param
from research.model.weights import Matrix, Weight
from research.quantisation.quantised import BFloat16, Quantised
from research.training.losses import CrossEntropy

GRAM = 'gram'


class Recorded(Weight):
  """A plain matrix that records its inputs: the gradient of its parameter `gram` is the sum of x x^T.

  A gradient passes through scanned, rematerialised and vmapped layers and sums over the tokens of a batch, so
  that no layer needs to know of the recording.
  """

  def __init__(self, matrix: Matrix, *, rngs: nnx.Rngs):
    super().__init__(matrix)
    self.base = param(
      rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind, active=matrix.active
    )
    # Experts sort their rows before they multiply, and tables are looked up: their inputs are not recorded.
    seen = matrix.kind == 'matrix' and not matrix.stacked
    shape = (matrix.fan_in,) * 2
    zeros = nnx.initializers.zeros
    self.gram = param(rngs, shape, (None, None), zeros, kind='vector', holds=0) if seen else None

  def __getitem__(self, index) -> jax.Array:
    return self.base[index]

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    if self.gram is not None:
      x = _record(x, self.gram[...])
    return super().multiply(x, to)


@jax.custom_vjp
def _record(x: jax.Array, gram: jax.Array) -> jax.Array:
  """x; the gradient by `gram` [inputs, inputs] is the sum of x x^T over tokens, whatever x is used for."""
  return x


def _record_backward(residuals, dx):
  x, gram = residuals
  flat = x.reshape(-1, len(gram)).astype(jnp.float32)
  # No gram depends on the gradient that arrives. None is passed on, so XLA drops most of the backward pass.
  return jnp.zeros_like(dx), flat.T @ flat


_record.defvjp(lambda x, gram: (x, (x, gram)), _record_backward)


def grams(model, params: Mapping, batches: Iterable[dict]) -> dict[tuple, np.ndarray]:
  """The sum of x x^T over all tokens for every matrix, by path: float32 [layers..., inputs, inputs].

  A matrix whose inputs were not recorded is left out.

  Args:
    model: makes the model with `Recorded` matrices, `model(rngs=...)`.
    params: its parameters without `gram`, host arrays as nested dicts.
    batches: batches of tokens, as for training.
  """
  abstract = counts.abstract(model)
  graphdef = nnx.graphdef(abstract)
  shapes = nnx.to_flat_state(nnx.state(abstract))
  zeros = {path: jnp.zeros(x.shape) for path, x in shapes if path[-1] == GRAM}
  others = {path: jnp.asarray(_at(params, path)) for path, x in shapes if path[-1] != GRAM}

  def last_features(zeros, others, batch):
    features, _ = nnx.merge(graphdef, nested({**others, **zeros})).features(batch)
    return jnp.sum(features)

  gradient = jax.jit(jax.grad(last_features))
  total = zeros
  for batch in batches:
    total = jax.tree.map(jnp.add, total, gradient(zeros, others, batch))
  return {path[:-1]: np.asarray(x) for path, x in total.items() if bool(jnp.any(x != 0))}


def loss_of(model, params: Mapping, batches: Iterable[dict]) -> float:
  """The loss of a model on batches of tokens, in nats per target token.

  Args:
    model: makes the model, `model(rngs=...)`.
    params: its parameters, host arrays as nested dicts.
    batches: batches of tokens, as for training.
  """
  return losses_of(model, [params], batches)[0]


def losses_of(model, trees: Iterable[Mapping], batches: Iterable[dict]) -> list[float]:
  """The loss of a model with each of several sets of parameters, compiled once; arguments as of `loss_of`."""
  graphdef = nnx.graphdef(counts.abstract(model))
  batches = list(batches)

  @jax.jit
  def sums(params, batch):
    return _loss(nnx.merge(graphdef, params), batch)

  losses = []
  for params in trees:
    params = jax.tree.map(jnp.asarray, params)
    pairs = [sums(params, batch) for batch in batches]
    losses.append(float(sum(total for total, _ in pairs) / sum(weight for _, weight in pairs)))
  return losses


def _loss(model, batch: dict) -> tuple[jax.Array, jax.Array]:
  """The sum of the cross-entropy over a batch, and the number of its targets."""
  features, _ = model.features(batch)
  terms, sums = CrossEntropy()(model, features, batch, 1)
  return terms['loss'], sums['weight']


def recorded(value):
  """A resolved model with `Recorded` matrices in place of the quantised ones; plain matrices stay plain."""
  if isinstance(value, functools.partial):
    if value.func in (Quantised, BFloat16):
      return functools.partial(Recorded)
    keywords = {k: recorded(v) for k, v in value.keywords.items()}
    return functools.partial(value.func, *value.args, **keywords)
  if isinstance(value, list | tuple):
    return type(value)(map(recorded, value))
  return Recorded if value in (Quantised, BFloat16) else value


def _at(tree: Mapping, path: tuple):
  for key in path:
    tree = tree[key]
  return tree
