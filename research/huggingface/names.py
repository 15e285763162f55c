"""Which tensors of a Hugging Face checkpoint hold which parameters of a model.

A table of names says, for a class of part, which tensor holds which member of the part. A `Linear` has a weight
and a bias, a norm a scale and a bias, and a bare parameter is one tensor. A member that the part lacks is
skipped. `tensors` walks a model in the order of execution and makes one `Tensor` for every tensor of the files.
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
  """Several members in one tensor, one after another along its outputs.

  Attributes:
    name: of the tensor.
    interleaved: the members follow each other within every head of the last one (GPT-NeoX, BLOOM, Falcon).
    untransposed: the tensor is [inputs, outputs], as in GPT-2.
  """

  name: str
  interleaved: bool = False
  untransposed: bool = False


@dataclasses.dataclass(frozen=True)
class Piece:
  """A parameter, or the slice of it that belongs to one layer or expert.

  Attributes:
    path: of the parameter in the model.
    index: of the slice on the leading axes.
    shape: of the slice.
    inputs: how many axes of `shape` are contracted with the input.
  """

  path: tuple
  index: tuple[int, ...]
  shape: tuple[int, ...]
  inputs: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a checkpoint and the pieces in it.

  Attributes:
    name, shape: as the file has them.
    pieces: of parameters.
    split, join: take the tensor apart into its pieces and put it together, each the inverse of the other.
  """

  name: str
  pieces: tuple[Piece, ...]
  shape: tuple[int, ...]
  split: Callable[[np.ndarray], list[np.ndarray]]
  join: Callable[[list[np.ndarray]], np.ndarray]


