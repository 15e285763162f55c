"""GPT-2 and its like: GPT-J, GPT-NeoX, Phi, Falcon, BLOOM, MPT and OPT."""

from research.core.errors import UserError
from research.huggingface.fields import (
  GELU,
  HEAD_DIM,
  HEAD_DIM_ONLY_OURS,
  LAYER_NORM,
  LAYER_NORM_EPS,
  MLP,
  SIZES,
  Derived,
  Family,
  Field,
  Get,
  Options,
  Raw,
  Unused,
  always,
  computed,
  equal,
  heads,
  width,
)
from research.huggingface.heads import HEAD, Head
from research.huggingface.names import Fused
from research.huggingface.rotary import ROPE
from research.huggingface.settings import Settings
from research.huggingface.tables import PRE_NORMS, SELF_ATTENTION, TOP, transformer, under

GPT2_TOP = {
  'embedder.tokens': 'transformer.wte.weight', 'embedder.positions': 'transformer.wpe.weight',
  'stack.norm': 'transformer.ln_f', 'head.kernel': 'lm_head.weight', 'head.bias': 'lm_head.bias',
}  # fmt: skip


FUSED_QKV = {
  'query key value': Fused('self_attention.query_key_value', interleaved=True),
  'output': 'self_attention.dense',
}


FOUR_H = {'inputs.0': 'mlp.dense_h_to_4h', 'output': 'mlp.dense_4h_to_h'}


FALCON_TOP = {
  'embedder.tokens': 'transformer.word_embeddings.weight',
  'embedder.norm': 'transformer.word_embeddings_layernorm',
  'stack.norm': 'transformer.ln_f', 'head.kernel': 'lm_head.weight',
}  # fmt: skip


PARALLEL = {'stack.Stack.parts': Raw('((@attention.Attention, @mlp.Mlp),)')}


PARALLEL_EACH = {
  **PARALLEL,
  'stack.Stack.residual': Raw('@residual.PreNormEach'),
  'residual.PreNormEach.norm': Raw('@layers.LayerNorm'),
}


EXACT_GELU = {
  'exact/jax.nn.gelu.approximate': False,
  'mlp.Mlp.activations': Raw('(@exact/jax.nn.gelu,)'),
}


NO_POSITIONS = {'POSITIONS': None, 'attention.Attention.rotary': Raw('@positions.rotary')}


GPT2_SIZES = (
  SIZES[0], Field('n_embd', 'EMBED'), Field('n_layer', 'LAYERS'), Field('n_head', 'HEADS'),
  HEAD_DIM_ONLY_OURS, LAYER_NORM,
)  # fmt: skip


def _four_widths(settings: Settings) -> int:
  return 4 * width(settings)


def _read_four_widths(settings: Settings) -> dict:
  return {'MLP': _four_widths(settings)}


INNER = Field('n_inner', 'MLP', _four_widths)
FOUR_TIMES = Derived(_read_four_widths)
WORD_HEAD = Head('transformer.word_embeddings.weight')
WTE_HEAD = Head('transformer.wte.weight')


FALCON_SIZES = (
  computed('head_dim'),
  *SIZES, HEAD_DIM_ONLY_OURS, LAYER_NORM, ROPE, WORD_HEAD,
  Field('ffn_hidden_size', 'MLP', _four_widths),
)  # fmt: skip
GELU_TANH = Options(('gelu_new', 'gelu_pytorch_tanh', 'gelu_fast'))


def _one_norm(settings: Settings) -> dict:
  """Refuses two norms: attention and MLP of Falcon 7B share one."""
  # transformers builds one norm for any other number.
  if settings.get_or_refuse_null('num_ln_in_parallel_attn') == 2:
    raise UserError(
      'config.json: falcon with num_ln_in_parallel_attn = 2 is supported only with '
      'new_decoder_architecture = true.'
    )
  return {}


FALCON_WHEN = {'parallel_attn': True, 'bias': False, 'alibi': False, 'activation': GELU}


def _read_mpt(settings: Settings) -> dict:
  """Reads MPT's object of options for attention."""
  attention = settings.child('attn_config', settings.get('attn_config') or {}, MPT_ATTENTION)
  for key in ('attn_pdrop', 'attn_impl', 'attn_uses_sequence_id', 'model_type', *MPT_INNER):
    attention.get_or_refuse_null(key)
  for key in ('attn_type', 'prefix_lm', 'qk_ln', 'alibi', 'alibi_bias_max'):
    equal(attention, key, MPT_ATTENTION[key])
  return {
    'attention.Attention.clip': attention.get('clip_qkv') or None,
    'attention.Attention.scale': attention.get('softmax_scale'),
  }


def _write_mpt(get: Get) -> dict:
  attention = get.attentions()[0]
  scale = attention['scale']
  if scale is not None and abs(scale**2 * attention['head_dim'] - 1) < 1e-6:
    scale = None  # one over the root of a head's size, which a null means
  options = {'clip_qkv': attention['clip'], 'softmax_scale': scale}
  return {'attn_config': options, 'expansion_ratio': 4}


