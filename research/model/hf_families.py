"""Families as Hugging Face has them: names of tensors per part, and keys of config.json beside gin's.

A row is a `Family`. Most are a gin file, tables of names shared with others, and the keys that differ.
"""

import dataclasses
import math

from research.model.hf_config import (
  HEAD_DIM_ONLY_OURS,
  KV_HEADS,
  LAYER_NORM,
  LLAMA,
  MLP,
  RMS,
  ROPE,
  SIZES,
  WINDOW,
  Derived,
  Family,
  Field,
  Implied,
  Raw,
  always,
  head_dim,
  read_rope,
  rope_of,
  tied,
  write_rope,
)  # fmt: skip
from research.model.hf_names import Fused, Tree

SELF_ATTENTION = {
  'query': 'self_attn.q_proj', 'key': 'self_attn.k_proj', 'value': 'self_attn.v_proj',
  'output': 'self_attn.o_proj', 'query_norm': 'self_attn.q_norm', 'key_norm': 'self_attn.k_norm',
}  # fmt: skip
GATED = {'inputs.0': 'gate_proj', 'inputs.1': 'up_proj', 'output': 'down_proj'}


def under(prefix: str, table: dict, ours: str = '') -> dict:
  """The same names below a prefix (and our members below another)."""
  below = lambda v: (
    dataclasses.replace(v, name=prefix + v.name) if isinstance(v, Fused) else prefix + v
  )
  return {ours + k: below(v) for k, v in table.items()}


def experts(prefix: str, shared: str = 'shared_expert', **names: str) -> dict[str, str]:
  gate, up, down = names.get('names', 'gate_proj up_proj down_proj').split()
  router = names.get('router', 'gate')
  return {
    'router.kernel': f'{prefix}{router}.weight',
    'router.bias': f'{prefix}{router}.e_score_correction_bias',
    'experts.inputs.0': f'{prefix}experts.{{}}.{gate}.weight',
    'experts.inputs.1': f'{prefix}experts.{{}}.{up}.weight',
    'experts.output': f'{prefix}experts.{{}}.{down}.weight',
    **under(f'{prefix}{shared}.', GATED, 'shared.'),
    'shared_gate': f'{prefix}shared_expert_gate.weight',
  }


LATENT = {
  'query': 'self_attn.q_proj', 'query_up': 'self_attn.q_b_proj', 'query_down': 'self_attn.q_a_proj',
  'query_norm': 'self_attn.q_a_layernorm',
  'key_down key_rotary': Fused('self_attn.kv_a_proj_with_mqa'),
  'key_norm': 'self_attn.kv_a_layernorm',
  'key value': Fused('self_attn.kv_b_proj', interleaved=True), 'output': 'self_attn.o_proj',
}  # fmt: skip
MAMBA = {
  'input gate': Fused('in_proj'), 'convolution': 'conv1d', 'step_down b c': Fused('x_proj'),
  'step': 'dt_proj', 'step_bias': 'dt_proj.bias', 'log_a': 'A_log', 'd': 'D', 'output': 'out_proj',
  'step_norm': 'dt_layernorm', 'b_norm': 'b_layernorm', 'c_norm': 'c_layernorm',
}  # fmt: skip
MAMBA2 = {
  'gate input b c step': Fused('mixer.in_proj'),
  'input_convolution b_convolution c_convolution': Fused('mixer.conv1d'),
  'step_bias': 'mixer.dt_bias', 'log_a': 'mixer.A_log', 'd': 'mixer.D',
  'norm_scale': 'mixer.norm.weight', 'output': 'mixer.out_proj',
}  # fmt: skip

TOP = {
  'embedder.tokens': 'model.embed_tokens.weight',
  'stack.norm': 'model.norm',
  'head.kernel': 'lm_head.weight',
  'head.bias': 'lm_head.bias',
}
PRE_NORMS = ('input_layernorm', 'post_attention_layernorm')
LLAMA_PARTS = {
  'Attention': SELF_ATTENTION, 'Mlp': under('mlp.', GATED), 'MoE': experts('mlp.'),
}  # fmt: skip


def tree(norms=PRE_NORMS, layer='model.layers.{}.', **parts) -> tuple[Tree, ...]:
  return (Tree('stack', layer, norms, {**LLAMA_PARTS, **parts}),)


