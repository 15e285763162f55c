"""Mixtures of experts: the router, and the part that routes tokens to experts."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid, did_you_mean
from research.model.experts import Experts
from research.model.parameters import check_sizes, normal, param
from research.model.part import Context, Cost, Factory, cost_of
from research.parallel.axes import shard, spec

SCORES = {'softmax': jax.nn.softmax, 'sigmoid': jax.nn.sigmoid}


class Router(nnx.Module):
  """Chooses the experts of every token, and their weights, in float32.

  scores = softmax(x W) or sigmoid(x W). The `active` experts with the highest scores are chosen, and their
  scores are the weights.

  Knobs:
    active: experts per token. 1 is Switch (Fedus et al. 2021, arXiv:2101.03961), 2 is Mixtral.
    scores: 'softmax', or 'sigmoid' (DeepSeek-V3, arXiv:2412.19437, equation 15).
    normalise: divides the weights by their sum (Mixtral: the same as a softmax over the chosen logits).
    scale: factor of the weights, after that (DeepSeek's routed scaling factor).
    groups, active_groups: only experts of the `active_groups` best of `groups` groups can be chosen.
    group_top: the score of a group is the sum of its highest `group_top` scores (1 in DeepSeek-V2, 2 in V3).
    selection_bias: the rate of a bias per expert that is added to scores for the choice, not for the weights.
      Its gradient is the rate times the sign of the expert's load above the mean (DeepSeek-V3, section 2.1.2:
      balance without an auxiliary loss); None for no such bias.
    balance: coefficient of experts x sum over experts of load x mean score, which is 1 for uniform routing
      (Switch, equation 4).
    z_loss: coefficient of the mean squared logsumexp of the logits (Zoph et al. 2022, arXiv:2202.08906).
  """

  def __init__(
    self,
    embed: int,
    experts: int,
    *,
    active: int,
    scores: str = 'softmax',
    normalise: bool = True,
    scale: float = 1.0,
    groups: int = 1,
    active_groups: int = 1,
    group_top: int = 1,
    selection_bias: float | None = None,
    balance: float = 0.01,
    z_loss: float = 0.001,
    rngs: nnx.Rngs,
  ):
    check_sizes(Router, active=active, groups=groups, active_groups=active_groups)
    if scores not in SCORES:
      raise Invalid(Router, 'scores', f'no scores {scores!r}.{did_you_mean(scores, SCORES)}')
    if experts % groups:
      raise Invalid(Router, 'groups', f'{groups} groups do not divide the {experts} experts.')
    if active_groups > groups:
      raise Invalid(Router, 'active_groups', f'{active_groups} of {groups} groups is too many.')
    choices = experts * active_groups // groups
    if active > choices:
      raise Invalid(Router, 'active', f'{active} is more than the {choices} to choose from.')
    self.experts = experts
    self.active = active
    self.scores = scores
    self.normalise = normalise
    self.scale = scale
    self.rate = selection_bias
    self.groups = groups
    self.active_groups = active_groups
    self.group_top = group_top
    self.balance = balance
    self.z_loss = z_loss
    init = functools.partial(normal, stddev=embed**-0.5)
    self.kernel = param(rngs, (embed, experts), ('embed', None), init, kind='matrix')
    bias = None
    if selection_bias is not None:
      bias = param(rngs, (experts,), (None,), nnx.initializers.zeros, kind='vector')
    self.bias = bias  # assigned once: NNX decides then whether an attribute has parameters

  def __call__(self, x: jax.Array, real: jax.Array | None):
    """Chooses experts.

    Args:
      x: [batch, length, embed].
      real: [batch, length] bool, False for padding; None if no token is padding.

    Returns:
      (weights, index), both [batch, length, active], and the penalties by name.
    """
    kernel = shard(self.kernel[...], None, None)
    sharding = spec('batch', 'length', None)
    # At full precision: rounding could change which experts are chosen.
    logits = jnp.einsum(
      'ble,ex->blx', x.astype(jnp.float32), kernel, precision='highest', out_sharding=sharding
    )
    scores = SCORES[self.scores](logits)
    index = jax.lax.stop_gradient(self.choose(scores))
    weights = jnp.sum(jnp.where(_one_hot(index, self.experts), scores[:, :, None], 0.0), axis=-1)
    if self.normalise:
      weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * self.scale, index, self.penalties(logits, scores, index, real)

  def choose(self, scores: jax.Array) -> jax.Array:
    """Returns the chosen experts [batch, length, active], by scores [batch, length, experts]."""
    if self.bias is not None:
      scores = scores + self.bias[...]
    if self.groups > 1:
      shape = (*scores.shape[:2], self.groups, self.experts // self.groups)
      grouped = scores.reshape(shape)
      best = jnp.sum(jax.lax.top_k(grouped, self.group_top)[0], axis=-1)
      chosen = _one_hot(jax.lax.top_k(best, self.active_groups)[1], self.groups).any(axis=2)
      scores = jnp.where(chosen[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, self.active)[1]

  def penalties(self, logits, scores, index, real) -> dict[str, jax.Array]:
    """Returns the terms that training adds to the loss, by name: means over tokens that are not padding."""
    count = logits.shape[0] * logits.shape[1]
    weight = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    count = count if real is None else jnp.maximum(jnp.sum(weight), 1.0)

    def mean(y):
      return jnp.sum(y * weight[..., None], axis=(0, 1)) / count

    load = mean(jnp.sum(_one_hot(index, self.experts), axis=2)) / self.active
    penalties = {}
    if self.balance:
      share = scores / jnp.sum(scores, axis=-1, keepdims=True)
      penalties['load_balance'] = self.balance * self.experts * jnp.sum(load * mean(share))
    if self.z_loss:
      z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
      penalties['router_z'] = self.z_loss * jnp.sum(mean(z * z))
    if self.bias is not None:
      # The value of this penalty is zero, and its gradient is the update that the paper does outside of the
      # loss.
      push = jnp.sum(self.bias[...] * jnp.sign(load - 1 / self.experts))
      penalties['selection_bias'] = self.rate * (push - jax.lax.stop_gradient(push))
    return penalties


def _one_hot(index: jax.Array, n: int) -> jax.Array:
  return index[..., None] == jnp.arange(n, dtype=index.dtype)


class MoE(nnx.Module):
  """Mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538).

  y = sum over the chosen experts of weight x expert(x), + shared(x). Padding goes to no expert.

  Knobs:
    experts, mlp, activations: the number of MLPs, their width and their activations (see `mlp.Mlp`).
    router: makes the `Router`, which also defines how many experts are active.
    capacity: None is dropless. Otherwise an expert takes at most capacity x its fair share of every sequence,
      earlier tokens first. No token's place depends on a later token, but that of a packed document may depend
      on another document.
    places: instead of a capacity, the most tokens of every sequence that an expert takes, whatever the length
      (Switch in transformers).
    shared: makes an MLP that every token goes through (DeepSeek-V2, Qwen 2 MoE).
    shared_gate: multiplies the output of the shared MLP by sigmoid(x w) (Qwen 2 MoE).
    weight: makes the experts' matrices (see `weights`); None is the model's choice.
  """

  def __init__(
    self,
    embed: int,
    *,
    experts: int,
    mlp: int,
    activations: Sequence[Callable[[jax.Array], jax.Array]],
    router: Factory,
    capacity: float | None = None,
    places: int | None = None,
    shared: Factory | None = None,
    shared_gate: bool = False,
    weight: Factory | None = None,
    rngs: nnx.Rngs,
  ):
    check_sizes(MoE, experts=experts, mlp=mlp, places=places)
    if capacity is not None and capacity <= 0:
      raise Invalid(
        MoE, 'capacity', f'{capacity!r} is not a positive number (or None for dropless).'
      )
    if shared_gate and shared is None:
      raise Invalid(MoE, 'shared_gate', 'there is no shared MLP to gate; set MoE.shared.')
    self.router = router(embed, experts, rngs=rngs)
    self.experts = Experts(
      embed, experts, active=self.router.active, mlp=mlp, activations=activations, capacity=capacity,
      places=places, weight=weight, rngs=rngs,
    )  # fmt: skip
    self.shared = shared(embed, rngs=rngs) if shared else None
    init = functools.partial(normal, stddev=embed**-0.5)
    self.shared_gate = param(rngs, (embed,), (None,), init, kind='vector') if shared_gate else None

  def cost(self, length: int, encoder_length: int) -> Cost:
    """Nothing beyond its parameters. Their metadata have the fraction that a token uses."""
    return cost_of(self.shared, length, encoder_length) if self.shared is not None else Cost()

  def __call__(self, x: jax.Array, context: Context):
    real = None if context.segments is None else context.segments > 0
    weights, index, penalties = self.router(x, real)
    if real is not None:
      index = jnp.where(real[..., None], index, self.router.experts)
    y = self.experts(x, weights, index, dropless=context.state is not None)
    if self.shared is not None:
      shared, shared_penalties = self.shared(x, context)
      penalties = {**penalties, **shared_penalties}
      if self.shared_gate is not None:
        gate = jnp.sum(x.astype(jnp.float32) * self.shared_gate[...], axis=-1, keepdims=True)
        shared = shared * jax.nn.sigmoid(gate).astype(x.dtype)
      y = y + shared
    return y, penalties
