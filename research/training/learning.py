"""Which parameters of a run learn: `Run.learns`.

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

# How a pattern chooses by kind: 'kind:vector' is every norm and bias.
BY_KIND = 'kind:'


def frozen_names(model, learns: tuple[str, ...] | None) -> frozenset[str]:
  """Names of the parameters that do not learn, 'stack/sublayers/0/parts/0/query/kernel'.

  Args:
    model: the module, with arrays or shapes.
    learns: patterns of names, or 'kind:' and a kind; None for all parameters.

  Raises:
    Invalid: a pattern chooses nothing, or what is quantised.
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
  """Refuses to let what is stored in few bits learn: no optimizer's step is as large as theirs."""
  for name in learned:
    if parameters[name].dtype != jnp.float32:
      why = (
        f'{name} is stored as {parameters[name].dtype} and cannot learn; say what learns, such as '
      )
      raise Invalid(
        Run, 'learns', why + "('.*/lora_[ab]',), or train with StraightThrough matrices."
      )


def _chooses(pattern: str, name: str, kind: str) -> bool:
  if pattern.startswith(BY_KIND):
    return kind == pattern.removeprefix(BY_KIND)
  return re.fullmatch(pattern, name) is not None


def keep(tree: Mapping, chosen: Iterable[str], path: str = '') -> dict:
  """The part of nested dicts that has these names; dicts that are left empty go."""
  chosen = frozenset(chosen)
  kept = {}
  for key, value in tree.items():
    name = f'{path}{key}'
    if isinstance(value, Mapping):
      value = keep(value, chosen, name + '/')
      if value:
        kept[key] = value
    elif name in chosen:
      kept[key] = value
  return kept


def without(tree: Mapping, frozen: frozenset[str]) -> dict:
  """Nested dicts without these names; the tree itself where there are none."""
  return keep(tree, frozenset(names(tree)) - frozen) if frozen else tree


def joined(tree: Mapping, other: Mapping) -> dict:
  """Two nested dicts as one."""
  result = dict(tree)
  for key, value in other.items():
    result[key] = joined(result.get(key, {}), value) if isinstance(value, Mapping) else value
  return result


def filled(tree: Mapping, given: Mapping[str, Mapping], path: str = '') -> dict:
  """Nested dicts with given values in place of their own (`starts.Checkpoint.load` makes them)."""
  result = {}
  for key, value in tree.items():
    name = f'{path}{key}'
    if isinstance(value, Mapping):
      result[key] = filled(value, given, name + '/')
    elif name in given:
      result[key] = _taken(value, **given[name])
    else:
      result[key] = value
  return result


def _taken(drawn: jax.Array, value: jax.Array, kept: jax.Array | None = None) -> jax.Array:
  return value if kept is None else jnp.where(kept, value, drawn)
