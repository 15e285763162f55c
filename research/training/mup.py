"""Maximal update parametrisation: hyper-parameters found at one width serve every width.

Yang et al. 2022 (Tensor Programs V, arXiv:2203.03466), table 3, for Adam. Our matrices start with variance
1/fan_in, and token vectors with the same variance at every width, as the table demands. This module adds the
other two rules: the learning rates of matrices, and the initial scale of the head. At the width `base` nothing
changes.
"""

import jax
import jax.numpy as jnp
import optax

from research.training.optimizers import kinds_of


def mup(learning_rate, *, inner, width: int, base: int) -> optax.GradientTransformation:
  """Multiplies the learning rate of every matrix by base / width; tables and vectors keep theirs.

  Args:
    learning_rate: schedule at the base width.
    inner: `inner(learning_rate=...)` makes an optimizer of Adam's kind. Decoupled weight decay is scaled with
      the rate.
    width: the width of the residual stream, to which every matrix's fan_in is proportional.
    base: the width at which the learning rate was tuned.
  """

  def scaled(update, kind):
    return update * (base / width) if kind == 'matrix' else update

  def init(params):
    return optax.EmptyState()

  def update(updates, state, params=None):
    return jax.tree.map(scaled, updates, kinds_of(updates)), state

  # Behind the optimizer: Adam divides by the gradient's scale, so a factor on the gradient would be lost.
  rates = optax.GradientTransformation(init, update)
  return optax.chain(inner(learning_rate=learning_rate), rates)


def head_init(key, shape, dtype=jnp.float32, out_sharding=None, *, base: int) -> jax.Array:
  """Draws an untied head [embed, vocab] with standard deviation sqrt(base) / embed.

  At the base width that is the usual embed^-1/2. The logits of wider models start smaller.
  """
  draw = jax.nn.initializers.normal(base**0.5 / shape[0])
  return draw(key, shape, dtype, out_sharding=out_sharding)
