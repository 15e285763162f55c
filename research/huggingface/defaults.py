"""The defaults of config.json's keys, family by family.

The values are those of the configuration classes of transformers 5.23, and a test compares them. A type in
place of a value (`int`) means that the key is null by default and has a value of that type otherwise.
"""

from typing import Any

_ROPE = {'rope_parameters': dict, 'rope_scaling': dict, 'rope_theta': 10_000.0}
_LLAMA = {
  'vocab_size': 32000, 'hidden_size': 4096, 'intermediate_size': 11008, 'num_hidden_layers': 32,
  'num_attention_heads': 32, 'num_key_value_heads': int, 'hidden_act': 'silu', 'max_position_embeddings': 2048,
  'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'attention_bias': False, 'head_dim': int, **_ROPE,
}  # fmt: skip
_MISTRAL = {
  **_LLAMA, 'intermediate_size': 14336, 'num_key_value_heads': 8, 'max_position_embeddings': 131072,
  'sliding_window': 4096,
}  # fmt: skip
_QWEN = {
  **_LLAMA, 'vocab_size': 151936, 'intermediate_size': 22016, 'num_key_value_heads': 32,
  'max_position_embeddings': 32768, 'use_sliding_window': False, 'sliding_window': 4096,
  'max_window_layers': 28, 'layer_types': list,
}  # fmt: skip
_QWEN_MOE = {
  **_QWEN, 'hidden_size': 2048, 'num_hidden_layers': 24, 'decoder_sparse_step': 1, 'norm_topk_prob': False,
  'mlp_only_layers': list,
}  # fmt: skip
_GEMMA = {
  **_LLAMA, 'vocab_size': 256000, 'head_dim': 256, 'max_position_embeddings': 8192, 'tie_word_embeddings': True,
  'use_bidirectional_attention': bool,
}  # fmt: skip
_GEMMA2 = {
  **_GEMMA, 'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26, 'num_attention_heads': 8,
  'num_key_value_heads': 4, 'hidden_activation': 'gelu_pytorch_tanh', 'query_pre_attn_scalar': 256,
  'sliding_window': 4096, 'layer_types': list, 'final_logit_softcapping': 30.0, 'attn_logit_softcapping': 50.0,
}  # fmt: skip
_GLM = {
  **_LLAMA, 'vocab_size': 151552, 'intermediate_size': 13696, 'num_hidden_layers': 40, 'num_key_value_heads': 2,
  'head_dim': 128, 'max_position_embeddings': 131072, 'rms_norm_eps': 1.5625e-07, 'attention_bias': True,
  'partial_rotary_factor': 0.5,
}  # fmt: skip
_T5 = {
  'vocab_size': 32128, 'd_model': 512, 'd_kv': 64, 'd_ff': 2048, 'num_layers': 6, 'num_decoder_layers': int,
  'num_heads': 8, 'relative_attention_num_buckets': 32, 'relative_attention_max_distance': 128,
  'layer_norm_epsilon': 1e-6, 'feed_forward_proj': 'relu', 'tie_word_embeddings': True, 'is_decoder': False,
  'is_encoder_decoder': True,
}  # fmt: skip
_DEEPSEEK = {
  **_LLAMA, 'kv_lora_rank': 512, 'q_lora_rank': 1536, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64,
  'v_head_dim': 128,
}  # fmt: skip
_GPT2 = {
  'vocab_size': 50257, 'n_positions': 1024, 'n_embd': 768, 'n_layer': 12, 'n_head': 12, 'n_inner': int,
  'activation_function': 'gelu_new', 'layer_norm_epsilon': 1e-5,
}  # fmt: skip

