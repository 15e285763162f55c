"""Makes a smaller model of a trained one: it drops the layers, heads, MLP units and channels that matter least.

The smaller model is the same gin with smaller sizes. Parameters have named axes, so the sizes say what to drop,
in every family whose parts name their axes. Layers are dropped first, by the loss without them (`depth`), then
units, by their activations (`importance`).
"""

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from research.checkpoints.streamed import nested, write_params
from research.core.errors import UserError
from research.model.layers import Linear
from research.model.parameters import all_parameters
from research.model.stack import Stack
from research.model.weights import Weight
from research.tuning import depth, importance
from research.tuning.depth import Batches, Path

# Axes whose units can be dropped. 'kv_heads' follows 'heads'.
UNITS = ('mlp', 'heads')


@dataclasses.dataclass(frozen=True)
class Parameter:
  """A parameter of both models: the names of its axes, its shape now and in the smaller model."""

  axes: tuple[str | None, ...]
  old: tuple[int, ...]
  new: tuple[int, ...]

  @property
  def stacked(self) -> int:
    """How many leading axes number layers."""
    return self.axes.count('layers')

  def size(self, axis: str) -> tuple[int, int]:
    """The size of an axis, now and in the smaller model."""
    index = self.axes.index(axis)
    return self.old[index], self.new[index]

  def falls(self, axis: str) -> bool:
    """Whether the axis is shorter in the smaller model."""
    before, after = self.size(axis)
    return after < before


@dataclasses.dataclass
class Kept:
  """The layers, units and channels that stay.

  Attributes:
    layers: by the path of a stack, the layers in order.
    units: by (path of a part, axis), indices [units], or [layers, units] in a stack.
    channels: of the residual stream; None for all.
    losses: nats per token on the batches, before and after.
  """

  layers: dict[Path, list[int]]
  units: dict[tuple[Path, str], np.ndarray]
  channels: np.ndarray | None
  losses: tuple[float, float] | None = None

  def described(self) -> dict:
    """The same as values of JSON."""
    return {
      'layers': {_name(path): layers for path, layers in self.layers.items()},
      'units': {
        f'{_name(part)}/{axis}': index.tolist() for (part, axis), index in self.units.items()
      },
      'channels': None if self.channels is None else self.channels.tolist(),
      'losses': self.losses,
    }


def shrink(
  model: nnx.Module,
  smaller: nnx.Module,
  params: dict,
  batches: Batches,
  log: Callable[[str], None] = print,
) -> tuple[dict, Kept]:
  """The parameters of the smaller model, and what was kept.

  Args:
    model, smaller: language models, with shapes in place of arrays.
    params: the parameters of `model`, nested dicts of arrays.
    batches: batches on which importance is measured.
    log: called with a line for each layer that is dropped.

  Raises:
    UserError: the smaller model is larger in some size, or differs in more than layers, heads, units of MLPs
      and width.
  """
  _check_models(model, smaller)
  sizes = _sizes(model, smaller)
  _check_biases(model, sizes)
  linears = {path: module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}
  width = model.embedder.tokens.shape[-1], smaller.embedder.tokens.shape[-1]
  chosen = _what_is_chosen(linears, sizes)
  _check_choices(sizes, chosen, width)
  loss = depth.token_loss(model, batches)
  before = loss(params)
  params, layers = depth.fewer_layers(params, depth.depths(model), depth.depths(smaller), loss, log)
  kept = Kept(layers, {}, None)
  if chosen or width[0] != width[1]:
    measured = importance.measure(model, params, batches)
    _choose_units(chosen, sizes, measured, kept)
    if width[0] != width[1]:
      kept.channels = importance.largest(measured.channels, width[1])
    flat = {path: _slice(path, p, _at(params, path), kept) for path, p in sizes.items()}
    params = nested(flat)
  kept.losses = before, depth.token_loss(smaller, batches)(params)
  return params, kept


def _check_models(model: nnx.Module, smaller: nnx.Module) -> None:
  for module in (model, smaller):
    if tuple(getattr(module, 'inputs', ())) != ('decoder',):
      raise UserError('shrinking is for language models of one stack, not for encoder-decoders.')
    if any(isinstance(part, Weight) for _, part in nnx.iter_modules(module)):
      raise UserError(
        'this model has matrices that are made of several (LoRA): merge them first, by research.convert '
        '--to_hf and --from_hf.'
      )


def _sizes(model: nnx.Module, smaller: nnx.Module) -> dict[Path, Parameter]:
  """Every parameter of both models.

  Raises:
    UserError: they differ in more than sizes that can be made smaller.
  """
  old = dict(all_parameters(model))
  new = dict(all_parameters(smaller))
  if old.keys() != new.keys():
    path = min(old.keys() ^ new.keys(), key=str)
    raise UserError(
      f'{_name(path)} is a parameter of one of the models alone: the smaller one must differ in sizes only.'
    )
  sizes = {}
  for path, value in old.items():
    axes = ('layers',) * (len(value.shape) - len(value.axes)) + tuple(value.axes)
    both = Parameter(axes, value.shape, new[path].shape)
    for axis, before, after in zip(axes, both.old, both.new, strict=True):
      if after > before:
        raise UserError(
          f'{_name(path)} is {both.new}, larger than {both.old}: sizes may only fall.'
        )
      if after < before and axis not in ('layers', 'embed', 'kv_heads', None, *UNITS):
        raise UserError(
          f'{_name(path)} falls from {before} to {after} in {axis!r}: only layers, heads, units of MLPs and '
          'the width can be made smaller.'
        )
    sizes[path] = both
  return sizes


