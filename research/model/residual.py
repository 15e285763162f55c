"""Wirings: how the outputs of parts are added to the residual stream, and where the norms are."""

import jax
from flax import nnx

from research.model.part import Context, Cost, Factory, call_part, check_part, cost_of


def add_penalties(*penalties: dict) -> dict:
  """Adds up penalties by name."""
  names = dict.fromkeys(name for p in penalties for name in p)
  return {name: sum(p[name] for p in penalties if name in p) for name in names}


class SideBySide(nnx.Module):
  """Base class of wirings: `parts` side by side on one stream. Their costs add up."""

  parts: nnx.List

  def cost(self, length: int, encoder_length: int) -> Cost:
    costs = [cost_of(part, length, encoder_length) for part in self.parts]
    return sum(costs, Cost())


class Residual(SideBySide):
  """A wiring with one norm; subclasses place it before or after the parts."""

  def __init__(self, embed: int, parts: tuple[Factory, ...], *, norm: Factory, rngs: nnx.Rngs):
    self.norm = norm(embed, rngs=rngs)
    self.parts = nnx.List([check_part(part(embed, rngs=rngs)) for part in parts])

  def sum_of_parts(self, x, context):
    """Returns the sum of the parts' outputs for x, and their penalties."""
    ys, penalties = zip(*(call_part(part, x, context) for part in self.parts), strict=True)
    return sum(ys), add_penalties(*penalties)


class PreNorm(Residual):
  """x + sum of part(norm(x)): GPT-2 and later models. With several parts, PaLM's parallel layer."""

  def __call__(self, x: jax.Array, context: Context):
    y, penalties = self.sum_of_parts(self.norm(x), context)
    return x + y, penalties


class PostNorm(Residual):
  """norm(x + sum of part(x)): the original transformer and BERT."""

  def __call__(self, x: jax.Array, context: Context):
    y, penalties = self.sum_of_parts(x, context)
    return self.norm(x + y), penalties


class PreNormEach(SideBySide):
  """x + sum of part_i(norm_i(x)): parts side by side, each after its own norm (GPT-NeoX, Falcon-40B)."""

  def __init__(self, embed: int, parts: tuple[Factory, ...], *, norm: Factory, rngs: nnx.Rngs):
    self.parts = nnx.List([check_part(part(embed, rngs=rngs)) for part in parts])
    self.norms = nnx.List([norm(embed, rngs=rngs) for _ in parts])

  def __call__(self, x: jax.Array, context: Context):
    pairs = zip(self.parts, self.norms, strict=True)
    results = (call_part(part, norm(x), context) for part, norm in pairs)
    ys, penalties = zip(*results, strict=True)
    return x + sum(ys), add_penalties(*penalties)


class NormAfter(Residual):
  """x + norm(sum of part(x)): OLMo 2's reordered norm (arXiv:2501.00656, section 3.2)."""

  def __call__(self, x: jax.Array, context: Context):
    y, penalties = self.sum_of_parts(x, context)
    return x + self.norm(y), penalties


class SandwichNorm(Residual):
  """x + norm_after(sum of part(norm(x))): Gemma 2 and 3, GLM-4-0414 (Ding et al. 2021, arXiv:2105.13290)."""

  def __init__(self, embed: int, parts: tuple[Factory, ...], *, norm: Factory, rngs: nnx.Rngs):
    super().__init__(embed, parts, norm=norm, rngs=rngs)
    self.norm_after = norm(embed, rngs=rngs)

  def __call__(self, x: jax.Array, context: Context):
    y, penalties = self.sum_of_parts(self.norm(x), context)
    return x + self.norm_after(y), penalties
