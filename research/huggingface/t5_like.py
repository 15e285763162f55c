"""T5, mT5 and Switch: models with two stacks, an encoder and a decoder."""

import math
from typing import Any

from research.core.errors import UserError
from research.huggingface.fields import (
  SIZES,
  Derived,
  Family,
  Field,
  Get,
  Options,
  Raw,
  Unused,
  always,
)
from research.huggingface.harmless import is_same
from research.huggingface.heads import MT5_HEAD, SWITCH_HEAD, T5_HEAD
from research.huggingface.names import Tree
from research.huggingface.settings import Settings
from research.huggingface.tables import under

T5_ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'output': 'o'}


def _t5_trees(mlp: dict[str, str]) -> tuple[Tree, ...]:
  """The trees of encoder and decoder, with a table of names for their dense MLPs."""
  parts = {
    'Attention': under('layer.{place}.SelfAttention.', T5_ATTENTION),
    'CrossAttention': under('layer.{place}.EncDecAttention.', T5_ATTENTION),
    'Mlp': under('layer.{place}.', mlp),
    'MoE': {
      'router.kernel': 'layer.{place}.mlp.router.classifier.weight',
      'experts.inputs.0': 'layer.{place}.mlp.experts.expert_{}.wi.weight',
      'experts.output': 'layer.{place}.mlp.experts.expert_{}.wo.weight',
    },
  }
  norms = tuple(f'layer.{i}.layer_norm' for i in range(3))
  return (
    Tree('encoder', 'encoder.block.{}.', norms[:2], parts),
    Tree('decoder', 'decoder.block.{}.', norms, parts),
  )


PLAIN = {'inputs.0': 'wi', 'output': 'wo'}
GATED_T5 = {'inputs.0': 'wi_0', 'inputs.1': 'wi_1', 'output': 'wo'}

T5_TOP = {
  'embedder.tokens': 'shared.weight', 'head.kernel': 'lm_head.weight',
  **{f'{s}.norm': f'{s}.final_layer_norm' for s in ('encoder', 'decoder')},
  **{f'{s}.bias.table': f'{s}.block.0.layer.0.SelfAttention.relative_attention_bias.weight'
     for s in ('encoder', 'decoder')},
}  # fmt: skip

T5_SIZES = (
  SIZES[0], Field('d_model', 'EMBED'), Field('num_heads', 'HEADS'), Field('d_kv', 'HEAD_DIM'),
  Field('d_ff', 'MLP'), Field('layer_norm_epsilon', 'layers.RMSNorm.epsilon'),
  Field('relative_attention_num_buckets', 'positions.RelativePositionBias.buckets'),
  Field('relative_attention_max_distance', 'positions.RelativePositionBias.max_distance'),
)  # fmt: skip


def _decoder_layers(settings: Settings) -> int:
  return settings.get('num_decoder_layers') or settings['num_layers']


def _depths(get: Get) -> tuple[int, int]:
  """The layers of encoder and decoder, which have two and three sublayers each."""
  return len(get.layers('encoder')) // 2, len(get.layers('decoder')) // 3


def _read_depth(settings: Settings) -> dict[str, Any]:
  return {'ENCODER_LAYERS': settings['num_layers'], 'DECODER_LAYERS': _decoder_layers(settings)}


def _write_depth(get: Get) -> dict[str, Any]:
  encoder, decoder = _depths(get)
  return {'num_layers': encoder, 'num_decoder_layers': decoder}


DEPTH = Derived(_read_depth, _write_depth)


def _read_sparse_depth(settings: Settings) -> dict[str, Any]:
  """Switch repeats a period of two layers, a dense one and one with experts."""
  bindings = {}
  depths = {'encoder': settings['num_layers'], 'decoder': _decoder_layers(settings)}
  for name, depth in depths.items():
    key = f'num_sparse_{name}_layers'
    if depth % 2 or settings[key] * 2 != depth:
      raise UserError(
        f'config.json: switch_transformers with {key} = {settings[key]} of {depth} layers is '
        'not supported, only half.'
      )
    step = f'{name}_sparse_step'
    if settings.is_given(step) and settings.get(step) != 2:
      raise UserError(
        f'config.json: {step} = {settings.get(step)!r} does not go with {key}; leave it out.'
      )
    bindings[f'{name.upper()}_LAYERS'] = depth // 2
  return bindings