def _matrix(name, pieces, interleaved=False, untransposed=False) -> Tensor:
  """A tensor [outputs, inputs] for kernels [inputs..., outputs...]. A bias is a kernel without inputs."""
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
  """A tensor [channels, 1, width] for kernels [width, channels...]."""
  width = pieces[0].shape[0]
  sizes = [math.prod(p.shape) // width for p in pieces]

  def split(x):
    parts = np.split(x[:, 0].T, np.cumsum(sizes)[:-1], axis=-1)
    return [part.reshape(p.shape) for part, p in zip(parts, pieces, strict=True)]

  def join(parts):
    return np.concatenate([x.reshape(width, -1) for x in parts], axis=-1).T[:, None]

  return Tensor(name, tuple(pieces), (sum(sizes), 1, width), split, join)


def _same(name, piece, shape=None) -> Tensor:
  """A tensor with the numbers of one parameter in the same order, possibly in another shape."""
  shape = shape or piece.shape

  def split(x):
    return [x.reshape(piece.shape)]

  def join(parts):
    return parts[0].reshape(shape)

  return Tensor(name, (piece,), shape, split, join)


def _member(module, path: tuple):
  """The member of a module at a path, or None."""
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
  """Yields the tensors of one row of a table: the members `names` of `module`, in the tensors of `target`.

  Args:
    names: of members, separated by spaces.
    target: the name of the tensor, or a `Fused`.
    module: a part, or whatever else has the members.
    path: of the module in the model.
    index: of the layer on the parameters' leading axes.
    prefix: of the tensor's name.
  """
  target = target if isinstance(target, Fused) else Fused(target)
  members = []
  for member_path in map(_split, names.split()):
    member = _member(module, member_path)
    if member is not None:
      members.append((path + member_path, member))
  if not members:
    return
  name = prefix + target.name
  first_path, first = members[0]
  if isinstance(first, nnx.Param):
    yield from _of_parameter(name, first_path, first, index)
    return
  if isinstance(first, CausalConvolution):
    yield _convolution(f'{name}.weight', _pieces_of(members, 'kernel', index))
  else:
    kernel = 'kernel' if type(first) is Linear else 'scale'
    if weights := _pieces_of(members, kernel, index):
      yield _matrix(f'{name}.weight', weights, target.interleaved, target.untransposed)
  if biases := _pieces_of(members, 'bias', index):
    yield _matrix(f'{name}.bias', biases, target.interleaved)


def _pieces_of(members: list[tuple], name: str, index: tuple[int, ...]) -> list[Piece]:
  """The pieces in the parameter `name` of modules, (path, module) each; those that lack it are skipped."""
  pieces = []
  for path, module in members:
    param = getattr(module, name, None)
    if param is None:
      continue
    inputs = 0
    if isinstance(module, CausalConvolution) and name == 'kernel':
      inputs = 1
    elif isinstance(module, Linear) and name == 'kernel':
      inputs = len(module.inputs)
    pieces.append(_piece(param, (*path, name), index, inputs))
  return pieces


def _of_parameter(name, path, param, index) -> Iterator[Tensor]:
  """Yields the tensors of a bare parameter: one, or one for each expert where the name has a place for it."""
  if '{}' in name:  # one tensor per expert
    for expert in range(param.shape[len(index)]):
      yield _matrix(name.format(expert), [_piece(param, path, (*index, expert), 1)])
  elif param.kind == 'matrix':
    yield _matrix(name, [_piece(param, path, index, 1)])
  else:
    piece = _piece(param, path, index, 0)
    # Their tensors have another number of axes than our parameters.
    shapes = {'norm_scale': (math.prod(piece.shape),), 'shared_gate': (1, *piece.shape)}
    yield _same(name, piece, shapes.get(path[-1]))


@dataclasses.dataclass(frozen=True)
class Tree:
  """The names of the tensors of a stack.

  Attributes:
    path: of the stack in the model.
    layer: the prefix of a layer's tensors, with '{}' for its number.
    norms: a name, or several, for every sublayer of a layer, in order.
    parts: a table of names for each class of part; '{place}' in a name is the sublayer's number in its layer.
  """

  path: str
  layer: str
  norms: tuple[str | tuple[str, ...], ...]
  parts: dict[str, dict[str, str | Fused]]


# The members of a residual connection that can be norms (`model.residual`), in the order of a row's names.
WIRING_NORMS = ('norm', 'norm_after', 'norms.0', 'norms.1')


def _of_tree(model, tree: Tree) -> Iterator[Tensor]:
  """Yields the tensors of a stack, or of several in a row, in the order of execution."""
  root = getattr(model, tree.path)
  stacks = [((tree.path,), root)]
  if isinstance(root, Stacks):
    stacks = [((tree.path, 'stacks', i), stack) for i, stack in enumerate(root.stacks)]
  count = 0
  for path, stack in stacks:
    for repeat in range(stack.repeats):
      for i, sublayer in enumerate(stack.sublayers):
        layer, place = divmod(count, len(tree.norms))
        sublayer_path = (*path, 'sublayers', i)
        yield from _of_norms(tree, layer, place, sublayer, sublayer_path, (repeat,))
        yield from _of_parts(tree, layer, place, sublayer, sublayer_path, (repeat,))
        count += 1


def _of_norms(tree, layer, place, sublayer, path, index) -> Iterator[Tensor]:
  """Yields the tensors of the norms at a sublayer, the `place`-th of its layer."""
  norms = tree.norms[place] if isinstance(tree.norms[place], tuple) else (tree.norms[place],)
  members = [name for name in WIRING_NORMS if _member(sublayer, _split(name)) is not None]
  if len(members) != len(norms):
    raise UserError(
      f'{tree.path}: layer {layer} has {len(members)} norms at one sublayer, the family {len(norms)}.'
    )
  for member, name in zip(members, norms, strict=True):
    yield from _of_members(member, name, sublayer, path, index, tree.layer.format(layer))


def _of_parts(tree, layer, place, sublayer, path, index) -> Iterator[Tensor]:
  """Yields the tensors of the parts of a sublayer, the `place`-th of its layer."""
  for i, part in enumerate(sublayer.parts):
    for names, target in tree.parts.get(type(part).__name__, {}).items():
      target = target if isinstance(target, Fused) else Fused(target)
      target = dataclasses.replace(target, name=target.name.replace('{place}', str(place)))
      yield from _of_members(
        names, target, part, (*path, 'parts', i), index, tree.layer.format(layer)
      )


def _split(name: str) -> tuple:
  return tuple(int(k) if k.isdigit() else k for k in name.split('.'))


def tensors(model: nnx.Module, trees: tuple[Tree, ...], top: dict[str, str]) -> list[Tensor]:
  """Returns every tensor of a checkpoint of a model.

  Args:
    model: of arrays or of shapes.
    trees: the names in its stacks.
    top: the names around them: members of the model to tensors.

  Raises:
    UserError: a sublayer has more or fewer norms than the family.
  """
  result = []
  for names, target in top.items():
    result += _of_members(names, target, model, (), (), '')
  for tree in trees:
    result += _of_tree(model, tree)
  return result
