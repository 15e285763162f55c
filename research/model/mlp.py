"""The multilayer perceptron, plain or gated."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.core.errors import Invalid
from research.model.layers import Linear
from research.model.parameters import check_sizes
from research.model.part import Context, Cost, Factory
from research.parallel.axes import shard


class Mlp(nnx.Module):
  """output(product of activation_i(input_i(x))): `(gelu,)` is plain, `(silu, identity)` is gated (SwiGLU).

  Gating is from Shazeer 2020, arXiv:2002.05202.

  Knobs:
    mlp: the inner width.
    activations: one for each input projection; the results are multiplied.
    bias: the projections have biases.
    nested: fractions of the units. In training, one row of a batch after the other uses the first so many units
      alone, so that these are a smaller model of their own (MatFormer, Devvrit et al. 2023, arXiv:2310.07707).
      Everywhere else all units are used. Empty for a plain MLP.
  """

  same_input = ('inputs',)

  def __init__(
    self,
    embed: int,
    *,
    mlp: int,
    activations: Sequence[Callable[[jax.Array], jax.Array]],
    bias: bool = False,
    nested: Sequence[float] = (),
    linear: Factory = Linear,
    rngs: nnx.Rngs,
  ):
    check_sizes(Mlp, mlp=mlp)
    self.activations = tuple(activations)
    self.nested = _widths(nested, mlp)
    self.inputs = nnx.List(
      [linear({'embed': embed}, {'mlp': mlp}, bias=bias, rngs=rngs) for _ in self.activations]
    )
    self.output = linear({'mlp': mlp}, {'embed': embed}, bias=bias, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context):
    each = (f(linear(x)) for f, linear in zip(self.activations, self.inputs, strict=True))
    hidden = functools.reduce(jnp.multiply, each)
    if self.nested and context.turns is not None:
      hidden = hidden * self._used(context.turns, hidden)
    return self.output(hidden), {}

  def _used(self, turns: jax.Array, hidden: jax.Array) -> jax.Array:
    """1 for the units that a row uses, 0 for the others: [batch, 1, mlp]."""
    # Each width where it is the row's turn, summed: to take them by index would gather over a split batch.
    turn = turns % len(self.nested)
    width = sum((turn == k) * np.int32(width) for k, width in enumerate(self.nested))
    unit = shard(jnp.arange(hidden.shape[-1], dtype=jnp.int32)[None, None], None, None, 'mlp')
    return (unit < width[:, None, None]).astype(hidden.dtype)

  def cost(self, length: int, encoder_length: int) -> Cost:
    return Cost()


def _widths(nested: Sequence[float], mlp: int) -> tuple[int, ...]:
  """How many units each nested model has.

  Raises:
    Invalid: the fractions do not rise to 1, or one is no whole number of units.
  """
  if not nested:
    return ()
  widths = [fraction * mlp for fraction in nested]
  rising = all(a < b for a, b in zip([0, *nested], nested, strict=False))
  if not rising or nested[-1] != 1:
    raise Invalid(
      Mlp, 'nested', f'{nested!r} must rise from above 0 to 1, such as (0.25, 0.5, 1.0).'
    )
  if any(abs(width - round(width)) > 1e-6 for width in widths):
    raise Invalid(Mlp, 'nested', f'{nested!r} of {mlp} units are not all whole numbers of units.')
  return tuple(round(width) for width in widths)
