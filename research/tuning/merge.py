"""Turns matrices that are computed from several parameters (LoRA, few bits) into plain ones."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from research.model import counts
from research.model.weights import Weight
from research.parallel.mesh import Mesh


@dataclasses.dataclass(frozen=True)
class Tree:
  """A resolved model, for functions that ask a `configs.Config` for its tree."""

  model: functools.partial

  def tree(self) -> functools.partial:
    return self.model


def merged(model, params: dict) -> tuple[functools.partial, dict]:
  """Returns the model with plain matrices that computes the same, and its parameters.

  Adapters, prefixes and other parameters that are no matrices stay as they are.

  Args:
    model: a partial that needs only `rngs`, with any choice of `weight`.
    params: its parameters, nested dicts of arrays.
  """
  module = counts.abstract(model)
  plain_model = without_weights(model)
  result = params
  with Mesh().use(jax.devices()[:1]):
    for path, weight in nnx.iter_modules(module):
      if isinstance(weight, Weight) and not _within_another(module, path):
        result = _put(result, path, _matrix(weight, _at(params, path)))
  return plain_model, result


def _within_another(module: nnx.Module, path: tuple) -> bool:
  """Whether a weight is the base of another one."""
  for i in range(len(path)):
    node = module
    for key in path[:i]:
      node = node[key] if isinstance(node, nnx.List) else getattr(node, key)
    if isinstance(node, Weight):
      return True
  return False


def _matrix(weight: Weight, params: dict) -> np.ndarray:
  """The matrix of a weight, float32; for a weight in a stack, the matrices of all layers."""
  abstract = nnx.to_pure_dict(nnx.state(weight))
  # How many axes of layers come first: a quantised matrix has no `base`, but its codes have the same axes.
  stored = jax.tree.leaves(abstract.get('base', abstract.get('packed')))[0]
  layers = len(stored.shape) - len(weight.shape)
  graphdef = nnx.graphdef(weight)

  def whole(params):
    return nnx.merge(graphdef, params)[...]

  for _ in range(layers):
    whole = jax.vmap(whole)
  return np.asarray(jax.jit(whole)(jax.tree.map(np.asarray, params)), np.float32)


def _at(tree: dict, path: tuple):
  for key in path:
    tree = tree[key]
  return tree


def _put(tree: dict, path: tuple, value) -> dict:
  if not path:
    return value
  return {**tree, path[0]: _put(tree[path[0]], path[1:], value)}


def without_weights(value):
  """A resolved model without its choices of `weight`: every matrix is a plain parameter."""
  if isinstance(value, functools.partial):
    keywords = {k: without_weights(v) for k, v in value.keywords.items() if k != 'weight'}
    return functools.partial(value.func, *value.args, **keywords)
  if isinstance(value, list | tuple):
    return type(value)(map(without_weights, value))
  return value


def has_weights(model) -> bool:
  """Whether any matrix of the model is more than a plain parameter."""
  return any(isinstance(module, Weight) for _, module in nnx.iter_modules(counts.abstract(model)))
