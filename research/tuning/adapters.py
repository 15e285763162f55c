"""Bottleneck adapters: small networks inside a trained model. They learn, and the model stays as it is."""

from collections.abc import Callable

import jax
from flax import nnx

from research.model.layers import Linear
from research.model.parameters import check_sizes
from research.model.part import Context, Cost, Factory, call_part, cost_of
from research.model.weights import plain


class Adapter(nnx.Module):
  """up(activation(down(x))). It starts at zero, because `up` does.

  As a part beside another, `((Attention, Adapter), (Mlp, Adapter))`, it is the parallel adapter of He et al.
  2022 (arXiv:2110.04366, section 3.3), which takes a `scale` of 4.

  Knobs:
    bottleneck: the width between the two matrices.
    activation: applied between them.
    scale: the factor of the result.
  """

  def __init__(
    self,
    embed: int,
    *,
    bottleneck: int,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.gelu,
    scale: float = 1.0,
    rngs: nnx.Rngs,
  ):
    check_sizes(Adapter, bottleneck=bottleneck)
    self.activation = activation
    self.scale = scale
    # An adapter's matrices learn in full, so the model's choice of `weight` (LoRA, few bits) is not theirs.
    knobs = {'bias': True, 'weight': plain, 'rngs': rngs}
    self.down = Linear({'embed': embed}, {'mlp': bottleneck}, **knobs)
    self.up = Linear({'mlp': bottleneck}, {'embed': embed}, init=nnx.initializers.zeros, **knobs)

  def __call__(self, x: jax.Array, context: Context):
    return self.scale * self.up(self.activation(self.down(x))), {}

  def cost(self, length: int, encoder_length: int) -> Cost:
    return Cost()


class After(nnx.Module):
  """y + adapter(y) of a part's y (Houlsby et al. 2019, arXiv:1902.00751, figure 2).

  `Stack.parts = (@attention/adapters.After, @mlp/adapters.After)` has one after each part; only the second is
  Pfeiffer's (Pfeiffer et al. 2021, arXiv:2005.00247).

  Knobs:
    base: makes the part.
    adapter: makes the `Adapter`.
  """

  def __init__(self, embed: int, *, base: Factory, adapter: Factory, rngs: nnx.Rngs):
    self.base = base(embed, rngs=rngs)
    self.adapter = adapter(embed, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context):
    y, penalties = call_part(self.base, x, context)
    change, _ = self.adapter(y, context)
    return y + change, penalties

  def cost(self, length: int, encoder_length: int) -> Cost:
    return cost_of(self.base, length, encoder_length) + cost_of(
      self.adapter, length, encoder_length
    )
