"""How much each unit of a model matters, by its activations on a few batches.

Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2: a neuron of an MLP, a head and a channel of
the residual stream matter as much as they are large. Here size is the root mean square over tokens.
"""

import dataclasses
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.model.layers import Linear
from research.model.mlp import Mlp
from research.model.stack import Stack, place_of, separate_layers
from research.model.weights import Weight, multiply

# (path of a linear layer in the model's tree, its layer in the stack or None).
Place = tuple[tuple, int | None]


@dataclasses.dataclass(frozen=True)
class Importance:
  """Root mean squares over tokens.

  Attributes:
    inputs: those of the inputs of every linear layer, in the shape of its inputs.
    channels: [embed], the sum of those of all linear layers that read the residual stream, and of the head.
    nested: paths of the MLPs whose first units were trained to matter most (`Mlp.nested`).
  """

  inputs: dict[Place, np.ndarray]
  channels: np.ndarray
  nested: frozenset[tuple] = frozenset()


class _Watched(Weight):
  """A matrix that calls `note` with its inputs."""

  def __init__(self, base, axes: tuple, contract: int, note: Callable[[jax.Array], None]):
    self.base = base
    self.axes = axes
    self.contract = contract
    self.note = note

  def multiply(self, x, to):
    self.note(x)
    return multiply(x, self.base, self.axes, to, self.contract)


def measure(model: nnx.Module, params: dict, batches: Iterable[dict[str, jax.Array]]) -> Importance:
  """Returns the importance of units, measured on the tokens that carry a loss.

  Args:
    model: a language model, with shapes in place of arrays.
    params: its parameters.
    batches: batches of its stream. One is enough; a few give steadier figures.
  """
  graphdef = nnx.graphdef(model)
  width = model.embedder.tokens.shape[-1]
  # The linear layers in the order of the sums, which is known once the function is traced.
  order: dict[tuple, None] = {}

  @jax.jit
  def squares(params, batch):
    by_linear, *others = _squares(nnx.merge(graphdef, params), batch)
    order.update(dict.fromkeys(by_linear))
    return list(by_linear.values()), *others

  total = None
  for batch in batches:
    of_batch = jax.device_get(squares(params, batch))
    total = of_batch if total is None else jax.tree.map(np.add, total, of_batch)
  values, of_features, tokens = total
  sizes = {}
  channels = np.sqrt(of_features / tokens)
  for (path, layer, inputs), value in zip(order, values, strict=True):
    sizes[path, layer] = np.sqrt(value / tokens)
    if inputs == ('embed',) and value.shape == (width,):
      channels = channels + sizes[path, layer]
  modules = nnx.iter_modules(model)
  nested = (path for path, part in modules if isinstance(part, Mlp) and part.nested)
  return Importance(sizes, channels, frozenset(nested))


def _squares(model: nnx.Module, batch: dict) -> tuple[dict, jax.Array, jax.Array]:
  """Sums over tokens of the squares of linear layers' inputs and of features; and the number of tokens."""
  counted = (batch['decoder_loss_weights'] > 0).astype(jnp.float32)
  seen = {}

  def note(key, x):
    x = x.astype(jnp.float32)
    seen[key] = jnp.einsum('bl...,bl->...', x * x, counted)

  # Separate layers and nothing recomputed: values that are traced in a scan or a checkpoint cannot leave it.
  separate_layers(model)
  for path, module in list(nnx.iter_modules(model)):
    if isinstance(module, Stack):
      module.remat = 'none'
    if isinstance(module, Linear):
      key = (*place_of(path), module.inputs)
      axes = (*module.inputs, *module.outputs)

      def watch(x, key=key):
        note(key, x)

      module.kernel = _Watched(module.kernel, axes, len(module.inputs), watch)
  features, _ = model.features(batch)
  features = features.astype(jnp.float32)
  of_features = jnp.einsum('ble,bl->e', features * features, counted)
  return seen, of_features, jnp.sum(counted)


def largest(size: np.ndarray, count: int) -> np.ndarray:
  """The indices of the largest, in their order."""
  return np.sort(np.argsort(-size, kind='stable')[:count])
