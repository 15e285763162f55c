"""Maximal update parametrisation: hyper-parameters found at one width serve every width.

Yang et al. 2022 (Tensor Programs V, arXiv:2203.03466), table 3, for Adam. Our matrices start with variance
1/fan_in and token vectors with a variance of their own at every width, as the table asks. What is left are the
rates of matrices and the head's start. `base` is the width at which nothing changes.
"""

import jax
import jax.numpy as jnp
import optax

from research.training.optimizers import kinds_of


def mup(learning_rate, *, inner, width: int, base: int) -> optax.GradientTransformation:
  """An optimizer of Adam's kind with every matrix's rate times base / width; tables and vectors keep theirs.

  Args:
    learning_rate: schedule at the base width.
    inner: `inner(learning_rate=...)` makes the optimizer; decoupled weight decay is scaled with the rate.
    width: of the residual stream, to which every matrix's fan_in is proportional.
    base: the width at which the learning rate was found.
  """

  def update(updates, state, params=None):
    scaled = lambda update, kind: update * (base / width) if kind == 'matrix' else update
    return jax.tree.map(scaled, updates, kinds_of(updates)), state

  rates = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
  return optax.chain(inner(learning_rate=learning_rate), rates)


def head_init(key, shape, dtype=jnp.float32, out_sharding=None, *, base: int) -> jax.Array:
  """An initializer of an untied head [embed, vocab]: standard deviation sqrt(base) / embed.

  At the base width that is the usual embed^-1/2; the logits of wider models start smaller.
  """
  draw = jax.nn.initializers.normal(base**0.5 / shape[0])
  return draw(key, shape, dtype, out_sharding=out_sharding)