MPT_ATTENTION = {
  'attn_type': 'multihead_attention', 'clip_qkv': float, 'softmax_scale': float, 'prefix_lm': False,
  'qk_ln': False, 'alibi': True, 'alibi_bias_max': 8, 'attn_pdrop': 0, 'attn_impl': 'torch',
  'attn_uses_sequence_id': False,
}  # fmt: skip
# Keys that transformers writes into every object of options.
MPT_INNER = (
  'architectures', 'output_hidden_states', 'return_dict', 'dtype', 'torch_dtype', 'chunk_size_feed_forward',
  'is_encoder_decoder', 'id2label', 'label2id', 'problem_type', '_name_or_path', 'output_attentions',
)  # fmt: skip


def _read_rotary_dim(settings: Settings) -> dict:
  rotated = settings['rotary_dim']
  size = width(settings) // heads(settings)
  if rotated % 2 or not 0 < rotated <= size:
    raise UserError(
      f'config.json: rotary_dim = {rotated} of {size} channels is not supported: an even number is wanted.'
    )
  return {'positions.rotary.fraction': rotated / size}


def _write_rotary_dim(get: Get) -> dict:
  return {'rotary_dim': round(get('positions.rotary.fraction') * get('HEAD_DIM'))}


def _read_kv_heads(settings: Settings) -> dict:
  """Refuses fewer heads of keys than of queries, whose grouping the tensors' layout does not say."""
  return equal(settings, 'num_key_value_heads', heads(settings))


def _write_kv_heads(get: Get) -> dict:
  return {'num_key_value_heads': get('HEADS')}


def _read_word_width(settings: Settings) -> dict:
  """Refuses token vectors of another width than the model's, as OPT 350M has them."""
  return equal(settings, 'word_embed_proj_dim', width(settings))


def _write_word_width(get: Get) -> dict:
  return {'word_embed_proj_dim': get('EMBED')}


# OPT's table has two rows more than positions: its first position is row 2.
UNUSED_POSITIONS = 2


def _add_unused(positions: int) -> int:
  return positions + UNUSED_POSITIONS


def _without_unused(rows: int) -> int:
  return rows - UNUSED_POSITIONS


KV_HEADS_AS_QUERIES = Derived(_read_kv_heads, _write_kv_heads)
WORD_WIDTH = Derived(_read_word_width, _write_word_width)

