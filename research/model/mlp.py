"""The multilayer perceptron, plain or gated."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from research.model.layers import Linear
from research.model.parameters import check_sizes
from research.model.part import Context, Cost, Factory


class Mlp(nnx.Module):
  """output(product of activation_i(input_i(x))): `(gelu,)` is plain, `(silu, identity)` is gated (SwiGLU).

  Gating is from Shazeer 2020, arXiv:2002.05202.

  Knobs:
    mlp: the inner width.
    activations: one for each input projection; the results are multiplied.
    bias: the projections have biases.
  """

  def __init__(
    self,
    embed: int,
    *,
    mlp: int,
    activations: Sequence[Callable[[jax.Array], jax.Array]],
    bias: bool = False,
    linear: Factory = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(Mlp, mlp=mlp)
    self.activations = tuple(activations)
    self.inputs = nnx.List(
      [linear({'embed': embed}, {'mlp': mlp}, bias=bias, rngs=rngs) for _ in self.activations]
    )
    self.output = linear({'mlp': mlp}, {'embed': embed}, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context):
    hidden = (f(linear(x)) for f, linear in zip(self.activations, self.inputs, strict=True))
    return self.output(functools.reduce(jnp.multiply, hidden)), {}

  def cost(self, length: int, encoder_length: int) -> Cost:
    return Cost()
