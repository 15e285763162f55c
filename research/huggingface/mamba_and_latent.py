"""State-space models (Mamba, Mamba-2, Jamba) and attention to latent vectors (DeepSeek-V2 and V3)."""

import math

from research.core.errors import UserError
from research.huggingface.fields import (
  ACTIVE,
  HEAD_DIM,
  KV_HEADS,
  MLP,
  NORMALISE,
  RMS,
  SILU,
  SIZES,
  Derived,
  Family,
  Field,
  Get,
  Implied,
  Optional,
  Unused,
  computed,
  equal,
  heads,
)
from research.huggingface.heads import HEAD, Head
from research.huggingface.names import Tree
from research.huggingface.rotary import grow, kind_of, read_rope, rope_of, write_rope
from research.huggingface.settings import Settings
from research.huggingface.tables import (
  GATED,
  LATENT,
  MAMBA,
  MAMBA2,
  TOP,
  experts,
  tree,
  under,
)


def _mamba(model_type, architecture, fields, parts) -> Family:
  """A row for a model of state-space layers alone; `parts` is the table of their names."""
  top = {
    'embedder.tokens': 'backbone.embeddings.weight',
    'stack.norm': 'backbone.norm_f',
    'head.kernel': 'lm_head.weight',
  }
  sizes = (
    *SIZES[:3],
    Field('layer_norm_epsilon', 'layers.RMSNorm.epsilon'),
    Head('backbone.embeddings.weight'),
    computed('layer_types'),
    *fields,
  )
  trees = (Tree('stack', 'backbone.layers.{}.', ('norm',), parts),)
  # With rescale_prenorm_residual transformers divides loaded weights as if they were new.
  when = {
    'hidden_act': SILU, 'use_bias': False, 'use_conv_bias': True, 'rescale_prenorm_residual': False,
  }  # fmt: skip
  return Family(
    model_type, architecture, f'gin/models/{model_type}/family.gin', sizes, trees, top, when, (), 'backbone.',
  )  # fmt: skip


def _inner(hf: str) -> Derived:
  """The inner channels of Mamba: transformers has a factor of the width, and we a number."""

  def read(settings: Settings) -> dict:
    factor = settings[hf]
    return {} if factor == 2 else {'mamba.Mamba.inner': int(factor * settings['hidden_size'])}

  def write(get: Get) -> dict:
    inner = get('mamba.Mamba.inner') or 2 * get('EMBED')
    factor = inner / get('EMBED')
    return {hf: int(factor) if factor == int(factor) else factor}

  return Derived(read, write)


def _read_inner_size(settings: Settings) -> dict:
  """Refuses a size of Mamba that is not `expand` times the width: transformers lets the file override it."""
  if settings.is_given('intermediate_size'):
    settings['intermediate_size']  # refuses a null
    equal(settings, 'intermediate_size', int(settings['expand'] * settings['hidden_size']))
  return {}


