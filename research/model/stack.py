"""Stacks of layers: repetition, rematerialisation, and pipelines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from research.core.errors import Invalid, did_you_mean
from research.model.parameters import check_sizes
from research.model.part import Context, Cost, Factory, cost_of
from research.model.pipeline import over_stages, pipelined, schedule_of
from research.model.residual import add_penalties
from research.parallel.axes import axes_of, spec_of

# What the backward pass has stored of the forward pass of a layer. It computes everything else again.
_LAYER_INPUT = 'layer_input'
REMAT = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT],
    offload_src='device', offload_dst='pinned_host',
  ),
}  # fmt: skip


class Stack(nnx.Module):
  """The same `parts`, `repeats` times in sequence, with stacked parameters [layers, ...].

  `parts = (Attention, Mlp)` is a decoder layer, `((Attention, Mlp),)` puts the two side by side, and
  `(Attention, CrossAttention, Mlp)` is T5's decoder. A longer tuple is a period of several layers.

  Knobs:
    residual: the wiring (`PreNorm`, `PostNorm`, ...).
    repeats: how often the parts are repeated.
    norm: a norm after the last layer.
    bias: makes a position bias that all layers share (`positions.ALiBi`).
    scan: compiles one layer and loops over it, which compiles fast at any depth. Without it all layers are
      unrolled, which runs faster in a small model. The parameters are the same.
    remat: what the backward pass computes again: 'none' nothing, 'full' everything, 'dots' everything but
      matrix products, 'offload' everything, from layer inputs that are stored in the host's memory.
    remat_layers: of so many consecutive layers only the input of the first is stored (Chen et al. 2016,
      arXiv:1604.06174). With more than 1 the backward pass begins with another forward pass. It divides the
      layers (of a block of a pipeline), and needs `scan` and `remat = 'full'`.
  """

  def __init__(
    self,
    embed: int,
    *,
    parts: tuple,
    residual: Factory,
    repeats: int,
    norm: Factory | None = None,
    bias: Factory | None = None,
    scan: bool = True,
    remat: str = 'full',
    remat_layers: int = 1,
    rngs: nnx.Rngs,
  ):
    check_sizes(Stack, repeats=repeats, remat_layers=remat_layers)
    if remat not in REMAT:
      raise Invalid(Stack, 'remat', f'there is no policy {remat!r}.{did_you_mean(remat, REMAT)}')
    if remat_layers > 1 and not (scan and remat == 'full'):
      why = f"{remat_layers} needs Stack.scan = True and Stack.remat = 'full'."
      raise Invalid(Stack, 'remat_layers', why)
    if repeats % remat_layers:
      why = f'{remat_layers} does not divide the {repeats} layers.'
      raise Invalid(Stack, 'remat_layers', why)
    self.repeats = repeats
    self.scan = scan
    self.remat = remat
    self.remat_layers = remat_layers

    def build(key, part):
      parts = part if isinstance(part, tuple | list) else (part,)
      return residual(embed, tuple(parts), rngs=nnx.Rngs(params=key))

    def repeated(part):
      keys = jax.random.split(rngs.params(), repeats)
      layers = jax.vmap(functools.partial(build, part=part))(keys)
      return jax.tree.map(over_stages, layers)

    self.sublayers = nnx.List([repeated(part) for part in parts])
    self.layers = None  # see `separate_layers`
    self.norm = norm(embed, rngs=rngs) if norm else None
    self.bias = bias(rngs=rngs) if bias else None

  def __call__(self, x: jax.Array, context: Context):
    if self.bias is not None:
      context = dataclasses.replace(context, bias=self.bias(context.reach(x.shape[1])))

    if context.state is not None:
      x = self.decode(x, context)
      return (self.norm(x) if self.norm is not None else x), {}
    schedule = schedule_of(self.repeats)
    if schedule is None:
      x, penalties = self.run(x, self.sublayers, context)
    else:
      x, penalties = pipelined(schedule, self.run, self.sublayers, x, context)
    return (self.norm(x) if self.norm is not None else x), penalties

  def decode(self, x: jax.Array, context: Context) -> jax.Array:
    """Returns x after these layers in decoding: each layer has its own state. There is no backward pass."""

    def layer(x, sublayers, state):
      of_layer = dataclasses.replace(context, state=state)
      for sublayer in sublayers:
        x, _ = sublayer(x, of_layer)
      return x

    if self.scan and self.layers is None:
      return context.state.through_layers(layer, x, self.sublayers)
    for sublayers in self.layers or _unstack(self.sublayers):
      x = layer(x, sublayers, context.state)
    return x

  def cost(self, length: int, encoder_length: int) -> Cost:
    """The cost of one layer, without the axis of its stacked parameters, times `repeats`."""
    if self.layers is not None:
      layer = self.layers[0]
    else:
      layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self.sublayers)
    costs = [cost_of(sublayer, length, encoder_length) for sublayer in layer]
    return sum(costs, Cost()).times(self.repeats)

  def run(self, x: jax.Array, stacked, context: Context):
    """Returns x after these layers (all or some of the stack), and their penalties."""

    def layer(x, sublayers):
      penalties = []
      x = checkpoint_name(x, _LAYER_INPUT)
      for sublayer in sublayers:
        x, penalty = sublayer(x, context)
        penalties.append(penalty)
      return x, add_penalties(*penalties)

    # In a loop XLA cannot merge the recomputation with the forward pass, so it needs no barrier against that.
    if self.remat != 'none':
      layer = jax.checkpoint(layer, policy=REMAT[self.remat], prevent_cse=not self.scan)
    if self.scan and self.layers is None:
      if self.remat_layers > 1:
        layer, stacked = self.in_groups(layer, stacked)
      x, penalties = jax.lax.scan(layer, x, stacked)
      return x, jax.tree.map(jnp.sum, penalties)
    penalties = {}
    for sublayers in self.layers or _unstack(stacked):
      x, penalty = layer(x, sublayers)
      penalties = add_penalties(penalties, penalty)
    return x, penalties

  def in_groups(self, layer, stacked):
    """Returns a function of `remat_layers` layers that stores only their input, and the parameters for it."""
    n = jax.tree.leaves(stacked)[0].shape[0]
    if n % self.remat_layers:
      why = f'{self.remat_layers} does not divide the {n} layers of a block of the pipeline.'
      raise Invalid(Stack, 'remat_layers', why)

    def group(x, layers):
      x, penalties = jax.lax.scan(layer, x, layers)
      return x, jax.tree.map(jnp.sum, penalties)

    def grouped(w):
      where = spec_of(w)
      where = None if where is None else jax.P(None, *axes_of(w))
      return w.reshape(-1, self.remat_layers, *w.shape[1:], out_sharding=where)

    group = jax.checkpoint(group, policy=REMAT['full'], prevent_cse=False)
    return group, jax.tree.map(grouped, stacked)


class Stacks(nnx.Module):
  """Stacks in sequence, for models whose layers differ.

  DeepSeek-V2 begins with a dense layer, and Gemma 3 1B ends within a period.
  """

  def __init__(
    self, embed: int, *, stacks: tuple[Factory, ...], norm: Factory | None = None, rngs: nnx.Rngs
  ):
    self.stacks = nnx.List([stack(embed, rngs=rngs) for stack in stacks])
    self.norm = norm(embed, rngs=rngs) if norm else None

  def cost(self, length: int, encoder_length: int) -> Cost:
    costs = [cost_of(stack, length, encoder_length) for stack in self.stacks]
    return sum(costs, Cost())

  def __call__(self, x: jax.Array, context: Context):
    penalties = []
    for stack in self.stacks:
      x, penalty = stack(x, context)
      penalties.append(penalty)
    return (self.norm(x) if self.norm is not None else x), add_penalties(*penalties)


def separate_layers(module: nnx.Module) -> None:
  """Replaces the stacked parameters of every stack in a module by separate ones for every layer.

  A program that slices stacked parameters copies them. In training that costs little beside the products of a
  batch. A decoding step reads every parameter once, so a copy would double its time. Call this outside of the
  step.
  """
  if isinstance(module, Stack) and module.layers is None:
    layers = [nnx.List(list(layer)) for layer in _unstack(module.sublayers)]
    module.layers = nnx.data(nnx.List(layers))
    module.sublayers = nnx.List([])
  for _, child in nnx.iter_children(module):
    if isinstance(child, nnx.Pytree):
      separate_layers(child)


def place_of(path: tuple) -> tuple[tuple, int | None]:
  """The path among stacked parameters, and the layer (or None), of a path into a module of separate layers."""
  if 'layers' not in path:
    return path, None
  cut = path.index('layers')
  return (*path[:cut], 'sublayers', *path[cut + 2 :]), path[cut + 1]


def _unstack(tree) -> list:
  """Splits a tree of arrays into one tree per index of the first axis."""
  leaves, treedef = jax.tree.flatten(tree)
  n = leaves[0].shape[0]
  # One `split` per array, since its gradient is a single concatenation; that of n slices would be n additions.
  slices = [[s[0] for s in jax.lax.split(leaf, (1,) * n)] for leaf in leaves]
  return [jax.tree.unflatten(treedef, layer) for layer in zip(*slices, strict=True)]
