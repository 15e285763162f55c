"""Optimizers are optax's own, bound in gin (`Run.optimizer = @optax.lion`). This says what they must know.

optax sees parameters as nested dicts of arrays, which do not say what they are. `knowing` tells it: within the
optimizer's functions, `kinds_of` gives the kind of every parameter ('matrix', 'table', 'vector').
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
  """The same optimizer, whose masks may ask for the kinds of the parameters.

  Args:
    kinds: nested as the parameters are (`model.parameters.kinds`).
    optimizer: whose `init` and `update` then know them.
  """

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
  """The kind of every parameter in a tree that has all of the model's parameters or some.

  Raises:
    UserError: outside of an optimizer made by `knowing`.
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
  """The weight-decay mask: True for matrices and tables of vectors, False for norms, biases and decay rates."""
  return jax.tree.map(lambda kind: kind != 'vector', kinds_of(params))
