"""How large a model is and what a token costs, by every convention of the scaling literature.

    python -m research.model.counts --gin_file=gin/models/llama/7b.gin --length=2048
    python -m research.model.counts --presets='gin/models/qwen*/*.gin'

Parameters (N), by which scaling laws differ (Porian et al. 2024, arXiv:2406.19146; Pearce & Song 2024,
arXiv:2406.12907):

- `params_total`: all of them.
- `params_non_embedding`: without token, position and type tables and without an untied head's matrix
  (Kaplan et al. 2020, arXiv:2001.08361). T5's relative biases count as the layers' own.
- `params_with_head`: that and the matrix of the logits, embed x vocab, tied or not: what multiplies a token.
- `params_active`: `params_total` with the routed experts that one token visits in place of all of them.

Floating-point operations (C), forward and backward (twice the forward), per target token. Routed experts
count as far as they are active:

- `flops_6n_non_embedding`, `flops_6n_with_head`: six times those parameters.
- `flops_attention_full`: 6N with the head, and the mixing of tokens: scores and weighted sums of attention as
  if every query saw every key (what dense kernels do, and PaLM's MFU: arXiv:2204.02311, appendix B), or the
  scan of a state-space layer.
- `flops_attention_causal`: the same with only the pairs that the causal mask and the window leave.
- `flops_chinchilla`: Hoffmann et al. 2022, arXiv:2203.15556, appendix F: embeddings as a dense product, the
  matrices of the layers (no norms, no biases), full attention with 3 FLOPs a pair and head for the softmax,
  and the logits. (The ratios to 6ND in their table A4 come out when embeddings and logits are left away.)

A token is a position of the target sequence that is not padding, whether it carries a loss or (masked and
prefix language modelling) not: it is computed all the same. An encoder-decoder has two lengths, and its D
counts the target tokens too, so that nats per token and C = D x FLOPs per token mean what they do in a
language model: the encoder, and the keys and values of cross attention, cost their FLOPs per input token times
inputs / targets, and the rest of the decoder what it costs. (At equal lengths a token of either side then
meets half of the parameters: so Raffel et al. 2020, arXiv:1910.10683, section 3.2.2, compare architectures,
and Brown et al. 2020, table D.1, count T5.)
"""

import argparse
import sys

# The heavy imports wait until the arguments are parsed: `--help` must not cost a second.
if __name__ == '__main__':
  _parser = argparse.ArgumentParser(
    prog='python -m research.model.counts',
    description='N, FLOPs per token and KV-cache bytes of the model that a gin file defines.',
    epilog='Bindings go as --gin.Class.argument=value or --gin.MACRO=value.',
  )
  _what = _parser.add_mutually_exclusive_group(required=True)
  _what.add_argument('--gin_file', action='append', help='defines MODEL; repeats')
  _what.add_argument('--presets', help='a pattern of files, each defining a MODEL: a line for each')
  _parser.add_argument('--length', type=int, default=2048, help='target tokens in a sequence')
  _parser.add_argument(
    '--inputs', type=int, help='input tokens (encoder-decoder only; default: as --length)'
  )
  _arguments, _rest = _parser.parse_known_args()
  if _unknown := [a for a in _rest if not a.startswith('--gin.')]:
    _parser.error(f'no option {_unknown[0]!r}; write gin bindings as --gin.Class.argument=value')

import dataclasses
import glob
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
from flax import nnx

from research.core.errors import UserError
from research.model.attention import Attention
from research.model.embedder import Embedder
from research.model.stack import Stack
from research.parallel.mesh import Mesh


@dataclasses.dataclass(frozen=True)
class Counts:
  """Parameters, FLOPs (forward and backward) per target token, and bytes of cache; see the module's text."""

  params_total: int
  params_non_embedding: int
  params_with_head: int
  params_active: int
  flops_6n_non_embedding: float
  flops_6n_with_head: float
  flops_attention_causal: float
  flops_attention_full: float
  flops_chinchilla: float
  kv_cache_bytes_per_token: (
    int  # in the model's dtype, while the sequence is shorter than any window
  )
  cross_cache_bytes_per_token: int  # per token of the encoder's input; kept beside the former


@dataclasses.dataclass(frozen=True)
class _Node:
  """A parameter or a part, with the modules that hold it, outermost first."""

  names: tuple[str, ...]
  holders: tuple[nnx.Module, ...]
  value: nnx.Param | nnx.Module

  @property
  def size(self) -> int:
    return math.prod(self.value.shape)

  @property
  def repeats(self) -> int:
    return math.prod(module.repeats for module in self.holders if isinstance(module, Stack))

  @property
  def active_fraction(self) -> float:
    return math.prod(getattr(module, 'active_fraction', 1.0) for module in self.holders)


