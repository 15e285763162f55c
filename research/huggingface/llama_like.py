"""LLaMA and its like: Mistral, Mixtral, Qwen, Gemma, GLM, OLMo 2 and StableLM."""

from research.huggingface.fields import (
  ACTIVE,
  HEAD_DIM,
  HEAD_DIM_ONLY_OURS,
  HEAD_DIM_OR_NULL,
  KV_HEADS,
  LAYER_NORM_EPS,
  MLP,
  NORMALISE,
  RMS,
  SILU,
  SIZES,
  Derived,
  Family,
  Field,
  Optional,
  Options,
  Raw,
  Unused,
  always,
)
from research.huggingface.heads import HEAD, Head
from research.huggingface.layers import (
  ALL_BUT_ONE,
  ALTERNATING,
  EVERY_LAYER,
  FIRST_LAYERS,
  LAST_LAYERS,
)
from research.huggingface.names import Fused
from research.huggingface.resolved import Resolved
from research.huggingface.rotary import ROPE, read_rope, write_rope
from research.huggingface.settings import Settings
from research.huggingface.tables import TOP, experts, tree

GELU_TANH = Options(('gelu_pytorch_tanh', 'gelu_new', 'gelu_fast'))
LLAMA = (*SIZES, KV_HEADS, HEAD_DIM, MLP, RMS, ROPE, HEAD)
FIRST = tuple(HEAD_DIM_OR_NULL if field is HEAD_DIM else field for field in LLAMA)
# Families whose layers differ say how many there are with the pattern.
UNLIKE = tuple(field for field in LLAMA if field is not SIZES[2])
WINDOW = Optional('sliding_window', 'attention.Attention.window')
EXPERTS = Field('num_experts', 'EXPERTS')
LOCAL_EXPERTS = Field('num_local_experts', 'EXPERTS')


def _llama(model_type, architecture, gin, fields=LLAMA, trees=None, when=None, top=TOP, **more):
  """A family whose names of tensors are LLaMA's where nothing else is said."""
  return Family(
    model_type, architecture, f'gin/models/{gin}.gin', fields, trees or tree(), top,
    {'hidden_act': SILU, **(when or {})}, **more,
  )  # fmt: skip


GEMMA_NORMS = (
  ('input_layernorm', 'post_attention_layernorm'),
  ('pre_feedforward_layernorm', 'post_feedforward_layernorm'),
)


def _read_scale(settings: Settings) -> dict:
  return {'attention.Attention.scale': settings['query_pre_attn_scalar'] ** -0.5}


def _write_scale(get: Resolved) -> dict:
  return {'query_pre_attn_scalar': _whole(_squared_length(get))}


def _squared_length(get: Resolved) -> float:
  """The square of the number that attention's logits are divided by; a head's size where no scale is bound."""
  scale = get('attention.Attention.scale')
  return get('HEAD_DIM') if scale is None else round(scale**-2, 6)


def _whole(number: float) -> float | int:
  """The number as an int if it is whole, since transformers takes only an int for some keys."""
  return int(number) if number == int(number) else number


GEMMA2 = (
  *(field for field in UNLIKE if field not in (ROPE, HEAD)),
  Head(soft_cap='final_logit_softcapping'),
  Derived(_read_scale, _write_scale),
)
SOFT_CAP = Optional('attn_logit_softcapping', 'attention.Attention.soft_cap')
GEMMA2_WHEN = {
  'hidden_activation': GELU_TANH,
  'attention_bias': False,
  'use_bidirectional_attention': Options((False, None)),
}


def _read_gemma3_rope(settings: Settings) -> dict:
  """Gemma 3 has a rotary base for each kind of layer. Its first configs have other keys for them."""
  parameters = dict(settings.get('rope_parameters') or {})
  full = {**(parameters.pop('full_attention', None) or {}), **(settings.get('rope_scaling') or {})}
  sliding = dict(parameters.pop('sliding_attention', None) or {})
  full.setdefault('rope_theta', settings['rope_theta'])
  sliding.setdefault('rope_theta', settings['rope_local_base_freq'])
  settings.child('rope_parameters', parameters)  # the keys that are left are refused
  return {
    **read_rope(settings, settings.child('rope_parameters.full_attention', full)),
    **read_rope(settings, settings.child('rope_parameters.sliding_attention', sliding), 'local/'),
  }


def _write_gemma3_rope(get: Resolved) -> dict:
  ropes = {}
  for attention in reversed(get.attentions()):  # so that the first of a kind is kept
    kind = 'sliding_attention' if attention['window'] else 'full_attention'
    ropes[kind] = write_rope(Resolved(attention['rotary']))
  return {'rope_parameters': ropes}


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
NO_MLP_ONLY = Options(([], None))
QWEN2_MOE = {
  'moe.MoE.router': Raw('@moe.Router'), 'moe.MoE.experts': Raw('%EXPERTS'), 'moe.Router.active': Raw('%ACTIVE'),
  'moe.MoE.activations': Raw('(@jax.nn.silu, @jax.nn.identity)'), 'moe.MoE.shared': Raw('@shared/mlp.Mlp'),
  'moe.MoE.shared_gate': True, 'stack.Stack.parts': Raw('(@attention.Attention, @moe.MoE)'),
}  # fmt: skip


