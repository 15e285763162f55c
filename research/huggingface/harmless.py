"""Keys of config.json without effect on the function that a trained model computes of its tokens.

If transformers states a type for such a key, a value of another type is refused here as well: nobody knows what
a file means that no version of transformers reads.
"""

from typing import Any

# Options that any config.json may have, and the values with which they have no effect.
HARMLESS = {
  'pruned_heads': (None, {}), 'tie_encoder_decoder': (None, False), 'cross_attention_hidden_size': (None,),
  'quantization_config': (None,), 'is_encoder_decoder': (False,), 'is_decoder': (False, True),
  'add_cross_attention': (False,), 'use_bidirectional_attention': (None, False),
}  # fmt: skip

# Keys of released files that no class of transformers reads any more, by family, and the values with which they
# have no effect on the function. Of `ANY` value are those that were about speed, dropout or a pooler, and sizes
# that the shapes of the tensors check.
ANY = object()
_TANH = ('gelu_pytorch_tanh', 'gelu_new', 'gelu_fast', 'gelu')
_T5 = {'n_positions': ANY}
_DEEPSEEK = {'moe_layer_freq': (1,)}
RELEASED: dict[str, dict[str, Any]] = {
  'llama': {'rope_interleaved': (False,), 'max_sequence_length': ANY},
  'qwen2': {'use_mrope': (False,)},
  'gemma': {'hidden_activation': _TANH},
  'gemma2': {'hidden_act': _TANH, 'sliding_window_size': (4096,)},
  'falcon': {'apply_residual_connection_post_layernorm': (False,)},
  'bloom': {
    'attention_softmax_in_fp32': ANY, 'bias_dropout_fusion': ANY, 'masked_softmax_fusion': ANY,
    'offset_alibi': ANY, 'seq_length': ANY, 'skip_bias_add': ANY, 'skip_bias_add_qkv': (False,),
  },
  'mpt': {'init_config': ANY, 'tokenizer_name': ANY, 'verbose': ANY},
  'gpt2': {'_num_labels': ANY, 'n_special': ANY, 'predict_special_tokens': ANY},
  'gptj': {'rotary': (True,), 'scale_attn_weights': (True,)},
  'bert': {
    'position_embedding_type': ('absolute',), 'directionality': ANY, 'pooler_fc_size': ANY,
    'pooler_num_attention_heads': ANY, 'pooler_num_fc_layers': ANY, 'pooler_size_per_head': ANY,
    'pooler_type': ANY,
  },
  't5': _T5, 'mt5': _T5, 'switch_transformers': {'router_type': ('tokens_masked',)},
  'mamba': {
    'd_inner': ANY, 'd_model': ANY, 'n_layer': ANY, 'fused_add_norm': ANY, 'pad_vocab_size_multiple': ANY,
    'rms_norm': (True,), 'ssm_cfg': ({},),
  },
  'mamba2': {'norm_before_gate': ANY, 'rms_norm': (True,)},
  'jamba': {
    'calc_logits_for_entire_prompt': ANY, 'mamba_inner_layernorms': (True,), 'num_logits_to_keep': ANY,
  },
  'deepseek_v2': {**_DEEPSEEK, 'scoring_func': ('softmax',)},
  'deepseek_v3': {**_DEEPSEEK, 'scoring_func': ('sigmoid',), 'topk_method': ('noaux_tc',)},
}  # fmt: skip

INTEGERS = frozenset((
  'bos_token_id', 'chunk_size', 'chunk_size_feed_forward', 'decoder_start_token_id',
  'max_position_embeddings', 'max_seq_len', 'pad_token_id', 'pretraining_tp',
))  # fmt: skip
NUMBERS = frozenset((
  'activation_dropout', 'attention_dropout', 'attention_probs_dropout_prob', 'attn_pdrop', 'classifier_dropout',
  'dropout', 'dropout_rate', 'emb_pdrop', 'embd_pdrop', 'embedding_fraction', 'hidden_dropout',
  'hidden_dropout_prob', 'init_std', 'initializer_factor', 'initializer_range', 'layerdrop', 'resid_pdrop',
  'router_aux_loss_coef', 'router_jitter_noise', 'router_z_loss_coef', 'summary_first_dropout',
  'time_step_floor', 'time_step_max', 'time_step_min', 'time_step_scale',
))  # fmt: skip
BOOLEANS = frozenset((
  'add_router_probs', 'output_hidden_states', 'output_router_logits', 'reorder_and_upcast_attn',
  'rescale_prenorm_residual', 'residual_in_fp32', 'return_dict', 'slow_but_exact', 'summary_proj_to_labels',
  'summary_use_proj', 'use_associative_scan', 'use_cache', 'use_mamba_kernels', 'use_mambapy',
))  # fmt: skip
STRINGS = frozenset((
  'dtype', 'init_device', 'problem_type', 'summary_activation', 'summary_type', 'time_step_init_scheme',
  'torch_dtype', 'transformers_version',
))  # fmt: skip
OBJECTS = frozenset(('id2label', 'label2id'))
# Keys that may be null in every family, or in those named.
NULL = frozenset((
  'bos_token_id', 'decoder_start_token_id', 'dtype', 'eos_token_id', 'id2label', 'label2id',
  'output_hidden_states', 'pad_token_id', 'problem_type', 'return_dict', 'summary_activation', 'torch_dtype',
  'transformers_version',
))  # fmt: skip
NULL_IN = {
  'attention_dropout': (
    'llama', 'gemma2', 'gemma3_text', 'glm', 'phi', 'deepseek_v2', 'deepseek_v3',
  ),
  'classifier_dropout': ('bert',),
  'pretraining_tp': ('llama', 'deepseek_v2', 'deepseek_v3'),
}  # fmt: skip
PROBLEMS = ('regression', 'single_label_classification', 'multi_label_classification')