DEFAULTS: dict[str, dict[str, Any]] = {
  'llama': {**_LLAMA, 'mlp_bias': False},
  'mistral': _MISTRAL,
  'mixtral': {
    **_MISTRAL, 'rms_norm_eps': 1e-5, 'sliding_window': int, 'num_experts_per_tok': 2, 'num_local_experts': 8,
    'rope_theta': 1e6,
  },
  'qwen2': _QWEN,
  'qwen2_moe': {
    **_QWEN_MOE, 'intermediate_size': 5632, 'num_attention_heads': 16, 'num_key_value_heads': 16,
    'moe_intermediate_size': 1408, 'shared_expert_intermediate_size': 5632, 'num_experts_per_tok': 4,
    'num_experts': 60, 'qkv_bias': True,
  },
  'qwen3': {**_QWEN, 'head_dim': 128},
  'qwen3_moe': {
    **_QWEN_MOE, 'intermediate_size': 6144, 'num_key_value_heads': 4, 'moe_intermediate_size': 768,
    'num_experts_per_tok': 8, 'num_local_experts': 128,
  },
  'gemma': {
    **_GEMMA, 'hidden_size': 3072, 'intermediate_size': 24576, 'num_hidden_layers': 28,
    'num_attention_heads': 16, 'num_key_value_heads': 16, 'hidden_act': 'gelu_pytorch_tanh',
  },
  'gemma2': _GEMMA2,
  'gemma3_text': {
    **_GEMMA2, 'vocab_size': 262208, 'max_position_embeddings': 131072, 'final_logit_softcapping': float,
    'attn_logit_softcapping': float, 'use_bidirectional_attention': False, 'sliding_window_pattern': 6,
    'rope_theta': 1e6, 'rope_local_base_freq': 10_000.0,
  },
  'glm': _GLM,
  'glm4': _GLM,
  'olmo2': {**_LLAMA, 'vocab_size': 50304, 'rms_norm_eps': 1e-5},
  'stablelm': {
    **_LLAMA, 'vocab_size': 50304, 'intermediate_size': 6912, 'hidden_size': 2560, 'num_key_value_heads': 32,
    'max_position_embeddings': 4096, 'layer_norm_eps': 1e-5, 'use_qkv_bias': False, 'qk_layernorm': False,
    'use_parallel_residual': False, 'partial_rotary_factor': 0.25,
  },
  'phi': {
    **_LLAMA, 'vocab_size': 51200, 'hidden_size': 2048, 'intermediate_size': 8192, 'num_hidden_layers': 24,
    'hidden_act': 'gelu_new', 'layer_norm_eps': 1e-5, 'qk_layernorm': False, 'partial_rotary_factor': 0.5,
  },
  'falcon': {
    'vocab_size': 65024, 'hidden_size': 4544, 'num_hidden_layers': 32, 'num_attention_heads': 71,
    'num_ln_in_parallel_attn': int, 'layer_norm_epsilon': 1e-5, 'num_kv_heads': int, 'alibi': False,
    'new_decoder_architecture': False, 'multi_query': True, 'parallel_attn': True, 'bias': False,
    'ffn_hidden_size': int, 'activation': 'gelu', 'max_position_embeddings': 2048, 'tie_word_embeddings': True,
    **_ROPE,
  },
  'bloom': {
    'vocab_size': 250880, 'hidden_size': 64, 'n_layer': 2, 'n_head': 8, 'layer_norm_epsilon': 1e-5,
    'apply_residual_connection_post_layernorm': False, 'tie_word_embeddings': True,
  },
  'mpt': {
    'd_model': 2048, 'n_heads': 16, 'n_layers': 24, 'expansion_ratio': 4, 'vocab_size': 50368,
    'layer_norm_epsilon': 1e-5, 'no_bias': True, 'attn_config': dict, 'logit_scale': float,
    'norm_type': 'low_precision_layernorm', 'learned_pos_emb': True,
    'tie_word_embeddings': True,
  },
  'opt': {
    'vocab_size': 50272, 'hidden_size': 768, 'num_hidden_layers': 12, 'ffn_dim': 3072,
    'max_position_embeddings': 2048, 'do_layer_norm_before': True, '_remove_final_layer_norm': False,
    'word_embed_proj_dim': int, 'num_attention_heads': 12, 'activation_function': 'relu', 'enable_bias': True,
    'layer_norm_elementwise_affine': True, 'tie_word_embeddings': True,
  },
  'gpt2': {
    **_GPT2, 'scale_attn_weights': True, 'scale_attn_by_inverse_layer_idx': False, 'add_cross_attention': False,
    'tie_word_embeddings': True,
  },
  'gptj': {
    **_GPT2, 'vocab_size': 50400, 'n_positions': 2048, 'n_embd': 4096, 'n_layer': 28, 'n_head': 16,
    'rotary_dim': 64, 'tie_word_embeddings': False,
  },
  'gpt_neox': {
    'vocab_size': 50432, 'hidden_size': 6144, 'num_hidden_layers': 44, 'num_attention_heads': 64,
    'intermediate_size': 24576, 'hidden_act': 'gelu', 'max_position_embeddings': 2048, 'layer_norm_eps': 1e-5,
    'tie_word_embeddings': False, 'use_parallel_residual': True, 'attention_bias': True, 'is_decoder': False,
    'rope_parameters': dict, 'rope_scaling': dict, 'rotary_emb_base': 10_000.0, 'rotary_pct': 0.25,
  },
  'bert': {
    'vocab_size': 30522, 'hidden_size': 768, 'num_hidden_layers': 12, 'num_attention_heads': 12,
    'intermediate_size': 3072, 'hidden_act': 'gelu', 'max_position_embeddings': 512, 'type_vocab_size': 2,
    'layer_norm_eps': 1e-12, 'is_decoder': False, 'add_cross_attention': False, 'tie_word_embeddings': True,
  },
  't5': {**_T5, 'scale_decoder_outputs': True},
  'mt5': {
    **_T5, 'vocab_size': 250112, 'd_ff': 1024, 'num_layers': 8, 'num_heads': 6,
    'feed_forward_proj': 'gated-gelu',
  },
  'switch_transformers': {
    **_T5, 'd_model': 768, 'expert_capacity': 64, 'num_layers': 12, 'num_decoder_layers': 12,
    'num_sparse_encoder_layers': 3, 'num_sparse_decoder_layers': 3, 'num_heads': 12, 'num_experts': 8,
    'router_bias': False, 'router_dtype': 'float32', 'router_ignore_padding_tokens': False,
    'dense_act_fn': 'relu', 'add_cross_attention': False,
  },
  'mamba': {
    'vocab_size': 50280, 'hidden_size': 768, 'state_size': 16, 'num_hidden_layers': 32,
    'layer_norm_epsilon': 1e-5, 'expand': 2, 'conv_kernel': 4, 'use_bias': False, 'use_conv_bias': True,
    'hidden_act': 'silu', 'time_step_rank': 'auto', 'tie_word_embeddings': True,
    'rescale_prenorm_residual': False,
  },
  'mamba2': {
    'num_heads': 128, 'head_dim': 64, 'vocab_size': 32768, 'hidden_size': 4096, 'state_size': 128,
    'num_hidden_layers': 64, 'layer_norm_epsilon': 1e-5, 'expand': 2, 'conv_kernel': 4, 'n_groups': 8,
    'use_bias': False, 'use_conv_bias': True, 'hidden_act': 'silu', 'time_step_limit': [0.0, float('inf')],
    'tie_word_embeddings': False, 'time_step_rank': 'auto', 'rescale_prenorm_residual': False,
  },
  'jamba': {
    'vocab_size': 65536, 'hidden_size': 4096, 'intermediate_size': 14336, 'num_hidden_layers': 32,
    'num_attention_heads': 32, 'num_key_value_heads': 8, 'hidden_act': 'silu', 'rms_norm_eps': 1e-6,
    'num_experts_per_tok': 2, 'num_experts': 16, 'expert_layer_period': 2, 'expert_layer_offset': 1,
    'attn_layer_period': 8, 'attn_layer_offset': 4, 'mamba_d_state': 16, 'mamba_d_conv': 4, 'mamba_expand': 2,
    'mamba_dt_rank': 'auto', 'mamba_conv_bias': True, 'mamba_proj_bias': False, 'tie_word_embeddings': False,
  },
  'deepseek_v2': {
    **_DEEPSEEK, 'vocab_size': 102400, 'mlp_bias': False, 'first_k_dense_replace': 0, 'n_group': int,
    'n_routed_experts': 64, 'n_shared_experts': 2, 'routed_scaling_factor': 1.0, 'topk_group': int,
    'topk_method': 'greedy', 'norm_topk_prob': False, 'num_experts_per_tok': int, 'moe_intermediate_size': 1407,
  },
  'deepseek_v3': {
    **_DEEPSEEK, 'vocab_size': 129280, 'hidden_size': 7168, 'intermediate_size': 18432,
    'moe_intermediate_size': 2048, 'num_hidden_layers': 61, 'num_attention_heads': 128,
    'num_key_value_heads': 128, 'n_shared_experts': 1, 'n_routed_experts': 256, 'routed_scaling_factor': 2.5,
    'n_group': 8, 'topk_group': 4, 'num_experts_per_tok': 8, 'first_k_dense_replace': 3, 'norm_topk_prob': True,
    'max_position_embeddings': 4096, 'rope_interleave': True, 'num_nextn_predict_layers': 1,
  },
}  # fmt: skip

