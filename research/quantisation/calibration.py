"""Calibration: the inputs of a model's matrices on a text, and the loss of a model on rows of tokens."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.checkpoints.streamed import nested
from research.model import counts
from research.model.parameters import param
from research.model.stack import Stack, place_of, separate_layers
from research.model.weights import Matrix, Weight, multiply
from research.quantisation.quantised import BFloat16, Quantised
from research.training.losses import CrossEntropy

LOSS_CHUNKS = 8  # parts of a row whose logits are computed one after the other, if they divide it
CHUNK = 4096  # tokens whose products are summed in float32; the sums of chunks are added in float64


@dataclasses.dataclass(frozen=True)
class Inputs:
  """Sums over the tokens of a calibration text, of the inputs of one matrix.

  Attributes:
    gram: the sum of x x^T, float64 [inputs, inputs]. x is the input in the rounded model, in which the matrices
      before this one are rounded already.
    drift: the sum of x (y - x)^T, where y is the same input in the original model.
  """

  gram: np.ndarray
  drift: np.ndarray


# Returns the rounded matrix, of its path among the parameters, its layer in a stack (or None), and its inputs.
RoundMatrix = Callable[[tuple, int | None, Inputs], np.ndarray]


class Recorded(Weight):
  """A plain matrix that is rounded when it is first multiplied, by the inputs that it then has.

  A batch holds every row twice. The first half passes through the original matrices, and the second half
  through the rounded ones. `round` returns the rounded matrix of the inputs of both halves; while it is None,
  the matrix is plain for all rows.
  """

  def __init__(self, matrix: Matrix, *, rngs: nnx.Rngs):
    super().__init__(matrix)
    self.base = param(
      rngs, matrix.shape, matrix.axes, matrix.init, kind=matrix.kind, active=matrix.active
    )
    # Experts sort their rows before they multiply, and tables are looked up: their inputs are not recorded.
    self.is_recorded = matrix.kind == 'matrix' and not matrix.stacked
    self.round: Callable[[jax.Array], jax.Array] | None = None

  def __getitem__(self, index) -> jax.Array:
    return self.base[index]

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    if self.round is None:
      return super().multiply(x, to)
    original, rounded = jnp.split(x, 2)
    matrices = self.base[...], self.round(x)
    halves = [
      multiply(half, matrix, self.axes, to, self.inputs)
      for half, matrix in zip((original, rounded), matrices, strict=True)
    ]
    return jnp.concatenate(halves)


def round_in_order(
  model, params: Mapping, batches: Iterable[dict], round_matrix: RoundMatrix
) -> None:
  """Rounds the matrices of a model in the order in which it multiplies by them.

  All batches pass through the model at once, beside what the original model makes of them. So every matrix is
  rounded for the inputs that it will have once the matrices before it are rounded (Frantar et al. 2023, section
  4). A matrix that several layers share is rounded for the first of them.

  Args:
    model: makes the quantised model, `model(rngs=...)`.
    params: the parameters of the plain model, host arrays as nested dicts.
    batches: batches of tokens, as for training.
    round_matrix: called for every matrix whose inputs can be recorded, not for experts, heads and tables.
  """
  abstract = counts.abstract(recorded(model))
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract))]
  tree = nested({path: jnp.asarray(_at_base(params, path)) for path in paths})
  module = nnx.merge(nnx.graphdef(abstract), tree)
  for _, part in nnx.iter_modules(module):
    if isinstance(part, Stack):
      part.remat = 'none'  # there is no backward pass
  # How a matrix is rounded depends on numbers that the layers before it computed. So nothing is compiled as a
  # whole: the layers run one after the other, and each operation as it comes.
  separate_layers(module)
  sums = _Sums()
  for path, weight in list(nnx.iter_modules(module)):
    if isinstance(weight, Recorded) and weight.is_recorded:
      weight.round = _once(functools.partial(round_matrix, *place_of(path)), sums)
  rows = [jax.tree.map(np.asarray, batch) for batch in batches]
  rows = {key: np.concatenate([batch[key] for batch in rows]) for key in rows[0]}
  if 'decoder_loss_weights' in rows:
    # Rows without a target only fill the last batch.
    counted = rows['decoder_loss_weights'].any(axis=1)
    rows = {key: x[counted] for key, x in rows.items()}
  module.features({key: jnp.asarray(np.concatenate([x, x])) for key, x in rows.items()})


def _once(round_matrix: Callable[[Inputs], np.ndarray], sums: '_Sums'):
  """A function of the inputs [2 x batch, length, inputs...] of a matrix, which rounds it when first called."""
  rounded = []

  def round_first(x: jax.Array) -> jax.Array:
    if not rounded:
      rounded.append(jnp.asarray(round_matrix(sums.of(x))))
    return rounded[0]

  return round_first


class _Sums:
  """Computes `Inputs`. Queries, keys and values have the same inputs, whose sums are computed once."""

  def __init__(self):
    self.latest: tuple[jax.Array, Inputs] | None = None

  def of(self, x: jax.Array) -> Inputs:
    """The sums of inputs [2 x batch, length, inputs...], the original rows before the rounded ones."""
    if self.latest is None or self.latest[0] is not x:
      self.latest = x, self._compute(x)
    return self.latest[1]

  def _compute(self, x: jax.Array) -> Inputs:
    original, rounded = x.reshape(2, -1, math.prod(x.shape[2:])).astype(jnp.float32)
    size = rounded.shape[-1]
    gram = np.zeros((size, size))
    drift = np.zeros((size, size))
    for start in range(0, len(rounded), CHUNK):
      behind = rounded[start : start + CHUNK]
      away = original[start : start + CHUNK] - behind
      gram += np.asarray(_transposed_product(behind, behind))
      drift += np.asarray(_transposed_product(behind, away))
    return Inputs(gram, drift)


@jax.jit
def _transposed_product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a^T b, in float32 on every device."""
  return jnp.matmul(a.T, b, precision='highest')


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
  # In parts along the length, since the logits of a large vocabulary are many times the model's own arrays.
  chunks = math.gcd(features.shape[1], LOSS_CHUNKS)
  terms, sums = CrossEntropy()(model, features, batch, chunks)
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


def _at_base(params: Mapping, path: tuple):
  """The plain parameter of a path, in which a recorded matrix is called `base`."""
  for key in path[:-1]:
    params = params[key]
  return params if path[-1] == 'base' and not isinstance(params, Mapping) else params[path[-1]]