# Keys that transformers states no type for.
_UNTYPED = frozenset((
  '_attn_implementation', '_attn_implementation_autoset', '_flash_attn_2_enabled', '_name_or_path',
  '_output_attentions', 'architectures', 'attn_implementation', 'auto_map', 'aux_loss_alpha',
  'bad_words_ids', 'begin_suppress_tokens', 'bos_token', 'cache_implementation', 'cls_token_id',
  'custom_pipelines', 'diversity_penalty', 'do_sample', 'early_stopping', 'encoder_no_repeat_ngram_size',
  'eos_token', 'ep_size', 'exponential_decay_length_penalty', 'finetuning_task', 'flash_attn',
  'forced_bos_token_id', 'forced_eos_token_id', 'gradient_checkpointing', 'is_llama_config',
  'keys_to_ignore_at_inference', 'layer_dropout', 'length_penalty', 'mask_token_id', 'max_length',
  'min_length', 'model_max_length', 'n_ctx', 'no_repeat_ngram_size', 'num_beam_groups', 'num_beams',
  'num_labels', 'num_return_sequences', 'output_attentions', 'output_past', 'output_scores', 'pad_token',
  'prefix', 'remove_invalid_values', 'repetition_penalty', 'return_dict_in_generate', 'sep_token_id',
  'seq_aux', 'suppress_tokens', 'task_specific_params', 'temperature', 'tf_legacy_loss', 'tokenizer_class',
  'top_k', 'top_p', 'torchscript', 'transformers.js_config', 'transformers_js_config', 'typical_p',
  'unk_token_id', 'unsloth_fixed', 'unsloth_version', 'use_bfloat16', 'use_flash_attn', 'use_return_dict',
))  # fmt: skip
WITHOUT_EFFECT = INTEGERS | NUMBERS | BOOLEANS | STRINGS | OBJECTS | _UNTYPED | {'eos_token_id'}


def wanted(model_type: str, key: str, value: Any) -> str | None:
  """Returns the type that a key without effect must have, in words; None where its value is right."""
  if value is None:
    if key in NULL or key in _UNTYPED or model_type in NULL_IN.get(key, ()):
      return None
    return _kind(key)
  is_integer = isinstance(value, int) and not isinstance(value, bool)
  match _kind(key):
    case 'an integer':
      fits = is_integer
    case 'a number':
      fits = is_integer or isinstance(value, float)
    case 'true or false':
      fits = isinstance(value, bool)
    case 'a string':
      fits = isinstance(value, str) and (key != 'problem_type' or value in PROBLEMS)
    case 'an object':
      fits = isinstance(value, dict)
    case 'an integer or a list of integers':
      ids = value if isinstance(value, list) else [value]
      fits = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    case _:
      fits = True
  return None if fits else _kind(key)


def is_harmless(model_type: str, key: str, value: Any) -> bool:
  """Whether a key that nothing reads has no effect with this value; a null never has."""
  released = RELEASED.get(model_type, {}).get(key, ())
  if released is ANY:
    return True
  return any(is_same(value, option) for option in (*HARMLESS.get(key, (None,)), *released))


def is_same(a, b) -> bool:
  """Equality that tells True from 1."""
  return a == b and isinstance(a, bool) == isinstance(b, bool)


def _kind(key: str) -> str:
  """The type of a key without effect, in words."""
  kinds = {
    'an integer': INTEGERS, 'a number': NUMBERS, 'true or false': BOOLEANS, 'a string': STRINGS,
    'an object': OBJECTS, 'an integer or a list of integers': ('eos_token_id',),
  }  # fmt: skip
  return next((kind for kind, keys in kinds.items() if key in keys), 'anything')