def _nodes(value, names=(), holders=()) -> Iterator[_Node]:
  if isinstance(value, nnx.Param):
    yield _Node(names, holders, value)
    return
  if isinstance(value, nnx.List | list | tuple):
    children = ((str(i), child) for i, child in enumerate(value))
  elif isinstance(value, nnx.Module):
    if hasattr(value, 'mixing_flops'):
      yield _Node(names, holders, value)
    children, holders = vars(value).items(), (*holders, value)
  else:
    return
  for name, child in children:
    yield from _nodes(child, (*names, name), holders)


def abstract(model: Callable[..., nnx.Module]) -> nnx.Module:
  """The model with shapes in place of arrays: nothing is computed or allocated."""
  with Mesh(data=1).use(jax.devices()[:1]):
    return jax.eval_shape(lambda key: model(rngs=nnx.Rngs(params=key)), jax.random.key(0))


def count(model: Callable[..., nnx.Module], lengths: Mapping[str, int]) -> Counts:
  """What `model` counts on sequences of these lengths.

  Args:
    model: a partial that needs only `rngs`, as `configs.load(..., root='MODEL').tree()` gives it.
    lengths: as a stream's. {'inputs': tokens, 'targets': tokens} for an encoder-decoder, one of them otherwise.

  Raises:
    UserError: a length is missing, or not positive.
  """
  module = abstract(model)
  targets, inputs = _check_lengths(module, lengths)
  params, parts = [], []
  for node in _nodes(module):
    (params if isinstance(node.value, nnx.Param) else parts).append(node)
  layers = [p for p in params if _kind(p, module.vocab) == 'layers']
  tables = [p for p in params if _kind(p, module.vocab) == 'tokens']

  def per_target(params) -> float:
    """How many of them one target token is multiplied with, with its share of the input's tokens."""
    share = lambda p: inputs / targets if _sees_inputs(p) else 1
    return sum(p.size * p.active_fraction * share(p) for p in params)

  total, non_embedding = sum(p.size for p in params), sum(p.size for p in layers)
  head = module.vocab * tables[0].value.shape[-1]
  active, matrices = per_target(layers), per_target(p for p in layers if _is_matrix(p))
  one_hot = sum(p.size for p in tables) * (1 + inputs / targets)
  mixing = [_mixing(p, module, inputs, targets) for p in parts]
  full, causal, softmax = (sum(m[i] for m in mixing) for i in range(3))
  cached = lambda cross: sum(_cached(p) * p.repeats for p in parts if _cross(p.value) == cross)
  return Counts(
    params_total=total,
    params_non_embedding=non_embedding,
    params_with_head=non_embedding + head,
    params_active=round(sum(p.size * p.active_fraction for p in params)),
    flops_6n_non_embedding=6 * active,
    flops_6n_with_head=6 * (active + head),
    flops_attention_causal=6 * (active + head) + 3 * causal,
    flops_attention_full=6 * (active + head) + 3 * full,
    flops_chinchilla=3 * (2 * (one_hot + matrices + head) + full + softmax),
    kv_cache_bytes_per_token=cached(cross=False) * module.dtype.itemsize,
    cross_cache_bytes_per_token=cached(cross=True) * module.dtype.itemsize,
  )


def _check_lengths(module, lengths) -> tuple[int, int]:
  if 'encoder' in module.inputs:
    targets, inputs = found = (lengths.get('targets', 0), lengths.get('inputs', 0))
    needed = "its 'inputs' and 'targets'"
  else:  # masked language modelling calls its one length 'inputs'
    found, inputs = (lengths.get('targets', lengths.get('inputs', 0)),), 0
    targets, needed = found[0], "its 'targets'"
  if min(found) < 1:
    got = ', '.join(f'{k}={v}' for k, v in lengths.items()) or 'nothing'
    raise UserError(
      f'lengths: {type(module).__name__} needs positive lengths of {needed}; got {got}.'
    )
  return targets, inputs


def _kind(node: _Node, vocab: int) -> str:
  """'tokens', 'embedding' (another table), 'head' (its matrix and bias), or 'layers' (all the rest)."""
  if isinstance(node.holders[-1], Embedder):
    return 'tokens' if node.names[-1] == 'tokens' else 'embedding'
  # What lies between the last layer and the matrix of the logits (BERT's dense layer) is a layer.
  of_head = node.names[:-1] == ('head',) and vocab in node.value.shape
  return 'head' if of_head else 'layers'


