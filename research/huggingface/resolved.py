"""Looks up the values of bindings in the resolved tree of a model.

gin has many ways to say the same: a macro or a number, a bare function or one with its defaults bound. To write
a config.json we therefore ask the tree of partials, in which every binding has been resolved.
"""

import functools
import inspect
from collections.abc import Iterator
from typing import Any

# The bindings that the macros of the gin families stand for.
MACROS = {
  'VOCAB': ('models.LanguageModel.vocab', 'models.EncoderDecoder.vocab'),
  'EMBED': ('models.LanguageModel.embed', 'models.EncoderDecoder.embed'),
  'HEADS': ('attention.Attention.heads', 'latent.LatentAttention.heads'),
  'HEAD_DIM': ('attention.Attention.head_dim',),
  'MLP': ('mlp.Mlp.mlp', 'moe.MoE.mlp'),
  'EXPERTS': ('moe.MoE.experts',),
  'EXPERT_MLP': ('moe.MoE.mlp',),
  'ACTIVE': ('moe.Router.active',),
  'POSITIONS': ('embedder.Embedder.positions',),
  'LOGIT_SCALE': ('latent.LatentAttention.scale',),
}  # fmt: skip

Node = tuple[Any, dict[str, Any]]  # a class or function, and its arguments with the defaults


def node(value) -> Node | None:
  """Returns a class or function and its arguments, bound ones and defaults; None for another value."""
  target, bound = value, {}
  if isinstance(value, functools.partial):
    target, bound = value.func, value.keywords
  if not callable(target):
    return None
  function = target.__init__ if inspect.isclass(target) else target
  try:
    parameters = inspect.signature(function).parameters.values()
  except ValueError:  # a function in C, as math.sqrt
    parameters = ()
  defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
  return target, {**defaults, **bound}


class Resolved:
  """A resolved tree. Called with the name of a binding or a macro, it returns the value in the model."""

  def __init__(self, tree, sublayers: int = 1):
    """
    Args:
      tree: a resolved tree, or a part of one.
      sublayers: the number of sublayers of a layer.
    """
    self.tree = tree
    self.sublayers = sublayers
    self.nodes = list(_walk(tree))

  def __call__(self, name: str) -> Any:
    """Returns the first value of 'module.Class.argument' in the tree, None if there is none."""
    if name == 'KV_HEADS':
      return self('attention.Attention.kv_heads') or self('HEADS')
    if name == 'HEAD_DIM' and self('mamba2.Mamba2.head_dim'):
      return self('mamba2.Mamba2.head_dim')
    if name == 'LAYERS':
      return len(self.layers()) // self.sublayers
    for selector in MACROS.get(name, (name,)):
      owner, _, argument = selector.rpartition('.')
      for target, arguments in self.nodes:
        if _selector(target) == owner and argument in arguments:
          return arguments[argument]
    return None

  def is_a(self, name: str, selector: str) -> bool:
    """Whether the value of a binding is this class or function."""
    value = node(self(name))
    return value is not None and _selector(value[0]) == selector

  def argument(self, name: str, argument: str) -> Any:
    """Returns an argument of the part that is bound to a name, None if there is no such part."""
    value = node(self(name))
    return value and value[1].get(argument)

  @staticmethod
  def part_is(part, selector: str) -> bool:
    """Whether a part is of this class."""
    return _selector(node(part)[0]) == selector

  def layers(self, stack: str = 'stack') -> list[tuple]:
    """Returns the sublayers of a stack in the order of execution, each a tuple of the parts side by side."""
    _, arguments = node(self.tree)
    return list(_sublayers(arguments[stack]))

  def attentions(self) -> list[dict[str, Any]]:
    """Returns the arguments of every attention, in the order of execution."""
    parts = [node(part) for sublayer in self.layers() for part in sublayer]
    return [arguments for target, arguments in parts if _selector(target) == 'attention.Attention']


def _sublayers(stack) -> Iterator[tuple]:
  _, arguments = node(stack)
  if 'stacks' in arguments:
    for inner in arguments['stacks']:
      yield from _sublayers(inner)
    return
  for _ in range(arguments['repeats']):
    for part in arguments['parts']:
      yield tuple(part) if isinstance(part, tuple | list) else (part,)


def _walk(value) -> Iterator[Node]:
  if isinstance(value, dict):
    value = list(value.values())
  if isinstance(value, tuple | list):
    for inner in value:
      yield from _walk(inner)
  elif callable(value):
    target, arguments = node(value)
    yield target, arguments
    if isinstance(value, functools.partial) or inspect.isclass(target):
      for inner in arguments.values():
        yield from _walk(inner)


def _selector(target) -> str:
  """Returns 'module.Class' for a class of research.model, and the dotted name of any other."""
  module = getattr(target, '__module__', None) or ''
  name = getattr(target, '__qualname__', repr(target))
  return f'{module.rpartition(".")[2] if module.startswith("research.model.") else module}.{name}'