def transformer(norms, layer, attention, mlp) -> tuple[Tree, ...]:
  return (Tree('stack', layer, norms, {'Attention': attention, 'Mlp': mlp}),)


def _llama(model_type, architecture, gin, fields=(), trees=None, top=TOP, tie=False, when=None):
  when = (
    {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False} if when is None else when
  )
  fields = (*LLAMA, tied(tie), *fields)
  return Family(
    model_type, architecture, f'gin/models/{gin}.gin', fields, trees or tree(), top, when
  )


EXPERTS = (
  Field('num_experts', 'EXPERTS', lambda c: c['num_local_experts']),
  Field('num_experts_per_tok', 'ACTIVE'),
  Field('norm_topk_prob', 'moe.Router.normalise', False),
)
SCALE = Field(
  'query_pre_attn_scalar', 'attention.Attention.scale',
  to_gin=lambda n: n**-0.5, to_hf=lambda scale: round(scale**-2, 6),
)  # fmt: skip
GEMMA_NORMS = (
  ('input_layernorm', 'post_attention_layernorm'),
  ('pre_feedforward_layernorm', 'post_feedforward_layernorm'),
)
GELU_TANH = {'hidden_activation': 'gelu_pytorch_tanh', 'attention_bias': False}
GEMMA2 = (
  Derived(
    lambda c: {'PERIODS': c['num_hidden_layers'] // 2},
    lambda get: {'num_hidden_layers': 2 * get('PERIODS')},
  ),
  Field('sliding_window', 'WINDOW'),
  SCALE,
  Field('attn_logit_softcapping', 'attention.Attention.soft_cap'),
  Field('final_logit_softcapping', 'models.TiedHead.soft_cap'),
)


def _read_gemma3(c):
  rope = c['rope_parameters']
  periods, rest = divmod(c['num_hidden_layers'], 6)
  stacks = '(@stack.Stack, @rest/stack.Stack)' if rest else '(@stack.Stack,)'
  return {
    'PERIODS': periods, **({'REST': rest} if rest else {}), 'stack.Stacks.stacks': Raw(stacks),
    **read_rope(rope['full_attention']), **read_rope(rope['sliding_attention'], 'local/'),
  }  # fmt: skip


def _write_gemma3(get):
  rest = get('REST') if len(get('stack.Stacks.stacks')) > 1 else 0
  rope = {'full_attention': write_rope(get), 'sliding_attention': write_rope(get, 'local/')}
  return {'num_hidden_layers': 6 * get('PERIODS') + rest, 'rope_parameters': rope}


GEMMA_FIELDS = tuple(f for f in LLAMA if f not in (ROPE, SIZES[2]))
GLM_PARTS = {
  'Mlp': {'inputs.0 inputs.1': Fused('mlp.gate_up_proj'), 'output': 'mlp.down_proj'},
}
GLM_NORMS4 = (
  ('input_layernorm', 'post_self_attn_layernorm'),
  ('post_attention_layernorm', 'post_mlp_layernorm'),
)
SANDWICH = {
  'stack.Stack.residual': Raw('@stack.SandwichNorm'),
  'stack.SandwichNorm.norm': Raw('@layers.RMSNorm'),
}

LLAMA_LIKE = (
  _llama('llama', 'LlamaForCausalLM', 'llama/family'),
  _llama('mistral', 'MistralForCausalLM', 'llama/family', (WINDOW,), when={'hidden_act': 'silu'}),
  _llama(
    'mixtral', 'MixtralForCausalLM', 'mixtral/family',
    (Field('num_local_experts', 'EXPERTS'), EXPERTS[1], WINDOW),
    tree(MoE=experts('block_sparse_moe.', names='w1 w3 w2')), when={'hidden_act': 'silu'},
  ),
  _llama('qwen2', 'Qwen2ForCausalLM', 'qwen2/family', when={'hidden_act': 'silu', 'use_sliding_window': False}),
  _llama(
    'qwen2_moe', 'Qwen2MoeForCausalLM', 'qwen2/family',
    (*EXPERTS, Field('moe_intermediate_size', 'moe.MoE.mlp'),
     Field('shared_expert_intermediate_size', 'shared/layers.Mlp.mlp'),
     always({
       'stack.Stack.parts': Raw('(@attention.Attention, @moe.MoE)'), 'moe.MoE.router': Raw('@moe.Router'),
       'moe.MoE.experts': Raw('%EXPERTS'), 'moe.Router.active': Raw('%ACTIVE'),
       'moe.MoE.activations': Raw('(@jax.nn.silu, @jax.nn.identity)'),
       'moe.MoE.shared': Raw('@shared/layers.Mlp'), 'moe.MoE.shared_gate': True,
     })),
    when={'hidden_act': 'silu', 'decoder_sparse_step': 1, 'mlp_only_layers': []},
  ),
  _llama('qwen3', 'Qwen3ForCausalLM', 'qwen3/family', when={'hidden_act': 'silu', 'attention_bias': False}),
  _llama(
    'qwen3_moe', 'Qwen3MoeForCausalLM', 'qwen3/moe',
    (*EXPERTS, Derived(lambda c: {'MLP': c['moe_intermediate_size']},
                       lambda get: {'moe_intermediate_size': get('MLP')})),
    when={'hidden_act': 'silu', 'attention_bias': False, 'decoder_sparse_step': 1, 'mlp_only_layers': []},
  ),
  _llama('gemma', 'GemmaForCausalLM', 'gemma/family', tie=True, when={'attention_bias': False}),
  Family(
    'gemma2', 'Gemma2ForCausalLM', 'gin/models/gemma2/family.gin',
    (*GEMMA_FIELDS, ROPE, *GEMMA2), tree(GEMMA_NORMS), TOP, GELU_TANH,
  ),
  Family(
    'gemma3_text', 'Gemma3ForCausalLM', 'gin/models/gemma3/family.gin',
    (*GEMMA_FIELDS, *GEMMA2[1:], Derived(_read_gemma3, _write_gemma3)),
    tree(GEMMA_NORMS), {**TOP, 'stack.norm': 'model.norm'}, GELU_TANH,
  ),
  _llama('glm', 'GlmForCausalLM', 'glm/family', trees=tree(**GLM_PARTS),
         when={'hidden_act': 'silu', 'attention_bias': True}),
  _llama('glm4', 'Glm4ForCausalLM', 'glm/family', (always(SANDWICH),), tree(GLM_NORMS4, **GLM_PARTS),
         when={'hidden_act': 'silu', 'attention_bias': True}),
  _llama('olmo2', 'Olmo2ForCausalLM', 'olmo2/family',
         trees=tree(('post_attention_layernorm', 'post_feedforward_layernorm'))),
  Family(
    'stablelm', 'StableLmForCausalLM', 'gin/models/stablelm/family.gin',
    (*SIZES, KV_HEADS, HEAD_DIM_ONLY_OURS, MLP, ROPE, tied(False),
     Field('layer_norm_eps', 'layers.LayerNorm.epsilon', 1e-5),
     Field('use_qkv_bias', 'attention.Attention.qkv_bias', False)),
    tree(), TOP, {'hidden_act': 'silu', 'qk_layernorm': False, 'use_parallel_residual': False},
  ),
)  # fmt: skip

# GPT-2 and its like: one gin family, with what differs bound on top.

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
PARALLEL = {'stack.Stack.parts': Raw('((@attention.Attention, @layers.Mlp),)')}
PARALLEL_EACH = {
  **PARALLEL,
  'stack.Stack.residual': Raw('@stack.PreNormEach'),
  'stack.PreNormEach.norm': Raw('@layers.LayerNorm'),
}
EXACT_GELU = {
  'exact/jax.nn.gelu.approximate': False,
  'layers.Mlp.activations': Raw('(@exact/jax.nn.gelu,)'),
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
     always({**PARALLEL, **NO_POSITIONS, 'positions.rotary.interleaved': True, 'models.UntiedHead.bias': True,
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
     always({**PARALLEL, **NO_POSITIONS, 'models.UntiedHead.bias': True})),
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
     always({**EXACT_GELU, 'models.Embedder.norm': None, 'layers.LayerNorm.bias': False,
             'layers.Mlp.bias': False, 'attention.Attention.qkv_bias': False,
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
     Field('type_vocab_size', 'models.Embedder.types', 2),
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

# T5 and Switch: two stacks.

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
    'models.EncoderDecoder.head': Raw('@models.UntiedHead' if untied else '@models.TiedHead'),
    'models.TiedHead.scale': Raw('@models.inverse_sqrt') if scaled else 1.0,
  }


T5_HEAD = Derived(
  _t5_head,
  lambda get: {
    'tie_word_embeddings': str(get('models.EncoderDecoder.head')).endswith('TiedHead'),
    'scale_decoder_outputs': get('models.TiedHead.scale') != 1.0,
  },
)
MT5_HEAD = Derived(lambda c: {**_t5_head(c), 'models.TiedHead.scale': 1.0})
SWITCH_HEAD = Derived(
  lambda c: {**_t5_head(c), 'models.TiedHead.scale': Raw('@models.inverse_sqrt')}
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

# State spaces, and attention to latent vectors.


def _mamba(model_type, architecture, fields, parts, tie):
  top = {
    'embedder.tokens': 'backbone.embeddings.weight',
    'stack.norm': 'backbone.norm_f',
    'head.kernel': 'lm_head.weight',
  }
  sizes = (
    *SIZES[:3],
    Field('layer_norm_epsilon', 'layers.RMSNorm.epsilon', 1e-5),
    tied(tie),
    *fields,
  )
  trees = (Tree('stack', 'backbone.layers.{}.', ('norm',), parts),)
  when = {'hidden_act': 'silu', 'use_bias': False, 'use_conv_bias': True}
  return Family(
    model_type, architecture, f'gin/models/{model_type}/family.gin', sizes, trees, top, when
  )


def _inner(hf: str) -> Derived:
  """Their factor of the width and our number of channels."""

  def read(c):
    factor = c.get(hf, 2)
    return {} if factor == 2 else {'ssm.Mamba.inner': int(factor * c['hidden_size'])}

  def write(get):
    inner = get('ssm.Mamba.inner') or 2 * get('EMBED')
    factor = inner / get('EMBED')
    return {hf: int(factor) if factor == int(factor) else factor}

  return Derived(read, write)


def _read_mamba2(c):
  implied = c['num_heads'] * c['head_dim'] == 2 * c['hidden_size']
  return {
    'HEAD_DIM': c['head_dim'], 'ssm.Mamba2.norm_epsilon': c.get('layer_norm_epsilon', 1e-5),
    **({} if implied else {'ssm.Mamba2.heads': c['num_heads']}),
  }  # fmt: skip


def _write_mamba2(get):
  head_dim = get('HEAD_DIM')
  heads = get('ssm.Mamba2.heads') or 2 * get('EMBED') // head_dim
  return {'num_heads': heads, 'head_dim': head_dim, 'expand': heads * head_dim // get('EMBED')}


LATENT_FIELDS = (
  *SIZES[:2], SIZES[3], MLP, RMS, ROPE, tied(False),
  Field('n_routed_experts', 'EXPERTS'), EXPERTS[1],
  Field('moe_intermediate_size', 'EXPERT_MLP'),
  Field('qk_nope_head_dim', 'attention.LatentAttention.head_dim'),
  Field('qk_rope_head_dim', 'attention.LatentAttention.rotary_dim'),
  Field('v_head_dim', 'attention.LatentAttention.value_dim'),
  Field('kv_lora_rank', 'attention.LatentAttention.key_rank'),
  Field('routed_scaling_factor', 'moe.Router.scale', 1.0),
  Derived(lambda c: {'attention.LatentAttention.query_rank': c.get('q_lora_rank')},
          lambda get: {'q_lora_rank': get('attention.LatentAttention.query_rank')}),
)  # fmt: skip


def _read_latent(c):
  rope = rope_of(c)
  mscale = rope.get('mscale_all_dim') if rope['rope_type'] == 'yarn' else None
  grow = 0.1 * mscale * math.log(rope['factor']) + 1 if mscale else 1.0
  return {
    'DENSE_LAYERS': c['first_k_dense_replace'],
    'MOE_LAYERS': c['num_hidden_layers'] - c['first_k_dense_replace'],
    'SHARED_MLP': c['n_shared_experts'] * c['moe_intermediate_size'],
    'LOGIT_SCALE': (c['qk_nope_head_dim'] + c['qk_rope_head_dim']) ** -0.5 * grow**2,
  }


def _write_latent(get):
  dims = [get(f'attention.LatentAttention.{d}') for d in ('head_dim', 'rotary_dim')]
  config = {
    'first_k_dense_replace': get('DENSE_LAYERS'),
    'num_hidden_layers': get('DENSE_LAYERS') + get('MOE_LAYERS'),
    'n_shared_experts': get('SHARED_MLP') // get('EXPERT_MLP'),
    'num_key_value_heads': get('HEADS'),
    'rope_parameters': write_rope(get),
  }
  grow = math.sqrt(get('LOGIT_SCALE') * math.sqrt(sum(dims)))
  if config['rope_parameters']['rope_type'] == 'yarn' and grow > 1 + 1e-6:
    config['rope_parameters']['mscale_all_dim'] = (grow - 1) / (
      0.1 * math.log(config['rope_parameters']['factor'])
    )
  return config


def _groups(top: int, limited: bool) -> Derived:
  def read(c):
    groups = (c['n_group'], c['topk_group']) if limited or c['topk_method'] != 'greedy' else (1, 1)
    return {
      'moe.Router.groups': groups[0],
      'moe.Router.active_groups': groups[1],
      'moe.Router.group_top': top if groups[0] > 1 else 1,
    }

  def write(get):
    groups = get('moe.Router.groups')
    method = {} if limited else {'topk_method': 'greedy' if groups == 1 else 'group_limited_greedy'}
    return {'n_group': groups, 'topk_group': get('moe.Router.active_groups'), **method}

  return Derived(read, write)


LATENT_TREE = tree(LatentAttention=LATENT, MoE=experts('mlp.', 'shared_experts'))


def _deepseek(version: str, gin: str, fields, when) -> Family:
  return Family(
    f'deepseek_{version.lower()}', f'Deepseek{version}ForCausalLM', f'gin/models/deepseek/{gin}.gin',
    (*LATENT_FIELDS, Derived(_read_latent, _write_latent), *fields), LATENT_TREE, TOP,
    {'hidden_act': 'silu', 'attention_bias': False, **when}, (r'model\.layers\.\d+\.mtp.*',),
  )  # fmt: skip


OTHERS = (
  _mamba(
    'mamba', 'MambaForCausalLM',
    (_inner('expand'), Implied('time_step_rank', 'ssm.Mamba.rank', lambda embed: -(-embed // 16)),
     Field('state_size', 'ssm.Mamba.state', 16), Field('conv_kernel', 'ssm.Mamba.width', 4)),
    {'Mamba': under('mixer.', MAMBA)}, True,
  ),
  _mamba(
    'mamba2', 'Mamba2ForCausalLM',
    (Field('state_size', 'ssm.Mamba2.state', 128), Field('n_groups', 'ssm.Mamba2.groups', 8),
     Field('conv_kernel', 'ssm.Mamba2.width', 4), Derived(_read_mamba2, _write_mamba2)),
    {'Mamba2': MAMBA2}, False,
  ),
  Family(
    'jamba', 'JambaForCausalLM', 'gin/models/jamba/52b.gin',
    (*SIZES[:2], SIZES[3], KV_HEADS, HEAD_DIM_ONLY_OURS, MLP, RMS, tied(False), *EXPERTS[:2],
     Derived(lambda c: {'PERIODS': c['num_hidden_layers'] // 8},
             lambda get: {'num_hidden_layers': 8 * get('PERIODS')}),
     _inner('mamba_expand'), Implied('mamba_dt_rank', 'ssm.Mamba.rank', lambda embed: -(-embed // 16)),
     Field('mamba_d_state', 'ssm.Mamba.state', 16), Field('mamba_d_conv', 'ssm.Mamba.width', 4)),
    tree(('input_layernorm', 'pre_ff_layernorm'), Mlp=under('feed_forward.', GATED),
         Mamba=under('mamba.', MAMBA), MoE=experts('feed_forward.', router='router')),
    {**TOP, 'stack.norm': 'model.final_layernorm'},
    {'hidden_act': 'silu', 'attn_layer_period': 8, 'attn_layer_offset': 4, 'expert_layer_period': 2,
     'expert_layer_offset': 1, 'mamba_conv_bias': True, 'mamba_proj_bias': False},
  ),
  _deepseek('V2', 'family', (_groups(1, limited=False),), {}),
  _deepseek('V3', 'v3', (_groups(2, limited=True), EXPERTS[2]), {'rope_interleave': True}),
)  # fmt: skip

FAMILIES = (*LLAMA_LIKE, *GPT_LIKE, *ENCODER_DECODERS, *OTHERS)
