"""Tiny versions of the presets: the same gin files with every size bound to a small one."""

from research.core import configs

# One preset of every family.
PRESETS = {
  'baichuan': 'baichuan/13b', 'baichuan2': 'baichuan2/7b', 'bert': 'bert/base', 'bloom': 'bloom/560m',
  'byt5': 'byt5/small', 'chinchilla': 'chinchilla/70b', 'deepseek_v2': 'deepseek/v2_lite',
  'deepseek_v3': 'deepseek/v3', 'falcon': 'falcon/7b', 'falcon_40b': 'falcon/40b', 'gemma': 'gemma/2b',
  'gemma2': 'gemma2/2b', 'gemma3': 'gemma3/1b', 'glm': 'glm/4_9b', 'gopher': 'gopher/280b',
  'gpt2': 'gpt2/124m', 'gpt3': 'gpt3/125m', 'jamba': 'jamba/52b', 'lamda': 'lamda/137b', 'llama': 'llama/7b',
  'llama2': 'llama2/70b', 'llama3': 'llama3/8b', 'mamba': 'mamba/130m', 'mamba2': 'mamba2/130m',
  'mixtral': 'mixtral/8x7b', 'mt5': 'mt5/small', 'olmo2': 'olmo2/7b', 'opt': 'opt/125m', 'palm': 'palm/8b',
  'qwen': 'qwen/7b', 'qwen2': 'qwen2/0_5b', 'qwen2_5': 'qwen2_5/0_5b', 'qwen3': 'qwen3/0_6b',
  'qwen3_moe': 'qwen3/30b_a3b', 'switch': 'switch/base_8', 't5': 't5/1_1_small', 't5_1_0': 't5/1_0_small',
  'ul2': 'ul2/20b',
}  # fmt: skip

MACROS = {
  'VOCAB': 64, 'EMBED': 16, 'LAYERS': 2, 'ENCODER_LAYERS': 2, 'DECODER_LAYERS': 2, 'PERIODS': 1, 'REST': 1,
  'DENSE_LAYERS': 1, 'MOE_LAYERS': 1, 'HEADS': 4, 'HEAD_DIM': 8, 'MLP': 32, 'EXPERT_MLP': 16, 'SHARED_MLP': 16,
  'EXPERTS': 4, 'ACTIVE': 2, 'WINDOW': 4, 'POSITIONS': 64,
  'LOGIT_SCALE': 0.25, 'KV_HEADS': 2,
}  # fmt: skip
# Sizes that a preset binds without a macro.
ARGUMENTS = {
  'LatentAttention': {
    'head_dim': 8, 'rotary_dim': 4, 'value_dim': 8, 'key_rank': 8, 'query_rank': 8,
  },
  'Mamba': {'state': 4}, 'Mamba2': {'state': 8}, 'Router': {'groups': 2, 'active_groups': 1},
}  # fmt: skip


def tiny(family: str, bindings=(), files=None):
  """A partial that makes a model of this family with a few thousand parameters.

  Args:
    family: of `PRESETS`, or the path of a gin file that defines a MODEL.
    bindings: over those that make it small.
    files: in place of the family's.
  """
  own = [family] if family.endswith('.gin') else None
  files = files or own or [f'gin/models/{PRESETS[family]}.gin']
  gin = configs.load(files, root='MODEL')
  gin.tree()
  small = []
  for name, value in MACROS.items():
    used = name in gin.macros and gin.macros[name].used
    if name == 'LAYERS' and 'ENCODER_LAYERS' in gin.macros:
      continue  # it only sets the two
    if used and (name != 'KV_HEADS' or gin.macros[name].value not in (None, 1)):
      small.append(f'{name}={value}')
  bound = {(target.__name__, argument) for _, target, argument in gin.bindings}
  for owner, arguments in ARGUMENTS.items():
    small += [f'{owner}.{k}={v}' for k, v in arguments.items() if (owner, k) in bound]
  return configs.load(files, (*small, *bindings), root='MODEL').tree()
