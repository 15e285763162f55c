"""FIXME: say what this module is."""

from research.huggingface.fields import (
  HEAD_DIM_ONLY_OURS,
  KV_HEADS,
  LLAMA,
  MLP,
  ROPE,
  SIZES,
  WINDOW,
  Derived,
  Family,
  Field,
  Raw,
  always,
  read_rope,
  tied,
  write_rope,
)
from research.huggingface.names import Fused
from research.huggingface.tables import EXPERTS, SCALE, TOP, experts, tree


def _llama(model_type, architecture, gin, fields=(), trees=None, top=TOP, tie=False, when=None):
  when = (
    {'hidden_act': 'silu', 'attention_bias': False, 'mlp_bias': False} if when is None else when
  )
  fields = (*LLAMA, tied(tie), *fields)
  return Family(
    model_type, architecture, f'gin/models/{gin}.gin', fields, trees or tree(), top, when
  )


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
  Field('final_logit_softcapping', 'heads.TiedHead.soft_cap'),
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
  'stack.Stack.residual': Raw('@residual.SandwichNorm'),
  'residual.SandwichNorm.norm': Raw('@layers.RMSNorm'),
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
     Field('shared_expert_intermediate_size', 'shared/mlp.Mlp.mlp'),
     always({
       'stack.Stack.parts': Raw('(@attention.Attention, @moe.MoE)'), 'moe.MoE.router': Raw('@moe.Router'),
       'moe.MoE.experts': Raw('%EXPERTS'), 'moe.Router.active': Raw('%ACTIVE'),
       'moe.MoE.activations': Raw('(@jax.nn.silu, @jax.nn.identity)'),
       'moe.MoE.shared': Raw('@shared/mlp.Mlp'), 'moe.MoE.shared_gate': True,
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
