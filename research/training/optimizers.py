"""Optimizers are optax's own, bound in gin (`Run.optimizer = @optax.lion`); here is what they need of us."""

import jax


def matrices(params) -> dict:
  """The weight-decay mask: True for kernels and tables, False for scales and biases.

  By name and not by rank: in a stack every parameter has a leading axis of layers.
  """

  def decays(path, _):
    return path[-1].key not in ('scale', 'bias', 'decay_rate', 'skip')

  return jax.tree.map_with_path(decays, params)
