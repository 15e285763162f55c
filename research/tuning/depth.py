"""Drops the layers that a model needs least, one at a time: the one without which the loss is lowest.

Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2, depth importance by the validation loss.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.model.stack import Stack
from research.training.losses import CrossEntropy

Path = tuple
Batches = Sequence[dict[str, jax.Array]]


def depths(model: nnx.Module) -> dict[Path, int]:
  """The number of layers of every stack, by its path."""
  return {path: m.repeats for path, m in nnx.iter_modules(model) if isinstance(m, Stack)}


def token_loss(model: nnx.Module, batches: Batches) -> Callable[[dict], float]:
  """Returns a function from parameters, of any number of layers, to nats per token on all batches."""
  graphdef = nnx.graphdef(model)

  @jax.jit
  def sums(params, batch):
    module = nnx.merge(graphdef, params)
    features, _ = module.features(batch)
    terms, counts = CrossEntropy()(module, features, batch, 1)
    return terms['loss'], counts['weight']

  def loss(params):
    losses, weights = zip(*(jax.device_get(sums(params, batch)) for batch in batches), strict=True)
    return float(sum(losses) / sum(weights))

  return loss


def fewer_layers(
  params: dict,
  now: Mapping[Path, int],
  wanted: Mapping[Path, int],
  loss: Callable[[dict], float],
  log: Callable[[str], None],
) -> tuple[dict, dict[Path, list[int]]]:
  """Returns parameters with fewer layers, and the layers of every stack that stay, in order.

  Args:
    params: nested dicts of arrays.
    now, wanted: numbers of layers by the path of a stack.
    loss: the loss of parameters of any depth.
    log: called with a line for each layer that is dropped.
  """
  kept = {}
  for path, repeats in now.items():
    left = list(range(repeats))
    while len(left) > wanted[path]:
      candidates = []
      for dropped in range(len(left)):
        others = [i for i in range(len(left)) if i != dropped]
        candidates.append(loss(_take_layers(params, path, others)))
      dropped = int(np.argmin(candidates))
      params = _take_layers(params, path, [i for i in range(len(left)) if i != dropped])
      name = '/'.join(map(str, path))
      log(f'without layer {left.pop(dropped)} of {name}: {candidates[dropped]:.4f} nats per token')
    kept[path] = left
  return params, kept


def _take_layers(params: dict, stack: Path, layers: list[int]) -> dict:
  """The parameters with some layers of one stack."""
  if stack:
    return {**params, stack[0]: _take_layers(params[stack[0]], stack[1:], layers)}
  index = np.asarray(layers)

  def take(x):
    return jnp.asarray(x)[index]

  return {**params, 'sublayers': jax.tree.map(take, params['sublayers'])}
