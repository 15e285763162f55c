"""Names of tensors that several families share: for a class of part, the names of its members' tensors."""

import dataclasses

from research.huggingface.names import Fused, Tree

SELF_ATTENTION = {
  'query': 'self_attn.q_proj', 'key': 'self_attn.k_proj', 'value': 'self_attn.v_proj',
  'output': 'self_attn.o_proj', 'query_norm': 'self_attn.q_norm', 'key_norm': 'self_attn.k_norm',
}  # fmt: skip


GATED = {'inputs.0': 'gate_proj', 'inputs.1': 'up_proj', 'output': 'down_proj'}


def under(prefix: str, table: dict, ours: str = '') -> dict:
  """Puts a prefix before the names of a table.

  Args:
    prefix: of the tensors' names.
    table: members to names.
    ours: a prefix of the members, if they belong to a part inside the part.
  """

  def below(name: str | Fused) -> str | Fused:
    if isinstance(name, Fused):
      return dataclasses.replace(name, name=prefix + name.name)
    return prefix + name

  return {ours + member: below(name) for member, name in table.items()}


def experts(
  prefix: str,
  shared: str = 'shared_expert',
  names: tuple[str, str, str] = ('gate_proj', 'up_proj', 'down_proj'),
  router: str = 'gate',
) -> dict[str, str]:
  """The table of a mixture of experts, one tensor for each expert.

  Args:
    prefix: of the mixture.
    shared: the name of the expert that every token passes.
    names: of an expert's matrices: the gate's, the one beside it, the last.
    router: the name of the router.
  """
  gate, up, down = names
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
  """The tree of LLaMA's names; `parts` are tables that replace some of LLaMA's, by class of part."""
  return (Tree('stack', layer, norms, {**LLAMA_PARTS, **parts}),)


def transformer(norms, layer, attention, mlp) -> tuple[Tree, ...]:
  """The tree of a decoder or encoder with tables of its own for attention and MLP."""
  return (Tree('stack', layer, norms, {'Attention': attention, 'Mlp': mlp}),)
