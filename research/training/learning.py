"""Decides which parameters of a run learn (`Run.learns`), and splits and joins trees of parameters.

Parameters that do not learn are an input of the step. They have no gradient and no optimizer state, and the
run's checkpoints do not hold them.
"""

import re
from collections.abc import Iterable, Mapping
from typing import get_args

import jax
import jax.numpy as jnp

from research.checkpoints.manager import names
from research.core.errors import Invalid, did_you_mean
from research.model.parameters import Kind, all_parameters
from research.training.run import Run

# Prefix of a pattern that chooses by kind: 'kind:vector' matches every norm and bias.
BY_KIND = 'kind:'


def frozen_names(model, learns: tuple[str, ...] | None) -> frozenset[str]:
  """Returns the names of the parameters that do not learn, such as 'stack/sublayers/0/parts/0/query/kernel'.

  Args:
    model: the module, with arrays or shapes.
    learns: regular expressions that match whole names, or 'kind:' and a kind; None for all parameters.

  Raises:
    Invalid: a pattern matches nothing, or matches a quantised parameter.
  """
  parameters = {'/'.join(map(str, path)): value for path, value in all_parameters(model)}
  kinds = {name: value.kind for name, value in parameters.items()}
  if learns is None:
    _check_floating(parameters, kinds)
    return frozenset()
  learned = set()
  for pattern in learns:
    chosen = {name for name, kind in kinds.items() if _chooses(pattern, name, kind)}
    if not chosen:
      known = [BY_KIND + kind for kind in get_args(Kind)]
      hint = did_you_mean(pattern, known if pattern.startswith(BY_KIND) else kinds)
      raise Invalid(Run, 'learns', f'{pattern!r} matches no parameter.{hint}')
    learned |= chosen
  _check_floating(parameters, learned)
  return frozenset(kinds) - learned


def _check_floating(parameters: Mapping, learned: Iterable[str]) -> None:
  """Raises Invalid if a parameter in few bits is to learn: updates are smaller than the gaps of its values."""
  for name in learned:
    if parameters[name].dtype != jnp.float32:
      why = (
        f'{name} is stored as {parameters[name].dtype} and cannot learn; say what learns, such as '
        "('.*/lora_[ab]',), or train with StraightThrough matrices."
      )
      raise Invalid(Run, 'learns', why)


def _chooses(pattern: str, name: str, kind: str) -> bool:
  if pattern.startswith(BY_KIND):
    return kind == pattern.removeprefix(BY_KIND)
  return re.fullmatch(pattern, name) is not None


def keep(tree: Mapping, chosen: Iterable[str], path: str = '') -> dict:
  """Returns only the chosen entries of nested dicts, without dicts that become empty.

  Args:
    tree: nested dicts.
    chosen: names of leaves, 'a/b/c'.
    path: the name of `tree` itself, with a final '/'.
  """
  chosen = frozenset(chosen)
  result = {}
  for key, value in tree.items():
    name = f'{path}{key}'
    if isinstance(value, Mapping):
      value = keep(value, chosen, name + '/')
      if value:
        result[key] = value
    elif name in chosen:
      result[key] = value
  return result


def without(tree: Mapping, frozen: frozenset[str]) -> dict:
  """Returns nested dicts without the leaves of these names."""
  return keep(tree, frozenset(names(tree)) - frozen) if frozen else tree


def joined(tree: Mapping, other: Mapping) -> dict:
  """Merges two nested dicts."""
  result = dict(tree)
  for key, value in other.items():
    result[key] = joined(result.get(key, {}), value) if isinstance(value, Mapping) else value
  return result


def filled(tree: Mapping, replacements: Mapping[str, Mapping], path: str = '') -> dict:
  """Replaces leaves of nested dicts by other values.

  Args:
    tree: nested dicts of arrays.
    replacements: by name, the arguments of `_replace` (`starts.Checkpoint.load` returns them).
    path: the name of `tree` itself, with a final '/'.
  """
  result = {}
  for key, value in tree.items():
    name = f'{path}{key}'
    if isinstance(value, Mapping):
      result[key] = filled(value, replacements, name + '/')
    elif name in replacements:
      result[key] = _replace(value, **replacements[name])
    else:
      result[key] = value
  return result


def _replace(drawn: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
  """Returns `value`; where the boolean array `mask` is False, `drawn` (rows that the checkpoint lacks)."""
  return value if mask is None else jnp.where(mask, value, drawn)
