"""FIXME: say what this module is."""

from research.huggingface.fields import (
  HEAD_DIM_ONLY_OURS,
  LAYER_NORM,
  MLP,
  ROPE,
  SIZES,
  Derived,
  Family,
  Field,
  Raw,
  always,
  head_dim,
  tied,
)
from research.huggingface.names import Fused
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


INNER = Field('n_inner', 'MLP', lambda c: 4 * c['n_embd'])


FOUR_TIMES = Derived(lambda c: {'MLP': 4 * c.get('hidden_size', c.get('d_model'))})


LAYER_NORM_EPS = Field('layer_norm_eps', 'layers.LayerNorm.epsilon', 1e-5)


FALCON_SIZES = (*SIZES, HEAD_DIM_ONLY_OURS, LAYER_NORM, ROPE, tied(True))


FALCON_MLP = Field('ffn_hidden_size', 'MLP', lambda c: 4 * c['hidden_size'])


FALCON_WHEN = {'parallel_attn': True, 'bias': False, 'alibi': False}


BERT_ATTENTION = {
  'query': 'attention.self.query', 'key': 'attention.self.key', 'value': 'attention.self.value',
  'output': 'attention.output.dense',
}  # fmt: skip


def _rotary_dim(get):
  return round(get('positions.rotary.fraction') * get('HEAD_DIM'))