def _write_sparse_depth(get: Get) -> dict[str, Any]:
  encoder, decoder = _depths(get)
  return {
    'num_layers': encoder, 'num_decoder_layers': decoder, 'num_sparse_encoder_layers': encoder // 2,
    'num_sparse_decoder_layers': decoder // 2, 'encoder_sparse_step': 2, 'decoder_sparse_step': 2,
  }  # fmt: skip


def _read_places(settings: Settings) -> dict[str, Any]:
  return {'moe.MoE.places': settings['expert_capacity'], 'moe.MoE.capacity': None}


def _write_places(get: Get) -> dict[str, Any]:
  """Writes an expert's capacity as a number of tokens; a capacity by share is that of T5's 512 tokens."""
  places = get('moe.MoE.places')
  if places is None:
    # Without a capacity every expert may take what all of them share.
    factor = get('moe.MoE.capacity') or get('EXPERTS')
    places = math.ceil(factor * 512 / get('EXPERTS') - 1e-9)  # less a rounding error
  return {'expert_capacity': places}


PLACES = Derived(_read_places, _write_places)


T5_COPIES = {f'{s}.embed_tokens.weight': 'shared.weight' for s in ('encoder', 'decoder')}
T5_IGNORE = (r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',)


def _agrees(projections: tuple[str, ...]) -> Derived:
  """Refuses `is_gated_act` and `dense_act_fn` that contradict `feed_forward_proj`."""
  gated = projections[0].startswith('gated')
  # 'gated-gelu' means the approximation by tanh, but as an activation 'gelu' is exact.
  names = {name.removeprefix('gated-') for name in projections if name != 'gated-gelu'}

  def read(settings: Settings) -> dict:
    wanted = {'is_gated_act': (gated,), 'dense_act_fn': tuple(sorted(names))}
    for key, values in wanted.items():
      value = settings.get(key)
      if settings.is_given(key) and not any(is_same(value, option) for option in values):
        raise UserError(
          f'config.json: {key} = {value!r} of {settings.model_type} does not go with feed_forward_proj = '
          f'{settings["feed_forward_proj"]!r}; leave one of them out.'
        )
    return {}

  return Derived(read)


def _t5(model_type, architecture, gin, projections, head, *more) -> Family:
  """A row for T5 or mT5; `projections` are the values of `feed_forward_proj` that it stands for."""
  mlp = under('DenseReluDense.', GATED_T5 if projections[0].startswith('gated') else PLAIN)
  return Family(
    model_type, architecture, f'gin/models/{gin}.gin',
    (*T5_SIZES, DEPTH, head, _agrees(projections), *more), _t5_trees(mlp), T5_TOP,
    {'feed_forward_proj': Options(projections), **T5_WHEN}, T5_IGNORE, '', T5_COPIES,
  )  # fmt: skip


GATED_GELU = ('gated-gelu', 'gated-gelu_new', 'gated-gelu_pytorch_tanh', 'gated-gelu_fast')
SWIGLU = always({'mlp.Mlp.activations': Raw('(@jax.nn.silu, @jax.nn.identity)')})
T5_WHEN = {'is_encoder_decoder': True}
ENCODER_DECODERS = (
  _t5('t5', 'T5ForConditionalGeneration', 't5/1_0', ('relu',), T5_HEAD),
  _t5('t5', 'T5ForConditionalGeneration', 't5/family', GATED_GELU, T5_HEAD),
  _t5('t5', 'T5ForConditionalGeneration', 't5/family', ('gated-silu', 'gated-swish'), T5_HEAD, SWIGLU),  # UL2
  _t5('mt5', 'MT5ForConditionalGeneration', 'mt5/family', GATED_GELU, MT5_HEAD),
  Family(
    'switch_transformers', 'SwitchTransformersForConditionalGeneration', 'gin/models/switch/family.gin',
    (*T5_SIZES, Derived(_read_sparse_depth, _write_sparse_depth), SWITCH_HEAD, Field('num_experts', 'EXPERTS'),
     PLACES, Unused(('encoder_sparse_step', 'decoder_sparse_step', 'feed_forward_proj', 'is_gated_act'))),
    _t5_trees(under('mlp.', PLAIN)), T5_TOP,
    {'router_bias': False, 'router_dtype': 'float32', 'dense_act_fn': 'relu', 'add_cross_attention': False,
     'router_ignore_padding_tokens': False, **T5_WHEN},
    T5_IGNORE, '', T5_COPIES,
  ),
)  # fmt: skip
