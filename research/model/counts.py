"""How large a model is and what a token costs, by every convention of the scaling literature.

`python -m research.count --gin_file=gin/models/llama/7b.gin` prints all of it.

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

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import UserError
from research.model.parameters import abstract_model, all_parameters, number_of, size, stored_bytes
from research.model.part import cost_of
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
  # Of the decoder's own sequence, in the model's dtype, while it is shorter than any window:
  kv_cache_bytes_per_token: int
  # Per token of the encoder's input, beside the former:
  cross_cache_bytes_per_token: int
  # Of all parameters as they are stored: 4 for each unless the model is quantised.
  stored_bytes: int


def abstract(model: Callable[..., nnx.Module]) -> nnx.Module:
  """The model with shapes in place of arrays: nothing is computed or allocated."""
  with Mesh(data=1).use(jax.devices()[:1]):
    return abstract_model(model)


def count(model: Callable[..., nnx.Module], lengths: Mapping[str, int]) -> Counts:
  """What `model` counts on sequences of these lengths.

  Args:
    model: a partial that needs only `rngs`, as `configs.load(..., root='MODEL').tree()` gives it.
    lengths: as a stream's. {'inputs': tokens, 'targets': tokens} for an encoder-decoder, one of them otherwise.

  Raises:
    UserError: a length is missing, or not positive; a part does not say what it costs.
  """
  module = abstract(model)
  targets, inputs = _check_lengths(module, lengths)
  cost = cost_of(module, targets, inputs)
  # A parameter that is multiplied with the encoder's tokens meets inputs / targets of them per target token.
  share = inputs / targets
  sizes = _sizes(module)
  active, matrices = size(module) - sizes.outside, size(module, 'matrix') - sizes.head_matrix
  active += (share - 1) * cost.encoder_params if share else 0
  matrices += (share - 1) * cost.encoder_matrices if share else 0
  one_hot = cost.one_hot * (1 + share)
  with_head = 6 * (active + cost.logits)
  full, visible, softmax = (x / targets for x in (cost.full, cost.visible, cost.softmax))
  return Counts(
    params_total=sizes.total,
    params_non_embedding=sizes.total - sizes.outside,
    params_with_head=sizes.total - sizes.outside + cost.logits,
    params_active=round(size(module)),
    flops_6n_non_embedding=6 * active,
    flops_6n_with_head=with_head,
    flops_attention_causal=with_head + 3 * visible,
    flops_attention_full=with_head + 3 * full,
    flops_chinchilla=3 * (2 * (one_hot + matrices + cost.logits) + full + softmax),
    kv_cache_bytes_per_token=cost.cached * module.dtype.itemsize,
    cross_cache_bytes_per_token=cost.cached_encoder * module.dtype.itemsize,
    stored_bytes=stored_bytes(module),
  )


@dataclasses.dataclass(frozen=True)
class DecodingCounts:
  """What it costs to generate one token behind a text, for one row.

  Attributes:
    flops: of the forward pass. The token meets every parameter of the decoder that it visits, the matrix of the
      logits, and all the tokens before it that its windows leave.
    params_bytes: of those parameters, in the model's dtype, or as they are stored where they are quantised; all
      the rows of a step read them together.
    cache_bytes: of what is kept of the tokens before, which every row reads for itself; the most that it can
      be, since a window keeps fewer tokens. A recurrence's state is not in it.
  """

  flops: float
  params_bytes: float
  cache_bytes: float


def count_decoding(model: Callable[..., nnx.Module], lengths: Mapping[str, int]) -> DecodingCounts:
  """What the last token of a text of these lengths costs to generate; arguments as of `count`.

  Raises:
    UserError: as of `count`; and of an encoder alone, which generates nothing.
  """
  module = abstract(model)
  if not getattr(module, 'causal', True):
    raise UserError('a model that sees both ways does not generate, so decoding has no cost.')
  targets, inputs = _check_lengths(module, lengths)
  cost = cost_of(module, targets, inputs)
  # The encoder, and the keys and values made of its output, are computed once, before the first token.
  of_encoder = cost_of(module.encoder, inputs, inputs).full if inputs else 0
  params = size(module) - _sizes(module).outside - cost.encoder_params + cost.logits
  itemsize = module.dtype.itemsize
  return DecodingCounts(
    flops=2 * params + (cost.full - of_encoder) / targets,
    params_bytes=params * itemsize + _of_quantised(module, itemsize),
    cache_bytes=(targets * cost.cached + inputs * cost.cached_encoder) * itemsize,
  )


def without_gradients(
  count: Counts,
  model: Callable[..., nnx.Module],
  frozen: Collection[str],
  lengths: Mapping[str, int],
) -> Counts:
  """The counts of training in which these parameters do not learn.

  The products that would make their gradients are not computed, 2 of the 6 FLOPs for a parameter and token. The
  gradient still passes through them to the layers before.

  Args:
    count: of training in which all parameters learn.
    frozen: names of parameters, 'stack/norm/scale'.
    lengths: as in `count`.
  """
  module = abstract(model)
  targets, inputs = _check_lengths(module, lengths)
  cost = cost_of(module, targets, inputs)
  layers = matrices = tables = 0.0
  head = cost.logits
  for path, value in all_parameters(module):
    number = number_of(value) * value.active
    if path[0] == 'encoder':
      number *= inputs / targets
    embeds = value.kind == 'table' and 'embed' in value.axes
    reads_out = value.kind != 'table' and 'vocab' in value.axes
    if '/'.join(map(str, path)) not in frozen:
      # Of the token vectors too: a tied head multiplies with them.
      head = 0 if 'vocab' in value.axes and value.kind != 'vector' else head
    elif embeds:
      tables += number if 'vocab' in value.axes else 0
    elif not reads_out:
      layers += number
      matrices += number if value.kind == 'matrix' else 0
  with_head = 2 * (layers + head)
  saved = {
    'flops_6n_non_embedding': 2 * layers,
    'flops_6n_with_head': with_head,
    'flops_attention_causal': with_head,
    'flops_attention_full': with_head,
    'flops_chinchilla': 2 * (tables + matrices + head),
  }
  return dataclasses.replace(count, **{k: getattr(count, k) - n for k, n in saved.items()})


def _check_lengths(module, lengths) -> tuple[int, int]:
  """Tokens of the target, and of the input (0 without an encoder)."""
  if 'encoder' in module.inputs:
    targets, inputs = lengths.get('targets', 0), lengths.get('inputs', 0)
    needed, smallest = "its 'inputs' and 'targets'", min(targets, inputs)
  else:  # masked language modelling calls its one length 'inputs'
    targets, inputs = lengths.get('targets', lengths.get('inputs', 0)), 0
    needed, smallest = "its 'targets'", targets
  if smallest < 1:
    got = ', '.join(f'{k}={v}' for k, v in lengths.items()) or 'nothing'
    raise UserError(
      f'lengths: {type(module).__name__} needs positive lengths of {needed}; got {got}.'
    )
  return targets, inputs


def _of_quantised(module: nnx.Module, itemsize: int) -> float:
  """The bytes that decoding reads beyond `itemsize` for every number; below 0 where some are quantised.

  A table of token vectors is read whole only if it also makes the logits.
  """
  tied = not _sizes(module).head_matrix
  more = 0.0
  for _, value in all_parameters(module):
    quantised = value.holds != 1 or value.dtype != jnp.float32
    embeds = value.kind == 'table' and 'embed' in value.axes
    if quantised and (tied or not embeds):
      stored = math.prod(value.shape) * value.dtype.itemsize
      more += (stored - number_of(value) * itemsize) * value.active
  return more


@dataclasses.dataclass(frozen=True)
class _Sizes:
  """Numbers of parameters: all, those outside of the layers, and the head's own matrix (0 where it is tied)."""

  total: int
  outside: int
  head_matrix: int


def _sizes(module: nnx.Module) -> _Sizes:
  """By kind and axes: a table of vectors of the stream embeds, and what has an axis of `vocab` reads out.

  T5's relative biases are a table without such vectors; what lies between the last layer and the matrix of the
  logits (BERT's dense layer) has no axis of `vocab`. Both count as layers.
  """
  total = outside = head_matrix = 0
  for _, value in all_parameters(module):
    number = number_of(value)
    embeds = value.kind == 'table' and 'embed' in value.axes
    reads_out = value.kind != 'table' and 'vocab' in value.axes
    total += number
    outside += number if embeds or reads_out else 0
    head_matrix += number if reads_out and value.kind == 'matrix' else 0
  return _Sizes(total, outside, head_matrix)
