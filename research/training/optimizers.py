"""Tells optimizers the kinds of the parameters. The optimizers are optax's, bound in gin (`@optax.lion`).

optax sees parameters as nested dicts of arrays, which do not say what they are. Within the functions of an
optimizer that `knowing` wraps, `kinds_of` returns the kind of every parameter: 'matrix', 'table' or 'vector'.
"""

import contextvars
from collections.abc import Mapping

import jax
import optax

from research.core.errors import UserError

_kinds: contextvars.ContextVar[Mapping | None] = contextvars.ContextVar('kinds', default=None)


def knowing(
  kinds: Mapping, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Returns the same optimizer, whose masks may call `kinds_of`.

  Args:
    kinds: nested as the parameters are (`model.parameters.kinds`).
    optimizer: any optax transformation.
  """

  # A context variable, since optax passes masks nothing but the parameters.
  def within(function):
    def call(*args, **options):
      token = _kinds.set(kinds)
      try:
        return function(*args, **options)
      finally:
        _kinds.reset(token)

    return call

  return optax.GradientTransformationExtraArgs(within(optimizer.init), within(optimizer.update))


def kinds_of(params) -> dict:
  """Returns the kind of every parameter in a tree of all or some of the model's parameters.

  Raises:
    UserError: called outside of an optimizer that `knowing` wrapped.
  """
  known = _kinds.get()
  if known is None:
    raise UserError(
      'the kinds of the parameters are known only to the optimizer of a run; '
      'wrap it in optimizers.knowing(parameters.kinds(model), optimizer).'
    )

  def kind(path, _):
    node = known
    for key in path:
      node = node[key.key]
    return node

  return jax.tree.map_with_path(kind, params)


def matrices(params) -> dict:
  """Returns the mask of weight decay: True for matrices and tables, False for norms, biases, decay rates."""
  return jax.tree.map(lambda kind: kind != 'vector', kinds_of(params))