GPT_LIKE = (
  Family(
    'gpt2', 'GPT2LMHeadModel', 'gin/models/gpt2/family.gin',
    (*GPT2_SIZES, INNER, Field('n_positions', 'POSITIONS'), WTE_HEAD),
    transformer(
      ('ln_1', 'ln_2'), 'transformer.h.{}.',
      {'query key value': Fused('attn.c_attn', untransposed=True),
       'output': Fused('attn.c_proj', untransposed=True)},
      {'inputs.0': Fused('mlp.c_fc', untransposed=True), 'output': Fused('mlp.c_proj', untransposed=True)},
    ),
    GPT2_TOP, {'activation_function': GELU_TANH, 'scale_attn_weights': True,
               'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
    (r'.*\.attn\.(masked_)?bias',), 'transformer.',
  ),
  Family(
    'gptj', 'GPTJForCausalLM', 'gin/models/gpt2/family.gin',
    (*GPT2_SIZES, INNER, WTE_HEAD, Unused(('n_positions',)),
     Derived(_read_rotary_dim, _write_rotary_dim),
     always({**PARALLEL, **NO_POSITIONS, 'positions.rotary.interleaved': True, 'heads.UntiedHead.bias': True,
             'attention.Attention.qkv_bias': False, 'attention.Attention.output_bias': False})),
    transformer(('ln_1',), 'transformer.h.{}.', under('attn.', {'query': 'q_proj', 'key': 'k_proj',
                'value': 'v_proj', 'output': 'out_proj'}), {'inputs.0': 'mlp.fc_in', 'output': 'mlp.fc_out'}),
    GPT2_TOP, {'activation_function': GELU_TANH}, (r'.*\.attn\.(masked_)?bias', r'.*embed_positions'),
    'transformer.',
  ),
  Family(
    'gpt_neox', 'GPTNeoXForCausalLM', 'gin/models/gpt2/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, MLP, LAYER_NORM_EPS, ROPE,
     Head('gpt_neox.embed_in.weight', 'embed_out.weight'),
     always({**PARALLEL_EACH, **NO_POSITIONS, **EXACT_GELU})),
    transformer((PRE_NORMS,), 'gpt_neox.layers.{}.',
                {'query key value': Fused('attention.query_key_value', interleaved=True),
                 'output': 'attention.dense'}, FOUR_H),
    {'embedder.tokens': 'gpt_neox.embed_in.weight', 'stack.norm': 'gpt_neox.final_layer_norm',
     'head.kernel': 'embed_out.weight'},
    {'hidden_act': GELU, 'attention_bias': True, 'use_parallel_residual': True,
     'is_decoder': Options((False, True))},
    (r'.*\.attention\.(masked_)?bias', r'.*rotary_emb\.inv_freq'), 'gpt_neox.',
  ),
  Family(
    'phi', 'PhiForCausalLM', 'gin/models/gpt2/family.gin',
    (*SIZES, HEAD_DIM, MLP, LAYER_NORM_EPS, ROPE, HEAD, KV_HEADS_AS_QUERIES,
     always({**PARALLEL, **NO_POSITIONS, 'heads.UntiedHead.bias': True})),
    transformer(('input_layernorm',), 'model.layers.{}.', {**SELF_ATTENTION, 'output': 'self_attn.dense'},
                {'inputs.0': 'mlp.fc1', 'output': 'mlp.fc2'}),
    {**TOP, 'stack.norm': 'model.final_layernorm'}, {'hidden_act': GELU_TANH, 'qk_layernorm': False},
  ),
  Family(
    'falcon', 'FalconForCausalLM', 'gin/models/falcon/new.gin',
    (*FALCON_SIZES, Field('num_kv_heads', 'KV_HEADS', heads), Unused(('multi_query',))),
    transformer((('ln_attn', 'ln_mlp'),), 'transformer.h.{}.', FUSED_QKV, FOUR_H), FALCON_TOP,
    {**FALCON_WHEN, 'new_decoder_architecture': True, 'num_ln_in_parallel_attn': Options((2, None))},
    prefix='transformer.',
  ),
  Family(
    'falcon', 'FalconForCausalLM', 'gin/models/falcon/family.gin',
    (*FALCON_SIZES, always({'KV_HEADS': 1}), Unused(('num_kv_heads',)), Derived(_one_norm)),
    transformer(('input_layernorm',), 'transformer.h.{}.', FUSED_QKV, FOUR_H), FALCON_TOP,
    {**FALCON_WHEN, 'new_decoder_architecture': False, 'multi_query': True}, prefix='transformer.',
  ),
  Family(
    'bloom', 'BloomForCausalLM', 'gin/models/bloom/family.gin',
    (SIZES[0], SIZES[1], *GPT2_SIZES[2:], FOUR_TIMES, WORD_HEAD),
    transformer(PRE_NORMS, 'transformer.h.{}.', FUSED_QKV, FOUR_H), FALCON_TOP,
    {'apply_residual_connection_post_layernorm': False}, prefix='transformer.',
  ),
  Family(
    'mpt', 'MptForCausalLM', 'gin/models/bloom/family.gin',
    (SIZES[0], Field('d_model', 'EMBED'), Field('n_layers', 'LAYERS'), Field('n_heads', 'HEADS'),
     *GPT2_SIZES[4:], FOUR_TIMES, WTE_HEAD, Derived(_read_mpt, _write_mpt),
     Unused(('norm_type', 'learned_pos_emb')),
     always({**EXACT_GELU, 'embedder.Embedder.norm': None, 'layers.LayerNorm.bias': False,
             'mlp.Mlp.bias': False, 'attention.Attention.qkv_bias': False,
             'attention.Attention.output_bias': False})),
    transformer(('norm_1', 'norm_2'), 'transformer.blocks.{}.',
                {'query key value': Fused('attn.Wqkv'), 'output': 'attn.out_proj'},
                {'inputs.0': 'ffn.up_proj', 'output': 'ffn.down_proj'}),
    {**GPT2_TOP, 'stack.norm': 'transformer.norm_f'},
    {'no_bias': True, 'expansion_ratio': 4, 'logit_scale': None}, prefix='transformer.',
  ),
  Family(
    'opt', 'OPTForCausalLM', 'gin/models/opt/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, Field('ffn_dim', 'MLP'), Head('model.decoder.embed_tokens.weight'),
     WORD_WIDTH,
     Field('max_position_embeddings', 'POSITIONS', to_gin=_add_unused, to_hf=_without_unused)),
    transformer(('self_attn_layer_norm', 'final_layer_norm'), 'model.decoder.layers.{}.',
                {**SELF_ATTENTION, 'output': 'self_attn.out_proj'}, {'inputs.0': 'fc1', 'output': 'fc2'}),
    {'embedder.tokens': 'model.decoder.embed_tokens.weight',
     'embedder.positions': 'model.decoder.embed_positions.weight',
     'stack.norm': 'model.decoder.final_layer_norm', 'head.kernel': 'lm_head.weight'},
    {'activation_function': 'relu', 'do_layer_norm_before': True, 'enable_bias': True,
     '_remove_final_layer_norm': False, 'layer_norm_elementwise_affine': True},
  ),
)  # fmt: skip
