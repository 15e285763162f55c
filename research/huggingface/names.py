"""How the tensors of a Hugging Face checkpoint and the parameters of a model correspond.

A table of names says, for a class of part, which tensor holds which of the part's members: a `Linear` gives
its weight and bias, a norm its scale and bias, a bare parameter itself. A member that the part does not have
is passed over. `tensors` walks a model in the order of execution and makes one `Tensor` per file tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np
from flax import nnx

from research.core.errors import UserError
from research.model.layers import Linear
from research.model.recurrence import CausalConvolution
from research.model.stack import Stacks


@dataclasses.dataclass(frozen=True)
class Fused:
  """Members in one tensor, after another along its outputs; `interleaved` per head of the last one's.

  `untransposed` is [inputs, outputs], as in GPT-2.
  """

  name: str
  interleaved: bool = False
  untransposed: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
  """A parameter, or one layer's (or expert's) slice of it: `index` on its leading axes, `shape` of the rest."""

  path: tuple
  index: tuple[int, ...]
  shape: tuple[int, ...]
  inputs: int  # how many axes of `shape` are contracted with the input


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint, the pieces it holds, and how: `split` and `join` are each other's inverse."""

  name: str
  pieces: tuple[Piece, ...]
  shape: tuple[int, ...]
  split: Callable[[np.ndarray], list[np.ndarray]]
  join: Callable[[list[np.ndarray]], np.ndarray]


