"""Whether two models are one function: what is built is compared, layer by layer, not the text of gin.

A number, a bare function and a function with its defaults bound can all say the same, and so can a stack of two
layers twice and one of four. What is compared are the parameters' shapes and every knob of the modules.
"""

import math
from collections.abc import Iterator
from typing import Any

from research.core.errors import UserError
from research.huggingface.resolved import node

# What a config.json does not say, and inference does not need.
TRAINING_ONLY = frozenset((
  'dtype', 'init', 'scan', 'remat', 'chunk', 'balance', 'z_loss', 'rate', 'capacity', 'places', 'repeats',
))  # fmt: skip


def facts(model) -> dict[str, Any]:
  """What is built: a name by which a person finds it, and a shape, a number or a function."""
  from research.model import counts

  return dict(_facts(counts.abstract(model), ''))


def _facts(value, name: str) -> Iterator[tuple[str, Any]]:
  from flax import nnx

  from research.model.stack import Stack, Stacks

  if isinstance(value, nnx.Variable):
    yield name, tuple(value.shape)
  elif isinstance(value, Stack | Stacks):
    yield from _stack_facts(value, name)
  elif isinstance(value, nnx.Module) and not isinstance(value, nnx.List):
    yield name, type(value).__name__
    yield from _members(value, name)
  elif isinstance(value, nnx.List | list | tuple):
    yield name, len(value)
    for i, inner in enumerate(value):
      yield from _facts(inner, f'{name}[{i}]')
  elif callable(value):
    yield from _function_facts(value, name)
  else:
    yield name, value


def _members(module, name: str) -> Iterator[tuple[str, Any]]:
  for key, value in sorted(vars(module).items()):
    if not key.startswith('_') and key not in TRAINING_ONLY:
      yield from _facts(value, f'{name}.{key}'.lstrip('.'))


def _stack_facts(value, name: str) -> Iterator[tuple[str, Any]]:
  """The sublayers in the order of execution, however they are stacked, and the norm behind them."""
  from research.model.stack import Stacks

  stacks = value.stacks if isinstance(value, Stacks) else [value]
  sublayers = [s for stack in stacks for _ in range(stack.repeats) for s in stack.sublayers]
  yield f'{name}.sublayers', len(sublayers)
  for i, sublayer in enumerate(sublayers):
    for inner, fact in _facts(sublayer, f'{name}.sublayers[{i}]'):
      # A parameter of a stack has its layers on the first axis.
      yield inner, fact[1:] if isinstance(fact, tuple) else fact
  norms = [stack.norm for stack in (*stacks, value) if stack.norm is not None]
  yield f'{name}.norms', len({id(norm) for norm in norms})
  for norm in norms[-1:]:
    yield from _facts(norm, f'{name}.norm')
  for stack in stacks:
    yield from _facts(getattr(stack, 'bias', None), f'{name}.bias')


def _function_facts(value, name: str) -> Iterator[tuple[str, Any]]:
  target, arguments = node(value)
  yield name, getattr(target, '__name__', repr(target))
  for key, inner in sorted(arguments.items()):
    if key not in TRAINING_ONLY:
      yield from _facts(inner, f'{name}.{key}')


def check_same(model_type: str, ours, theirs) -> None:
  """Refuses a model that is not the one that its config.json describes.

  Args:
    model_type: for the message.
    ours, theirs: resolved trees.

  Raises:
    UserError: the first difference, by name.
  """
  ours, theirs = facts(ours), facts(theirs)
  for name in (*ours, *theirs):
    mine, described = ours.get(name), theirs.get(name)
    if not _alike(mine, described):
      raise UserError(
        f'config.json of {model_type} cannot say that {name} is {mine!r} of this model, only {described!r}.'
      )


def _alike(a, b) -> bool:
  if isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b