_GPT2_ALIASES = {
  'hidden_size': 'n_embd', 'max_position_embeddings': 'n_positions', 'num_attention_heads': 'n_head',
  'num_hidden_layers': 'n_layer',
}  # fmt: skip
_T5_ALIASES = {
  'hidden_size': 'd_model', 'num_attention_heads': 'num_heads', 'num_hidden_layers': 'num_layers',
  'head_dim': 'd_kv',
}  # fmt: skip
# Other names of keys, by which transformers' class takes them as well.
ALIASES: dict[str, dict[str, str]] = {
  'mixtral': {'num_experts': 'num_local_experts'},
  'qwen3_moe': {'num_experts': 'num_local_experts'},
  'jamba': {'num_local_experts': 'num_experts'},
  'deepseek_v2': {'num_experts': 'n_routed_experts'},
  'deepseek_v3': {
    'num_local_experts': 'n_routed_experts', 'num_mtp_layers': 'num_nextn_predict_layers',
  },
  'bloom': {'num_hidden_layers': 'n_layer', 'num_attention_heads': 'n_head', 'n_embed': 'hidden_size'},
  'falcon': {'n_embed': 'hidden_size'},
  'mpt': {'num_attention_heads': 'n_heads', 'hidden_size': 'd_model', 'num_hidden_layers': 'n_layers'},
  'gpt2': _GPT2_ALIASES, 'gptj': _GPT2_ALIASES,
  't5': _T5_ALIASES, 'mt5': _T5_ALIASES, 'switch_transformers': _T5_ALIASES,
}  # fmt: skip

# The ids (bos, eos, pad) of a family where config.json does not have them.
SPECIAL_IDS: dict[str, tuple] = {
  **dict.fromkeys(('llama', 'mistral', 'mixtral', 'deepseek_v2', 'phi', 'bloom'), (1, 2, None)),
  **dict.fromkeys(('gemma', 'gemma2', 'gemma3_text'), (2, 1, 0)),
  **dict.fromkeys(('glm', 'glm4'), (None, [151329, 151336, 151338], 151329)),
  'olmo2': (None, 50279, 1), 'stablelm': (0, 0, None), 'falcon': (11, 11, None), 'opt': (2, 2, 1),
  **dict.fromkeys(('gpt2', 'gptj'), (50256, 50256, None)), 'gpt_neox': (0, 2, None), 'bert': (None, None, 0),
  **dict.fromkeys(('t5', 'mt5', 'switch_transformers'), (None, 1, 0)), 'mamba': (0, 0, 0), 'mamba2': (0, 2, 1),
  'jamba': (1, 2, 0), 'deepseek_v3': (0, 1, None),
}  # fmt: skip
