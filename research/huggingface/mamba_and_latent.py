"""FIXME: say what this module is."""

import math

from research.huggingface.fields import (
  HEAD_DIM_ONLY_OURS,
  KV_HEADS,
  MLP,
  RMS,
  ROPE,
  SIZES,
  Derived,
  Family,
  Field,
  Implied,
  rope_of,
  tied,
  write_rope,
)
from research.huggingface.names import Tree
from research.huggingface.tables import (
  EXPERTS,
  GATED,
  LATENT,
  MAMBA,
  MAMBA2,
  TOP,
  experts,
  tree,
  under,
)


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
    return {} if factor == 2 else {'mamba.Mamba.inner': int(factor * c['hidden_size'])}

  def write(get):
    inner = get('mamba.Mamba.inner') or 2 * get('EMBED')
    factor = inner / get('EMBED')
    return {hf: int(factor) if factor == int(factor) else factor}

  return Derived(read, write)


def _read_mamba2(c):
  implied = c['num_heads'] * c['head_dim'] == 2 * c['hidden_size']
  return {
    'HEAD_DIM': c['head_dim'], 'mamba2.Mamba2.norm_epsilon': c.get('layer_norm_epsilon', 1e-5),
    **({} if implied else {'mamba2.Mamba2.heads': c['num_heads']}),
  }  # fmt: skip


def _write_mamba2(get):
  head_dim = get('HEAD_DIM')
  heads = get('mamba2.Mamba2.heads') or 2 * get('EMBED') // head_dim
  return {'num_heads': heads, 'head_dim': head_dim, 'expand': heads * head_dim // get('EMBED')}


LATENT_FIELDS = (
  *SIZES[:2], SIZES[3], MLP, RMS, ROPE, tied(False),
  Field('n_routed_experts', 'EXPERTS'), EXPERTS[1],
  Field('moe_intermediate_size', 'EXPERT_MLP'),
  Field('qk_nope_head_dim', 'latent.LatentAttention.head_dim'),
  Field('qk_rope_head_dim', 'latent.LatentAttention.rotary_dim'),
  Field('v_head_dim', 'latent.LatentAttention.value_dim'),
  Field('kv_lora_rank', 'latent.LatentAttention.key_rank'),
  Field('routed_scaling_factor', 'moe.Router.scale', 1.0),
  Derived(lambda c: {'latent.LatentAttention.query_rank': c.get('q_lora_rank')},
          lambda get: {'q_lora_rank': get('latent.LatentAttention.query_rank')}),
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
  dims = [get(f'latent.LatentAttention.{d}') for d in ('head_dim', 'rotary_dim')]
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
    (_inner('expand'), Implied('time_step_rank', 'mamba.Mamba.rank', lambda embed: -(-embed // 16)),
     Field('state_size', 'mamba.Mamba.state', 16), Field('conv_kernel', 'mamba.Mamba.width', 4)),
    {'Mamba': under('mixer.', MAMBA)}, True,
  ),
  _mamba(
    'mamba2', 'Mamba2ForCausalLM',
    (Field('state_size', 'mamba2.Mamba2.state', 128), Field('n_groups', 'mamba2.Mamba2.groups', 8),
     Field('conv_kernel', 'mamba2.Mamba2.width', 4), Derived(_read_mamba2, _write_mamba2)),
    {'Mamba2': MAMBA2}, False,
  ),
  Family(
    'jamba', 'JambaForCausalLM', 'gin/models/jamba/52b.gin',
    (*SIZES[:2], SIZES[3], KV_HEADS, HEAD_DIM_ONLY_OURS, MLP, RMS, tied(False), *EXPERTS[:2],
     Derived(lambda c: {'PERIODS': c['num_hidden_layers'] // 8},
             lambda get: {'num_hidden_layers': 8 * get('PERIODS')}),
     _inner('mamba_expand'), Implied('mamba_dt_rank', 'mamba.Mamba.rank', lambda embed: -(-embed // 16)),
     Field('mamba_d_state', 'mamba.Mamba.state', 16), Field('mamba_d_conv', 'mamba.Mamba.width', 4)),
    tree(('input_layernorm', 'pre_ff_layernorm'), Mlp=under('feed_forward.', GATED),
         Mamba=under('mamba.', MAMBA), MoE=experts('feed_forward.', router='router')),
    {**TOP, 'stack.norm': 'model.final_layernorm'},
    {'hidden_act': 'silu', 'attn_layer_period': 8, 'attn_layer_offset': 4, 'expert_layer_period': 2,
     'expert_layer_offset': 1, 'mamba_conv_bias': True, 'mamba_proj_bias': False},
  ),
  _deepseek('V2', 'family', (_groups(1, limited=False),), {}),
  _deepseek('V3', 'v3', (_groups(2, limited=True), EXPERTS[2]), {'rope_interleave': True}),
)  # fmt: skip