def _read_shared(settings: Settings) -> dict:
  return {'shared/mlp.Mlp.mlp': settings['shared_expert_intermediate_size']}


def _write_shared(get: Resolved) -> dict:
  return {'shared_expert_intermediate_size': get.argument('moe.MoE.shared', 'mlp')}


SHARED_MLP = Derived(_read_shared, _write_shared)

LLAMA_LIKE = (
  _llama('llama', 'LlamaForCausalLM', 'llama/family', FIRST, when={'attention_bias': False, 'mlp_bias': False}),
  _llama('mistral', 'MistralForCausalLM', 'llama/family', (*FIRST, WINDOW)),
  _llama('mixtral', 'MixtralForCausalLM', 'mixtral/family', (*FIRST, LOCAL_EXPERTS, ACTIVE, WINDOW),
         tree(MoE=experts('block_sparse_moe.', names=('w1', 'w3', 'w2')))),
  _llama('qwen2', 'Qwen2ForCausalLM', 'qwen2/family', (*UNLIKE, LAST_LAYERS)),
  _llama(
    'qwen2_moe', 'Qwen2MoeForCausalLM', 'qwen2/family',
    (*(field for field in UNLIKE if field is not MLP), Unused(('intermediate_size',)), EXPERTS, ACTIVE,
     NORMALISE, Field('moe_intermediate_size', 'moe.MoE.mlp'),
     SHARED_MLP, Field('qkv_bias', 'attention.Attention.qkv_bias'),
     always(QWEN2_MOE), FIRST_LAYERS),
    when={'decoder_sparse_step': 1, 'mlp_only_layers': NO_MLP_ONLY},
  ),
  _llama('qwen3', 'Qwen3ForCausalLM', 'qwen3/family', (*UNLIKE, LAST_LAYERS), when={'attention_bias': False}),
  _llama(
    'qwen3_moe', 'Qwen3MoeForCausalLM', 'qwen3/moe',
    (*(field for field in UNLIKE if field is not MLP), LOCAL_EXPERTS, ACTIVE, NORMALISE,
     Unused(('intermediate_size',)), Field('moe_intermediate_size', 'MLP'), EVERY_LAYER),
    when={'attention_bias': False, 'decoder_sparse_step': 1, 'mlp_only_layers': NO_MLP_ONLY},
  ),
  # Released configs of Gemma have 'gelu', and transformers takes it for the approximation by tanh.
  _llama('gemma', 'GemmaForCausalLM', 'gemma/family',
         when={'hidden_act': Options((*GELU_TANH, 'gelu')), 'attention_bias': False,
               'use_bidirectional_attention': Options((False, None))}),
  Family('gemma2', 'Gemma2ForCausalLM', 'gin/models/gemma2/family.gin', (*GEMMA2, SOFT_CAP, ROPE, ALTERNATING),
         tree(GEMMA_NORMS), TOP, GEMMA2_WHEN),
  Family('gemma3_text', 'Gemma3ForCausalLM', 'gin/models/gemma3/family.gin',
         (*GEMMA2, Derived(_read_gemma3_rope, _write_gemma3_rope), ALL_BUT_ONE), tree(GEMMA_NORMS), TOP,
         # Gemma 3 has the key of Gemma 2, but transformers does not apply the cap.
         {**GEMMA2_WHEN, 'attn_logit_softcapping': None}),
  _llama('glm', 'GlmForCausalLM', 'glm/family', trees=tree(**GLM_PARTS),
         fields=(*LLAMA, Field('attention_bias', 'attention.Attention.qkv_bias'))),
  _llama('glm4', 'Glm4ForCausalLM', 'glm/family', trees=tree(GLM_NORMS4, **GLM_PARTS),
         fields=(*LLAMA, Field('attention_bias', 'attention.Attention.qkv_bias'), always(SANDWICH))),
  _llama('olmo2', 'Olmo2ForCausalLM', 'olmo2/family',
         trees=tree(('post_attention_layernorm', 'post_feedforward_layernorm')),
         when={'attention_bias': False}),
  _llama('stablelm', 'StableLmForCausalLM', 'stablelm/family',
         (*SIZES, KV_HEADS, HEAD_DIM_ONLY_OURS, MLP, ROPE, HEAD, LAYER_NORM_EPS,
          Field('use_qkv_bias', 'attention.Attention.qkv_bias')),
         when={'qk_layernorm': False, 'use_parallel_residual': False}),
)  # fmt: skip