def _sees_inputs(node: _Node) -> bool:
  """Is it multiplied with the tokens of the encoder's input?"""
  cross = any(_cross(module) for module in node.holders)
  return node.names[0] == 'encoder' or (cross and {'key', 'value'} & set(node.names) != set())


def _is_matrix(node: _Node) -> bool:
  """Is it multiplied with a token, rather than added to it or scaling its channels one by one?"""
  stacked = any(isinstance(module, Stack) for module in node.holders) and 'sublayers' in node.names
  elementwise = 'bias' in node.names or node.names[-1].endswith(('_bias', 'scale', 'log_a'))
  return len(node.value.shape) - stacked > 1 and not elementwise


def _cross(module) -> bool:
  return getattr(module, 'cross', False)


def _mixing(part: _Node, module, inputs: int, targets: int) -> tuple[float, float, float]:
  """Forward FLOPs per target token: (all pairs, visible pairs, the softmax of all pairs)."""
  encoder = part.names[0] == 'encoder'
  length = inputs if encoder else targets
  full = part.value.mixing_flops(length, inputs) * part.repeats / targets
  if not isinstance(part.value, Attention) and not getattr(part.value, 'quadratic', False):
    return full, full, 0.0
  window = min(part.value.window or length, length)
  masked = not encoder and not _cross(part.value) and getattr(module, 'causal', True)
  # A band of `window` keys without the corner before the first token: w L - w (w - 1) / 2 pairs.
  visible = 1 - (window - 1) / (2 * length) if masked else 1
  keys = inputs if _cross(part.value) else window
  return full, full * visible, 3 * part.value.heads * keys * part.repeats * length / targets


def _cached(node: _Node) -> int:
  """Values that decoding keeps per token of the sequence that the part reads; the encoder is not run again."""
  part = node.value
  if node.names[0] == 'encoder':
    return 0
  if hasattr(part, 'cached_per_token'):
    return part.cached_per_token()
  # The stacked axis of the layers is not the part's own: [layers, embed, kv_heads, head_dim].
  return 2 * math.prod(part.key.kernel.shape[-2:]) if isinstance(part, Attention) else 0


def table(counts: Counts) -> str:
  """The counts as lines of text, with digits grouped and a short form beside."""
  lines = []
  for name, value in dataclasses.asdict(counts).items():
    scale = max(0, min(5, (len(str(round(value))) - 1) // 3))
    short = f'{value / 1000**scale:.4g}{["", "K", "M", "B", "T", "P"][scale]}'
    lines.append(f'{name:28}{round(value):>24,}  {short:>8}')
  return '\n'.join(lines)


COLUMNS = {
  'N': 'params_total',
  'active': 'params_active',
  'non-embedding': 'params_non_embedding',
  'with head': 'params_with_head',
  'FLOPs/token': 'flops_attention_causal',
  'cache bytes/token': 'kv_cache_bytes_per_token',
}


def row(name: str, counts: Counts) -> str:
  """One line of the table of presets, under the names of `COLUMNS`."""
  values = (round(getattr(counts, field)) for field in COLUMNS.values())
  return f'{name:32}' + ''.join(f'{value:>20,}' for value in values)


def main(arguments: argparse.Namespace, bindings: list[str]) -> None:
  """Prints the table of the MODEL that the gin files and bindings define, or a line for every preset."""
  from research.core import configs  # it alone needs gin

  load = lambda files: configs.load(files, bindings, root='MODEL').tree()
  lengths = {'targets': arguments.length, 'inputs': arguments.inputs or arguments.length}
  if arguments.gin_file:
    print(f'{" ".join(arguments.gin_file)}, length {arguments.length:,}')
    print(table(count(load(arguments.gin_file), lengths)))
    return
  # What sizes share says in its header what is to be set, and is no model by itself.
  paths = sorted(
    path for path in glob.glob(arguments.presets) if 'Set: ' not in pathlib.Path(path).read_text()
  )
  if not paths:
    raise UserError(f'--presets={arguments.presets}: no file of that pattern is a whole model.')
  print(f'{"":32}' + ''.join(f'{name:>20}' for name in COLUMNS))
  for path in paths:
    print(row(path, count(load([path]), lengths)), flush=True)


if __name__ == '__main__':
  try:
    main(_arguments, [a.removeprefix('--gin.') for a in _rest])
  except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