def _check_biases(model: nnx.Module, sizes: dict[Path, Parameter]) -> None:
  """A position bias has a slope for each head by its number (ALiBi): without some, the others' would change."""
  fewer = any(
    before != after
    for p in sizes.values()
    for axis, before, after in zip(p.axes, p.old, p.new, strict=True)
    if axis == 'heads'
  )
  biased = any(isinstance(m, Stack) and m.bias is not None for _, m in nnx.iter_modules(model))
  if fewer and biased:
    raise UserError(
      'the heads of this model have position biases of their own: leave their number as it is.'
    )


# Units.


def _what_is_chosen(linears: dict[Path, Linear], sizes: dict[Path, Parameter]) -> dict[Path, str]:
  """The linear layers whose inputs say which units of their part stay, and the axis of these units."""
  chosen = {}
  for path, linear in linears.items():
    axis = linear.inputs[0]
    if axis in UNITS and sizes[*path, 'kernel'].falls(axis):
      chosen[path] = axis
  return chosen


def _check_choices(sizes: dict[Path, Parameter], chosen: dict[Path, str], width: tuple) -> None:
  """Refuses a size that falls where nothing says which of its entries stay."""
  parts = {path[:-1]: axis for path, axis in chosen.items()}
  for path, parameter in sizes.items():
    axis_of_part = next((axis for part, axis in parts.items() if path[: len(part)] == part), None)
    goes_with = {'mlp': ('mlp',), 'heads': ('heads', 'kv_heads'), None: ()}[axis_of_part]
    for axis, before, after in zip(parameter.axes, parameter.old, parameter.new, strict=True):
      # Norms do not name their only axis: outside of a part it is the stream's.
      of_stream = axis is None and axis_of_part is None and (before, after) == width
      if before != after and axis not in ('layers', 'embed', *goes_with) and not of_stream:
        raise UserError(
          f'{_name(path)} falls from {before} to {after}, and nothing says which of its entries stay: leave '
          'that size as it is.'
        )


def _choose_units(chosen: dict[Path, str], sizes, measured: importance.Importance, kept: Kept):
  """The units that stay, of every part that has fewer in the smaller model."""
  for path, axis in chosen.items():
    kernel = sizes[*path, 'kernel']
    part = path[:-1]
    layers = sorted((layer for at, layer in measured.inputs if at == path), key=lambda n: n or 0)
    if not layers:
      raise UserError(f'{_name(path)} was not used on the batches: its units cannot be compared.')
    each = []
    for layer in layers:
      size = measured.inputs[path, layer]
      size = np.sqrt((size**2).sum(axis=tuple(range(1, size.ndim))))
      if axis == 'heads':
        each.append(_heads(size, _key_heads(part, sizes), kernel, part))
      elif part in measured.nested:
        each.append({axis: np.arange(kernel.size(axis)[1])})
      else:
        each.append({axis: importance.largest(size, kernel.size(axis)[1])})
    for name in each[0]:
      index = np.stack([of_layer[name] for of_layer in each])
      kept.units[part, name] = index[0] if layers == [None] else index


def _key_heads(part: Path, sizes: dict[Path, Parameter]) -> tuple[int, int]:
  """(key heads now, in the smaller model) of an attention."""
  for path, parameter in sizes.items():
    if path[: len(part)] == part and 'kv_heads' in parameter.axes:
      return parameter.size('kv_heads')
  raise UserError(f'{_name(part)} has heads and no key heads: its heads must stay.')


def _heads(size: np.ndarray, groups: tuple[int, int], kernel: Parameter, part: Path) -> dict:
  """Heads and key heads that stay: the largest of every group of one key head, of the largest groups."""
  heads = kernel.size('heads')[1]
  before, after = groups
  queries = heads // after
  grouped = size.reshape(before, -1)
  if queries > grouped.shape[1]:
    raise UserError(
      f'{_name(part)}: {heads} heads over {after} key heads are more for each than the {grouped.shape[1]} now; '
      'keep more key heads.'
    )
  best = np.stack([importance.largest(group, queries) for group in grouped])
  sums = np.take_along_axis(grouped**2, best, axis=1).sum(axis=1)
  keys = importance.largest(sums, after)
  return {'kv_heads': keys, 'heads': (keys[:, None] * grouped.shape[1] + best[keys]).reshape(-1)}


# Slices.


def _slice(path: Path, parameter: Parameter, value, kept: Kept) -> np.ndarray:
  """A parameter of the smaller model. Its layers were chosen before."""
  value = np.asarray(value)
  units = {axis: index for (part, axis), index in kept.units.items() if path[: len(part)] == part}
  for at, axis in enumerate(parameter.axes):
    if axis == 'layers' or parameter.old[at] == parameter.new[at]:
      continue
    index = units.get(axis, kept.channels)
    if index.ndim == 1:
      value = np.take(value, index, axis=at)
    else:
      at -= parameter.stacked
      value = np.stack([np.take(x, i, axis=at) for x, i in zip(value, index, strict=True)])
  return value


def write(folder: pathlib.Path, params: dict) -> None:
  """Writes parameters as a checkpoint to start from."""
  values = {
    tuple(key.key for key in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(params)
  }
  shapes = {path: x.shape for path, x in values.items()}

  def pieces():
    return ((path, (), x) for path, x in values.items())

  folder.mkdir(parents=True)
  write_params(folder, shapes, dict.fromkeys(shapes, 0), pieces)


def _at(tree: dict, path: Path):
  for key in path:
    tree = tree[key]
  return tree


def _name(path: Path) -> str:
  return '/'.join(map(str, path)) or 'the model'
