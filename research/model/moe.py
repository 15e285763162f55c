"""Mixtures of experts: the router, and the part around it and the experts."""

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

  scores = softmax(x W) or sigmoid(x W); the `active` best are chosen; their scores are the weights.

  Knobs:
    active: experts per token. 1 is Switch (Fedus et al. 2021, arXiv:2101.03961), 2 is Mixtral.
    scores: 'softmax', or 'sigmoid' (DeepSeek-V3, arXiv:2412.19437, equation 15).
    normalise: weights divided by their sum (Mixtral: the same as a softmax over the chosen logits).
    scale: of the weights, after that (DeepSeek's routed scaling factor).
    groups, active_groups: choose among the experts of the `active_groups` best of `groups` groups.
    group_top: a group is as good as the sum of its best so many (1 in DeepSeek-V2, 2 in V3).
    selection_bias: rate of a bias per expert that is added to its score when choosing, not when weighing. Its
      gradient is the rate times the sign of the expert's load above the mean (DeepSeek-V3, section 2.1.2:
      balance without an auxiliary loss); None for no such bias.
    balance: coefficient of experts x sum over experts of load x mean score, which is 1 at uniform
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
    if active > experts * active_groups // groups:
      raise Invalid(
        Router,
        'active',
        f'{active} is more than the {experts * active_groups // groups} to choose from.',
      )
    self.experts, self.active, self.scores = experts, active, scores
    self.normalise, self.scale, self.rate = normalise, scale, selection_bias
    self.groups, self.active_groups, self.group_top = groups, active_groups, group_top
    self.balance, self.z_loss = balance, z_loss
    self.kernel = param(
      rngs, (embed, experts), ('embed', None), functools.partial(normal, stddev=embed**-0.5),
      kind='matrix',
    )  # fmt: skip
    bias = lambda: param(rngs, (experts,), (None,), nnx.initializers.zeros, kind='vector')
    self.bias = bias() if selection_bias is not None else None

  def __call__(self, x: jax.Array, real: jax.Array | None):
    """x [batch, length, embed] and whether each token is real [batch, length] (None: all are).

    Returns:
      (weights, index), both [batch, length, active], and the penalties.
    """
    kernel = shard(self.kernel[...], None, None)
    here = spec('batch', 'length', None)
    logits = jnp.einsum(
      'ble,ex->blx', x.astype(jnp.float32), kernel, precision='highest', out_sharding=here
    )
    scores = SCORES[self.scores](logits)
    index = jax.lax.stop_gradient(self.choose(scores))
    weights = jnp.sum(jnp.where(_one_hot(index, self.experts), scores[:, :, None], 0.0), axis=-1)
    if self.normalise:
      weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return weights * self.scale, index, self.penalties(logits, scores, index, real)

  def choose(self, scores: jax.Array) -> jax.Array:
    """The experts [batch, length, active] that the scores [batch, length, experts] choose."""
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
    count = logits.shape[0] * logits.shape[1]
    weight = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    count = count if real is None else jnp.maximum(jnp.sum(weight), 1.0)
    mean = lambda y: jnp.sum(y * weight[..., None], axis=(0, 1)) / count
    load = mean(jnp.sum(_one_hot(index, self.experts), axis=2)) / self.active
    penalties = {}
    if self.balance:
      share = scores / jnp.sum(scores, axis=-1, keepdims=True)
      penalties['load_balance'] = self.balance * self.experts * jnp.sum(load * mean(share))
    if self.z_loss:
      z = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
      penalties['router_z'] = self.z_loss * jnp.sum(mean(z * z))
    if self.bias is not None:
      # A penalty of value zero, whose gradient is the update that the paper makes by hand.
      push = jnp.sum(self.bias[...] * jnp.sign(load - 1 / self.experts))
      penalties['selection_bias'] = self.rate * (push - jax.lax.stop_gradient(push))
    return penalties


def _one_hot(index: jax.Array, n: int) -> jax.Array:
  return index[..., None] == jnp.arange(n, dtype=index.dtype)


class MoE(nnx.Module):
  """Mixture of experts in place of an MLP (Shazeer et al. 2017, arXiv:1701.06538).

  y = sum over the chosen experts of weight x expert(x), + shared(x). Padding goes to no expert.

  Knobs:
    experts, mlp, activations: as many MLPs of this width (see `layers.Mlp`).
    router: `Router`, which also says how many are active.
    capacity: None is dropless. Else an expert takes at most capacity x its fair share of every sequence, the
      earlier tokens first: no token's place depends on a later one, but one packed document's may on another.
    places: instead, how many tokens of every sequence an expert takes at most, whatever the length (Switch as
      transformers has it).
    shared: an MLP that every token goes through (DeepSeek-V2, Qwen 2 MoE).
    shared_gate: the shared MLP is weighed by sigmoid(x w) (Qwen 2 MoE).
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
    """Nothing beyond its parameters, which say themselves what fraction a token uses."""
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
