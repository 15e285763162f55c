"""FIXME: say what this module is."""

import math

from research.huggingface.fields import SIZES, Derived, Family, Field, Raw
from research.huggingface.names import Tree
from research.huggingface.tables import under

T5_ATTENTION = {'query': 'q', 'key': 'k', 'value': 'v', 'output': 'o'}


def _t5_trees(mlp: dict[str, str]) -> tuple[Tree, ...]:
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
  Field('d_ff', 'MLP'), Field('layer_norm_epsilon', 'layers.RMSNorm.epsilon', 1e-6),
  Field('relative_attention_num_buckets', 'positions.RelativePositionBias.buckets', 32),
  Field('relative_attention_max_distance', 'positions.RelativePositionBias.max_distance', 128),
)  # fmt: skip


def _depth(period: int) -> Derived:
  def read(c):
    decoder = c.get('num_decoder_layers') or c['num_layers']
    return {'ENCODER_LAYERS': c['num_layers'] // period, 'DECODER_LAYERS': decoder // period}

  def write(get):
    return {
      'num_layers': period * get('ENCODER_LAYERS'),
      'num_decoder_layers': period * get('DECODER_LAYERS'),
    }

  return Derived(read, write)


def _t5_head(config):
  # transformers ties every T5 in memory; the file says whether there is a matrix for the head.
  untied = 'lm_head.weight' in config.get('tensors', ())
  scaled = config.get('tie_word_embeddings', True) and config.get('scale_decoder_outputs', True)
  return {
    'models.EncoderDecoder.head': Raw('@heads.UntiedHead' if untied else '@heads.TiedHead'),
    'heads.TiedHead.scale': Raw('@embedder.inverse_sqrt') if scaled else 1.0,
  }


T5_HEAD = Derived(
  _t5_head,
  lambda get: {
    'tie_word_embeddings': str(get('models.EncoderDecoder.head')).endswith('TiedHead'),
    'scale_decoder_outputs': get('heads.TiedHead.scale') != 1.0,
  },
)


MT5_HEAD = Derived(lambda c: {**_t5_head(c), 'heads.TiedHead.scale': 1.0})


SWITCH_HEAD = Derived(
  lambda c: {**_t5_head(c), 'heads.TiedHead.scale': Raw('@embedder.inverse_sqrt')}
)


# Theirs is a number of tokens, ours a factor of the fair share; the two meet at T5's 512 tokens.
SWITCH_CAPACITY = Derived(
  lambda c: {'moe.MoE.capacity': c.get('expert_capacity', 64) * c.get('num_experts', 8) / 512},
  lambda get: {'expert_capacity': math.ceil(get('moe.MoE.capacity') * 512 / get('EXPERTS') - 1e-9)},
)


T5_IGNORE = (
  r'(en|de)coder\.embed_tokens\.weight',
  r'decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight',
)


def _t5(model_type, architecture, gin, projection, head):
  mlp = under('DenseReluDense.', GATED_T5 if projection.startswith('gated') else PLAIN)
  return Family(
    model_type, architecture, f'gin/models/{gin}.gin', (*T5_SIZES, _depth(1), head), _t5_trees(mlp), T5_TOP,
    {'feed_forward_proj': projection}, T5_IGNORE,
  )  # fmt: skip


ENCODER_DECODERS = (
  _t5('t5', 'T5ForConditionalGeneration', 't5/1_0', 'relu', T5_HEAD),
  _t5('t5', 'T5ForConditionalGeneration', 't5/family', 'gated-gelu', T5_HEAD),
  _t5('mt5', 'MT5ForConditionalGeneration', 'mt5/family', 'gated-gelu', MT5_HEAD),
  Family(
    'switch_transformers', 'SwitchTransformersForConditionalGeneration', 'gin/models/switch/family.gin',
    (*T5_SIZES, _depth(2), SWITCH_HEAD, Field('num_experts', 'EXPERTS'), SWITCH_CAPACITY),
    _t5_trees(under('mlp.', PLAIN)), T5_TOP,
    {'encoder_sparse_step': 2, 'decoder_sparse_step': 2, 'router_bias': False}, T5_IGNORE,
  ),
)  # fmt: skip
