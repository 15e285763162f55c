"""Counts the parameters of a model and the FLOPs of a token, by every convention of the scaling literature.

`python -m research.count --gin_file=gin/models/llama/7b.gin` prints all of it.

Parameters (N). Scaling laws differ by this choice (Porian et al. 2024, arXiv:2406.19146; Pearce & Song 2024,
arXiv:2406.12907):

- `params_total`: all of them.
- `params_non_embedding`: without token, position and type tables and without an untied head's matrix
  (Kaplan et al. 2020, arXiv:2001.08361). T5's relative biases count as the layers' own.
- `params_with_head`: the same plus the matrix of the logits, embed x vocab, tied or not: what multiplies a
token.
- `params_active`: `params_total`, with only those routed experts that one token visits.

Floating-point operations (C), forward and backward (twice the forward), per target token. Routed experts
count as far as they are active:

- `flops_6n_non_embedding`, `flops_6n_with_head`: six times those parameters.
- `flops_attention_full`: 6N with the head, and the mixing of tokens: scores and weighted sums of attention as
  if every query saw every key (what dense kernels do, and PaLM's MFU: arXiv:2204.02311, appendix B), or the
  scan of a state-space layer.
- `flops_attention_causal`: the same with only the pairs that the causal mask and the window leave.
- `flops_chinchilla`: Hoffmann et al. 2022, arXiv:2203.15556, appendix F: embeddings as a dense product, the
  matrices of the layers (no norms, no biases), full attention with 3 FLOPs per pair and head for the softmax,
  and the logits. (The ratios to 6ND in their table A4 come out only without embeddings and logits.)

A token is a position of the target sequence that is not padding. It counts with or without a loss (masked and
prefix language modelling leave some out), since it is computed anyway.

An encoder-decoder has two lengths. Its D counts the target tokens, so that nats per token and C = D x FLOPs per
token mean the same as in a language model. The encoder, and the keys and values of cross-attention, cost their
FLOPs per input token times inputs / targets; the rest of the decoder costs its FLOPs per target token. (At
equal lengths a token of either side meets half of the parameters. Raffel et al. 2020, arXiv:1910.10683, section
3.2.2, compare architectures so, and Brown et al. 2020, table D.1, count T5 so.)
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
  # Per token of the decoder's own sequence, in the model's dtype, while the sequence is shorter than any
  # window.
  kv_cache_bytes_per_token: int
  # Per token of the encoder's input, in addition.
  cross_cache_bytes_per_token: int
  # All parameters as they are stored: 4 bytes each unless the model is quantised.
  stored_bytes: int


def abstract(model: Callable[..., nnx.Module]) -> nnx.Module:
  """Returns the model with shapes in place of arrays. Nothing is computed or allocated."""
  with Mesh(data=1).use(jax.devices()[:1]):
    return abstract_model(model)


def count(model: Callable[..., nnx.Module], lengths: Mapping[str, int]) -> Counts:
  """Counts the parameters of a model and its FLOPs per token on sequences of these lengths.

  Args:
    model: a partial that needs only `rngs`, as `configs.load(..., root='MODEL').tree()` returns it.
    lengths: {'inputs': tokens, 'targets': tokens} for an encoder-decoder, one of the two for other models.

  Raises:
    UserError: a length is missing or not positive, or a part has no method `cost`.
  """
  module = abstract(model)
  targets, inputs = _check_lengths(module, lengths)
  cost = cost_of(module, targets, inputs)
  # A parameter that is multiplied with the encoder's tokens meets inputs / targets of them per target token.
  share = inputs / targets
  sizes = _sizes(module)
  active = size(module) - sizes.outside
  matrices = size(module, 'matrix') - sizes.head_matrix
  active += (share - 1) * cost.encoder_params if share else 0
  matrices += (share - 1) * cost.encoder_matrices if share else 0
  one_hot = cost.one_hot * (1 + share)
  with_head = 6 * (active + cost.logits)
  # Per target token. The backward pass costs twice the forward pass, hence the factor of 3 below.
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
  """The cost of generating one more token after a text, for one row.

  Attributes:
    flops: the FLOPs of the forward pass. The token meets every parameter of the decoder that it visits, the
      matrix of the logits, and all earlier tokens that the windows leave.
    params_bytes: the bytes of those parameters, in the model's dtype, or as they are stored if they are
      quantised. All rows of a step share one reading of them.
    cache_bytes: the bytes of the cache of earlier tokens, which every row reads for itself. This is an upper
      bound: a window keeps fewer tokens. The state of a recurrence is not included.
  """

  flops: float
  params_bytes: float
  cache_bytes: float


def count_decoding(model: Callable[..., nnx.Module], lengths: Mapping[str, int]) -> DecodingCounts:
  """Returns the cost of generating the last token of a text of these lengths. Arguments as for `count`.

  Raises:
    UserError: as for `count`; also for an encoder alone, which generates nothing.
  """
  module = abstract(model)
  if not getattr(module, 'causal', True):
    raise UserError(
      'a model that sees both ways generates no text, so decoding has no cost; choose a causal model.'
    )
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
  """Returns the counts of training in which some parameters do not learn.

  The products of their gradients are not computed: 2 of the 6 FLOPs per parameter and token. The gradient still
  passes through them to the layers before.

  Args:
    count: the counts of training in which all parameters learn.
    model: as for `count`.
    frozen: names of the parameters that do not learn, such as 'stack/norm/scale'.
    lengths: as for `count`.
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
      # If the token vectors learn, a tied head, which multiplies with them, needs its gradient.
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
  """Returns the number of target tokens, and of input tokens (0 without an encoder)."""
  if 'encoder' in module.inputs:
    targets = lengths.get('targets', 0)
    inputs = lengths.get('inputs', 0)
    needed = "its 'inputs' and 'targets'"
    smallest = min(targets, inputs)
  else:  # masked language modelling calls its only length 'inputs'
    targets = lengths.get('targets', lengths.get('inputs', 0))
    inputs = 0
    needed = "its 'targets'"
    smallest = targets
  if smallest < 1:
    actual = ', '.join(f'{k}={v}' for k, v in lengths.items()) or 'nothing'
    raise UserError(
      f'lengths: {type(module).__name__} needs positive lengths of {needed}; got {actual}.'
    )
  return targets, inputs


def _of_quantised(module: nnx.Module, itemsize: int) -> float:
  """Returns the bytes that decoding reads beyond `itemsize` per number; below 0 for a quantised model.

  A table of token vectors is read whole only if it is also the matrix of the logits.
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
  """Numbers of parameters: all, those outside of the layers, and the head's own matrix (0 if it is tied)."""

  total: int
  outside: int
  head_matrix: int


def _sizes(module: nnx.Module) -> _Sizes:
  """Sorts parameters by kind and axes.

  A table with an axis 'embed' holds token, position or type vectors. Any other parameter with an axis 'vocab'
  belongs to the head. All others count as layers: T5's relative biases (a table without 'embed'), and BERT's
  dense layer before the logits (no axis 'vocab').
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