def _matrix(name, pieces, interleaved=False, untransposed=False) -> Tensor:
  """[outputs, inputs] for kernels [inputs..., outputs...]; biases are kernels without inputs."""
  groups = pieces[-1].shape[pieces[-1].inputs] if interleaved else 1
  inputs = math.prod(pieces[0].shape[: pieces[0].inputs])
  widths = [math.prod(p.shape) // inputs // groups for p in pieces]
  has_inputs = pieces[0].inputs > 0
  flip = has_inputs and not untransposed
  rows = groups * sum(widths)
  shape = (rows, inputs) if flip else (inputs, rows) if has_inputs else (rows,)

  def split(x):
    x = (x.T if flip else x).reshape(inputs, groups, sum(widths))
    parts = np.split(x, np.cumsum(widths)[:-1], axis=-1)
    return [part.reshape(p.shape) for part, p in zip(parts, pieces, strict=True)]

  def join(parts):
    flat = [x.reshape(inputs, groups, width) for x, width in zip(parts, widths, strict=True)]
    x = np.concatenate(flat, axis=-1).reshape(inputs, rows)
    return (x.T if flip else x).reshape(shape)

  return Tensor(name, tuple(pieces), shape, split, join)


def _convolution(name, pieces) -> Tensor:
  """[channels, 1, width] for kernels [width, channels...]."""
  width = pieces[0].shape[0]
  sizes = [math.prod(p.shape) // width for p in pieces]

  def split(x):
    parts = np.split(x[:, 0].T, np.cumsum(sizes)[:-1], axis=-1)
    return [part.reshape(p.shape) for part, p in zip(parts, pieces, strict=True)]

  join = lambda parts: np.concatenate([x.reshape(width, -1) for x in parts], axis=-1).T[:, None]
  return Tensor(name, tuple(pieces), (sum(sizes), 1, width), split, join)


def _same(name, piece, shape=None) -> Tensor:
  """One parameter as it is, or in another shape of the same order."""
  shape = shape or piece.shape
  return Tensor(
    name, (piece,), shape, lambda x: [x.reshape(piece.shape)], lambda parts: parts[0].reshape(shape)
  )


def _member(module, path: tuple):
  """The member at this path, or None."""
  for key in path:
    if isinstance(key, int):
      module = module[key] if len(module) > key else None
    else:
      module = getattr(module, key, None)
    if module is None:
      return None
  return module


def _piece(param, path, index, inputs) -> Piece:
  return Piece(path, index, tuple(param.shape[len(index) :]), inputs)


def _of_members(names: str, target, module, path, index, prefix) -> Iterator[Tensor]:
  """The tensors of one row of a table: `names` of members of `module`, held by `target`."""
  target = target if isinstance(target, Fused) else Fused(target)
  paths = [_split(name) for name in names.split()]
  found = [(path + p, m) for p in paths if (m := _member(module, p)) is not None]
  if not found:
    return
  name = prefix + target.name
  first = found[0][1]
  if isinstance(first, nnx.Param):
    yield from _of_parameter(name, found, index)
    return
  members = {Linear: ('kernel', 'bias'), CausalConvolution: ('kernel', 'bias')}
  weights, biases = members.get(type(first), ('scale', 'bias'))
  pieces = lambda member, inputs: [
    _piece(getattr(m, member), (*p, member), index, inputs(m))
    for p, m in found
    if getattr(m, member, None) is not None
  ]
  if isinstance(first, CausalConvolution):
    yield _convolution(f'{name}.weight', pieces('kernel', lambda m: 1))
  elif weight := pieces(weights, lambda m: len(m.inputs) if isinstance(m, Linear) else 0):
    yield _matrix(f'{name}.weight', weight, target.interleaved, target.untransposed)
  if bias := pieces(biases, lambda m: 0):
    yield _matrix(f'{name}.bias', bias, target.interleaved)


def _of_parameter(name, found, index) -> Iterator[Tensor]:
  path, param = found[0]
  if '{}' in name:  # one tensor per expert
    for expert in range(param.shape[len(index)]):
      yield _matrix(name.format(expert), [_piece(param, path, (*index, expert), 1)])
  elif param.kind == 'matrix':
    yield _matrix(name, [_piece(param, path, index, 1)])
  else:
    piece = _piece(param, path, index, 0)
    shapes = {'norm_scale': (math.prod(piece.shape),), 'shared_gate': (1, *piece.shape)}
    yield _same(name, piece, shapes.get(path[-1]))


@dataclasses.dataclass(frozen=True)
class Tree:
  """The names of a stack: where it is, the prefix of its i-th layer, and what a layer is made of.

  `norms` has a name, or several, for each wiring (sublayer) of a layer, in order; `parts` has a table of names
  for each class of part, in which '{place}' is the sublayer's place in its layer.
  """

  path: str
  layer: str
  norms: tuple[str | tuple[str, ...], ...]
  parts: dict[str, dict[str, str | Fused]]


WIRING_NORMS = ('norm', 'norm_after', 'norms.0', 'norms.1')


def _of_tree(model, tree: Tree) -> Iterator[Tensor]:
  root = getattr(model, tree.path)
  stacks = [((tree.path,), root)]
  if isinstance(root, Stacks):
    stacks = [((tree.path, 'stacks', i), stack) for i, stack in enumerate(root.stacks)]
  place = 0
  for path, stack in stacks:
    for repeat in range(stack.repeats):
      for i, sublayer in enumerate(stack.sublayers):
        layer, at = divmod(place, len(tree.norms))
        prefix, here = tree.layer.format(layer), (*path, 'sublayers', i)
        norms = tree.norms[at] if isinstance(tree.norms[at], tuple) else (tree.norms[at],)
        members = [name for name in WIRING_NORMS if _member(sublayer, _split(name)) is not None]
        if len(members) != len(norms):
          raise UserError(
            f'{tree.path}: layer {layer} has {len(members)} norms at one sublayer, the family {len(norms)}.'
          )
        for member, name in zip(members, norms, strict=True):
          yield from _of_members(member, name, sublayer, here, (repeat,), prefix)
        for j, part in enumerate(sublayer.parts):
          table = tree.parts.get(type(part).__name__, {})
          for names, target in table.items():
            target = target if isinstance(target, Fused) else Fused(target)
            named = dataclasses.replace(target, name=target.name.replace('{place}', str(at)))
            yield from _of_members(names, named, part, (*here, 'parts', j), (repeat,), prefix)
        place += 1


def _split(name: str) -> tuple:
  return tuple(int(k) if k.isdigit() else k for k in name.split('.'))


def tensors(model: nnx.Module, trees: tuple[Tree, ...], top: dict[str, str]) -> list[Tensor]:
  """Every tensor of a checkpoint of `model` (arrays or shapes), for these tables of names."""
  found = [
    t for names, target in top.items() for t in _of_members(names, target, model, (), (), '')
  ]
  for tree in trees:
    found += _of_tree(model, tree)
  return found