GPT_LIKE = (
  Family(
    'gpt2', 'GPT2LMHeadModel', 'gin/models/gpt2/family.gin',
    (*GPT2_SIZES, INNER, Field('n_positions', 'POSITIONS', 1024), tied(True)),
    transformer(
      ('ln_1', 'ln_2'), 'transformer.h.{}.',
      {'query key value': Fused('attn.c_attn', untransposed=True),
       'output': Fused('attn.c_proj', untransposed=True)},
      {'inputs.0': Fused('mlp.c_fc', untransposed=True), 'output': Fused('mlp.c_proj', untransposed=True)},
    ),
    GPT2_TOP, {'activation_function': 'gelu_new', 'scale_attn_weights': True,
               'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False},
    (r'.*attn\.(masked_)?bias',),
  ),
  Family(
    'gptj', 'GPTJForCausalLM', 'gin/models/gpt2/family.gin',
    (*GPT2_SIZES, INNER, tied(False),
     Derived(lambda c: {'positions.rotary.fraction': c['rotary_dim'] / head_dim(c)},
             lambda get: {'rotary_dim': _rotary_dim(get)}),
     always({**PARALLEL, **NO_POSITIONS, 'positions.rotary.interleaved': True, 'heads.UntiedHead.bias': True,
             'attention.Attention.qkv_bias': False, 'attention.Attention.output_bias': False})),
    transformer(('ln_1',), 'transformer.h.{}.', under('attn.', {'query': 'q_proj', 'key': 'k_proj',
                'value': 'v_proj', 'output': 'out_proj'}), {'inputs.0': 'mlp.fc_in', 'output': 'mlp.fc_out'}),
    GPT2_TOP, {'activation_function': 'gelu_new'}, (r'.*attn\.(masked_)?bias', r'.*embed_positions'),
  ),
  Family(
    'gpt_neox', 'GPTNeoXForCausalLM', 'gin/models/gpt2/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, MLP, LAYER_NORM_EPS, ROPE, tied(False),
     always({**PARALLEL_EACH, **NO_POSITIONS, **EXACT_GELU})),
    transformer((PRE_NORMS,), 'gpt_neox.layers.{}.',
                {'query key value': Fused('attention.query_key_value', interleaved=True),
                 'output': 'attention.dense'}, FOUR_H),
    {'embedder.tokens': 'gpt_neox.embed_in.weight', 'stack.norm': 'gpt_neox.final_layer_norm',
     'head.kernel': 'embed_out.weight'},
    {'hidden_act': 'gelu', 'attention_bias': True, 'use_parallel_residual': True},
    (r'.*attention\.(masked_)?bias', r'.*rotary_emb\.inv_freq'),
  ),
  Family(
    'phi', 'PhiForCausalLM', 'gin/models/gpt2/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, MLP, LAYER_NORM_EPS, ROPE, tied(False),
     Derived(write=lambda get: {'num_key_value_heads': get('HEADS')}),
     always({**PARALLEL, **NO_POSITIONS, 'heads.UntiedHead.bias': True})),
    transformer(('input_layernorm',), 'model.layers.{}.', {**SELF_ATTENTION, 'output': 'self_attn.dense'},
                {'inputs.0': 'mlp.fc1', 'output': 'mlp.fc2'}),
    {**TOP, 'stack.norm': 'model.final_layernorm'}, {'hidden_act': 'gelu_new', 'qk_layernorm': False},
  ),
  Family(
    'falcon', 'FalconForCausalLM', 'gin/models/falcon/new.gin',
    (*FALCON_SIZES, FALCON_MLP, Field('num_kv_heads', 'KV_HEADS')),
    transformer((('ln_attn', 'ln_mlp'),), 'transformer.h.{}.', FUSED_QKV, FOUR_H), FALCON_TOP,
    {**FALCON_WHEN, 'new_decoder_architecture': True},
  ),
  Family(
    'falcon', 'FalconForCausalLM', 'gin/models/falcon/family.gin',
    (*FALCON_SIZES, FALCON_MLP, always({'KV_HEADS': 1})),
    transformer(('input_layernorm',), 'transformer.h.{}.', FUSED_QKV, FOUR_H), FALCON_TOP,
    {**FALCON_WHEN, 'new_decoder_architecture': False, 'multi_query': True},
  ),
  Family(
    'bloom', 'BloomForCausalLM', 'gin/models/bloom/family.gin',
    (SIZES[0], SIZES[1], *GPT2_SIZES[2:], FOUR_TIMES, tied(True)),
    transformer(PRE_NORMS, 'transformer.h.{}.', FUSED_QKV, FOUR_H), FALCON_TOP,
    {'apply_residual_connection_post_layernorm': False},
  ),
  Family(
    'mpt', 'MptForCausalLM', 'gin/models/bloom/family.gin',
    (SIZES[0], Field('d_model', 'EMBED'), Field('n_layers', 'LAYERS'), Field('n_heads', 'HEADS'),
     *GPT2_SIZES[4:], FOUR_TIMES, tied(True),
     always({**EXACT_GELU, 'embedder.Embedder.norm': None, 'layers.LayerNorm.bias': False,
             'mlp.Mlp.bias': False, 'attention.Attention.qkv_bias': False,
             'attention.Attention.output_bias': False})),
    transformer(('norm_1', 'norm_2'), 'transformer.blocks.{}.',
                {'query key value': Fused('attn.Wqkv'), 'output': 'attn.out_proj'},
                {'inputs.0': 'ffn.up_proj', 'output': 'ffn.down_proj'}),
    {**GPT2_TOP, 'stack.norm': 'transformer.norm_f'}, {'no_bias': True, 'expansion_ratio': 4},
  ),
  Family(
    'opt', 'OPTForCausalLM', 'gin/models/opt/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, Field('ffn_dim', 'MLP'), tied(True),
     Derived(write=lambda get: {'word_embed_proj_dim': get('EMBED')}),
     Field('max_position_embeddings', 'POSITIONS', to_gin=lambda n: n + 2, to_hf=lambda n: n - 2)),
    transformer(('self_attn_layer_norm', 'final_layer_norm'), 'model.decoder.layers.{}.',
                {**SELF_ATTENTION, 'output': 'self_attn.out_proj'}, {'inputs.0': 'fc1', 'output': 'fc2'}),
    {'embedder.tokens': 'model.decoder.embed_tokens.weight',
     'embedder.positions': 'model.decoder.embed_positions.weight',
     'stack.norm': 'model.decoder.final_layer_norm', 'head.kernel': 'lm_head.weight'},
    {'activation_function': 'relu', 'do_layer_norm_before': True, 'enable_bias': True},
  ),
  Family(
    'bert', 'BertForMaskedLM', 'gin/models/bert/family.gin',
    (*SIZES, HEAD_DIM_ONLY_OURS, MLP, Field('max_position_embeddings', 'POSITIONS'),
     Field('type_vocab_size', 'embedder.Embedder.types', 2),
     Field('layer_norm_eps', 'layers.LayerNorm.epsilon', 1e-12)),
    transformer(('attention.output.LayerNorm', 'output.LayerNorm'), 'bert.encoder.layer.{}.',
                BERT_ATTENTION, {'inputs.0': 'intermediate.dense', 'output': 'output.dense'}),
    {'embedder.tokens': 'bert.embeddings.word_embeddings.weight',
     'embedder.positions': 'bert.embeddings.position_embeddings.weight',
     'embedder.types': 'bert.embeddings.token_type_embeddings.weight',
     'embedder.norm': 'bert.embeddings.LayerNorm', 'head.dense': 'cls.predictions.transform.dense',
     'head.norm': 'cls.predictions.transform.LayerNorm', 'head.bias': 'cls.predictions.bias'},
    {'hidden_act': 'gelu', 'is_decoder': False},
    (r'cls\.predictions\.decoder\..*', r'.*position_ids', r'cls\.seq_relationship\..*', r'bert\.pooler\..*'),
  ),
)  # fmt: skip