def _rank(width: int) -> int:
  """The width divided by 16, rounded up: the rank of Mamba's steps."""
  return -(-width // 16)


def _read_mamba2(settings: Settings) -> dict:
  channels = settings['num_heads'] * settings['head_dim']
  if channels != settings['expand'] * settings['hidden_size']:
    raise UserError(
      f'config.json: mamba2 has num_heads x head_dim = {channels} channels, but expand x hidden_size = '
      f'{settings["expand"] * settings["hidden_size"]}; they must be equal.'
    )
  low, high = settings['time_step_limit']
  is_limited = low > 0 or high < math.inf
  if not isinstance(low + high, int | float) or low > high:
    raise UserError(f'config.json: time_step_limit = {[low, high]} is not a range of numbers.')
  return {
    'HEAD_DIM': settings['head_dim'], 'mamba2.Mamba2.norm_epsilon': settings['layer_norm_epsilon'],
    'mamba2.Mamba2.step_limits': (float(low), min(float(high), 1e30)) if is_limited else None,
    **({} if channels == 2 * settings['hidden_size'] else {'mamba2.Mamba2.heads': settings['num_heads']}),
  }  # fmt: skip


def _write_mamba2(get: Get) -> dict:
  head_dim = get('HEAD_DIM')
  limits = get('mamba2.Mamba2.step_limits')
  count = get('mamba2.Mamba2.heads') or 2 * get('EMBED') // head_dim
  config = {'num_heads': count, 'head_dim': head_dim, 'expand': count * head_dim // get('EMBED')}
  return {**config, 'time_step_limit': list(limits)} if limits else config


def _write_periods(get: Get) -> dict:
  return {'num_hidden_layers': len(get.layers()) // 2}


def _read_periods(settings: Settings) -> dict:
  """Jamba repeats a period of eight layers. One has attention, and every second one has experts."""
  count = settings['num_hidden_layers']
  if count % 8:
    raise UserError(
      f'config.json: jamba with num_hidden_layers = {count} is not supported, only multiples of 8.'
    )
  return {'PERIODS': count // 8}


LATENT_FIELDS = (
  *SIZES[:2], SIZES[3], MLP, RMS, HEAD,
  Field('n_routed_experts', 'EXPERTS'), ACTIVE,
  Field('moe_intermediate_size', 'EXPERT_MLP'),
  Field('qk_nope_head_dim', 'latent.LatentAttention.head_dim'),
  Field('qk_rope_head_dim', 'latent.LatentAttention.rotary_dim'),
  Field('v_head_dim', 'latent.LatentAttention.value_dim'),
  Field('kv_lora_rank', 'latent.LatentAttention.key_rank'),
  Field('routed_scaling_factor', 'moe.Router.scale'),
  Optional('q_lora_rank', 'latent.LatentAttention.query_rank'),
  Unused(('head_dim', 'qk_head_dim')),
)  # fmt: skip


def _read_latent(settings: Settings) -> dict:
  """Reads the rotary options, which scale the logits too, and the layers of DeepSeek-V2 and V3."""
  equal(settings, 'num_key_value_heads', heads(settings))
  # The norms of the latent vectors have this epsilon in transformers, whatever the file says.
  equal(settings, 'rms_norm_eps', 1e-6)
  rope = rope_of(settings)
  bindings = read_rope(settings, rope)
  # DeepSeek multiplies the logits of attention, too, by the square of YaRN's factor.
  mscale = rope.get('mscale_all_dim') if kind_of(rope) != 'default' else None
  if mscale and rope.is_given('factor'):
    rope['factor']  # refuses a null, which has no logarithm
  factor = bindings.get('positions.yarn_scaling.factor') or rope.get('factor') or 1.0
  magnitude = grow(factor, mscale) if mscale else 1.0
  dense = settings['first_k_dense_replace']
  count = settings['num_hidden_layers']
  if not 0 < dense < count:
    raise UserError(
      f'config.json: {settings.model_type} with first_k_dense_replace = {dense} of {count} layers is not '
      'supported: some layers must be dense, and some must have experts.'
    )
  return {
    **bindings,
    'DENSE_LAYERS': dense,
    'MOE_LAYERS': count - dense,
    'SHARED_MLP': settings['n_shared_experts'] * settings['moe_intermediate_size'],
    'LOGIT_SCALE': (settings['qk_nope_head_dim'] + settings['qk_rope_head_dim']) ** -0.5
    * magnitude**2,
  }


def _read_rotary_size(settings: Settings) -> dict:
  """Refuses another head_dim than that of rotary positions: DeepSeek-V3's class lets a file override it."""
  if settings.is_given('head_dim'):
    settings['head_dim']  # refuses a null
    equal(settings, 'head_dim', settings['qk_rope_head_dim'])
  return {}


def _write_latent(get: Get) -> dict:
  head_dim = get('latent.LatentAttention.head_dim') + get('latent.LatentAttention.rotary_dim')
  shared = get.argument('moe.MoE.shared', 'mlp')
  sublayers = get.layers()
  dense = sum(any(get.part_is(part, 'mlp.Mlp') for part in parts) for parts in sublayers)
  config = {
    'first_k_dense_replace': dense,
    'num_hidden_layers': len(sublayers) // 2,
    'n_shared_experts': shared // get('EXPERT_MLP'),
    'num_key_value_heads': get('HEADS'),
    'rope_parameters': write_rope(get),
  }
  # The inverse of `_read_latent`: the factor in the scale of the logits gives mscale_all_dim.
  magnitude = math.sqrt((get('LOGIT_SCALE') or head_dim**-0.5) * math.sqrt(head_dim))
  rope = config['rope_parameters']
  if rope['rope_type'] == 'yarn' and magnitude > 1 + 1e-6:
    rope['mscale_all_dim'] = (magnitude - 1) / (0.1 * math.log(rope['factor']))
  return config


def _groups(top: int, has_method: bool) -> Derived:
  """Experts in groups, of which a token sees the best ones.

  Args:
    top: how many experts of a group make its score: the best one (V2) or the best two (V3).
    has_method: whether `topk_method` says if there are groups.
  """

  def read(settings: Settings) -> dict:
    method = settings['topk_method'] if has_method else None
    if method not in (None, 'greedy', 'group_limited_greedy'):
      raise UserError(
        f'config.json: {settings.model_type} with topk_method = {method!r} is not supported, only '
        "'greedy' and 'group_limited_greedy'."
      )
    if method == 'greedy':
      # The keys are read, so that nobody asks for them again, and have no effect.
      settings.get('n_group')
      settings.get('topk_group')
      groups, active = 1, 1
    else:
      groups, active = settings['n_group'], settings['topk_group']
    experts_of_group = settings['n_routed_experts'] // groups
    if groups > 1 and experts_of_group < top:
      raise UserError(
        f'config.json: {settings.model_type} with n_group = {groups} has groups of {experts_of_group} experts, '
        f'and the best {top} of each are wanted.'
      )
    return {
      'moe.Router.groups': groups,
      'moe.Router.active_groups': active,
      'moe.Router.group_top': top if groups > 1 else 1,
    }

  def write(get: Get) -> dict:
    groups = get('moe.Router.groups')
    config = {'n_group': groups, 'topk_group': get('moe.Router.active_groups')}
    if has_method:
      config['topk_method'] = 'greedy' if groups == 1 else 'group_limited_greedy'
    return config

  return Derived(read, write)


LATENT_TREE = tree(LatentAttention=LATENT, MoE=experts('mlp.', 'shared_experts'))


def _deepseek(version: str, gin: str, fields, when) -> Family:
  return Family(
    f'deepseek_{version.lower()}', f'Deepseek{version}ForCausalLM', f'gin/models/deepseek/{gin}.gin',
    (*LATENT_FIELDS, Derived(_read_latent, _write_latent), *fields), LATENT_TREE, TOP,
    {'hidden_act': SILU, 'attention_bias': False, **when}, (r'.*rotary_emb\.inv_freq',),
  )  # fmt: skip


OTHERS = (
  _mamba(
    'mamba', 'MambaForCausalLM',
    (_inner('expand'), Implied('time_step_rank', 'mamba.Mamba.rank', _rank), Derived(_read_inner_size),
     Field('state_size', 'mamba.Mamba.state'), Field('conv_kernel', 'mamba.Mamba.width')),
    {'Mamba': under('mixer.', MAMBA)},
  ),
  _mamba(
    'mamba2', 'Mamba2ForCausalLM',
    (Field('state_size', 'mamba2.Mamba2.state'), Field('n_groups', 'mamba2.Mamba2.groups'),
     Field('conv_kernel', 'mamba2.Mamba2.width'), Derived(_read_mamba2, _write_mamba2),
     Unused(('time_step_rank',))),
    {'Mamba2': MAMBA2},
  ),
  Family(
    'jamba', 'JambaForCausalLM', 'gin/models/jamba/52b.gin',
    (*SIZES[:2], SIZES[3], KV_HEADS, HEAD_DIM, MLP, RMS, HEAD,
     Field('num_experts', 'EXPERTS'), ACTIVE,
     computed('layer_types'), Derived(_read_periods, _write_periods),
     _inner('mamba_expand'), Implied('mamba_dt_rank', 'mamba.Mamba.rank', _rank),
     Field('mamba_d_state', 'mamba.Mamba.state'), Field('mamba_d_conv', 'mamba.Mamba.width')),
    tree(('input_layernorm', 'pre_ff_layernorm'), Mlp=under('feed_forward.', GATED),
         Mamba=under('mamba.', MAMBA), MoE=experts('feed_forward.', router='router')),
    {**TOP, 'stack.norm': 'model.final_layernorm'},
    {'hidden_act': SILU, 'attn_layer_period': 8, 'attn_layer_offset': 4, 'expert_layer_period': 2,
     'expert_layer_offset': 1, 'mamba_conv_bias': True, 'mamba_proj_bias': False},
  ),
  _deepseek('V2', 'family', (_groups(1, has_method=True), Unused(('norm_topk_prob',))), {'mlp_bias': False}),
  _deepseek('V3', 'v3', (_groups(2, has_method=False), NORMALISE, Derived(_read_rotary_size),
                         Unused(('num_nextn_predict_layers',))), {'rope_interleave': True}),
)  # fmt: skip
