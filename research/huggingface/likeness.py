"""Compares two models as they are built, layer by layer, and not as their gin text has them.

A bare function and one with its defaults bound can be the same function, and a stack of two layers repeated
twice is a stack of four. What is compared are the shapes of the parameters and every knob of the modules.
"""

import math
from collections.abc import Iterator
from typing import Any

from research.core.errors import UserError
from research.huggingface.resolved import node

# Members that a config.json does not have, and that inference does not need.
TRAINING_ONLY = frozenset((
  'dtype', 'init', 'scan', 'remat', 'chunk', 'balance', 'z_loss', 'rate', 'capacity', 'places', 'repeats',
))  # fmt: skip


def facts(model) -> dict[str, Any]:
  """Returns the shapes of the parameters, the knobs and the names of the functions of a model, by name."""
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
  """Yields the sublayers in the order of execution, however they are stacked, and the norm behind them."""
  from research.model.stack import Stacks

  stacks = value.stacks if isinstance(value, Stacks) else [value]
  sublayers = [s for stack in stacks for _ in range(stack.repeats) for s in stack.sublayers]
  yield f'{name}.sublayers', len(sublayers)
  for i, sublayer in enumerate(sublayers):
    for inner, fact in _facts(sublayer, f'{name}.sublayers[{i}]'):
      # A stack's parameter has the layers on its first axis, and how many those are depends on the stacking.
      yield inner, fact[1:] if isinstance(fact, tuple) else fact
  # Each of several stacks may have a norm; the last one is behind the last layer.
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
  """Refuses a model that its config.json does not describe.

  Args:
    model_type: for the message.
    ours: the resolved tree of the model.
    theirs: the resolved tree that the config.json gives when it is read back.

  Raises:
    UserError: names the first difference.
  """
  our_facts = facts(ours)
  their_facts = facts(theirs)
  for name in (*our_facts, *their_facts):
    ours_is = our_facts.get(name)
    theirs_is = their_facts.get(name)
    if not _are_alike(ours_is, theirs_is):
      raise UserError(
        f'config.json of {model_type} cannot say that {name} of this model is {ours_is!r}, only {theirs_is!r}.'
      )


def _are_alike(a, b) -> bool:
  """Equality, with room for numbers that were written as text."""
  if isinstance(a, float | int) and isinstance(b, float | int) and not isinstance(a, bool):
    return math.isclose(a, b, rel_tol=1e-6)
  return a == b
