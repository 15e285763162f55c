"""The config.json of released checkpoints is read, also the keys that transformers has dropped since.

The values are those of the releases that name each row; keys that say nothing (`architectures`, `auto_map`,
`transformers_version`) are left out.
"""

import os

import pytest

from research.core.errors import UserError
from research.huggingface import inwards
from research.huggingface.harmless import ANY, RELEASED

os.environ.setdefault('HF_HUB_OFFLINE', '1')

LLAMA = {
  'hidden_act': 'silu', 'initializer_range': 0.02, 'rms_norm_eps': 1e-5, 'use_cache': True,
  'torch_dtype': 'bfloat16', 'bos_token_id': 1, 'eos_token_id': 2,
}  # fmt: skip
T5 = {
  'd_ff': 1024, 'd_kv': 64, 'd_model': 512, 'decoder_start_token_id': 0, 'dropout_rate': 0.1, 'eos_token_id': 1,
  'initializer_factor': 1.0, 'is_encoder_decoder': True, 'layer_norm_epsilon': 1e-6, 'num_heads': 6,
  'num_layers': 8, 'output_past': True, 'pad_token_id': 0, 'relative_attention_num_buckets': 32,
  'vocab_size': 32128,
}  # fmt: skip
BERT = {
  'attention_probs_dropout_prob': 0.1, 'gradient_checkpointing': False, 'hidden_act': 'gelu',
  'hidden_dropout_prob': 0.1, 'hidden_size': 768, 'initializer_range': 0.02, 'intermediate_size': 3072,
  'layer_norm_eps': 1e-12, 'max_position_embeddings': 512, 'model_type': 'bert', 'num_attention_heads': 12,
  'num_hidden_layers': 12, 'pad_token_id': 0, 'position_embedding_type': 'absolute', 'type_vocab_size': 2,
  'use_cache': True, 'vocab_size': 30522,
}  # fmt: skip
GPT2 = {
  'activation_function': 'gelu_new', 'attn_pdrop': 0.1, 'bos_token_id': 50256, 'embd_pdrop': 0.1,
  'eos_token_id': 50256, 'initializer_range': 0.02, 'layer_norm_epsilon': 1e-5, 'model_type': 'gpt2',
  'n_ctx': 1024, 'n_embd': 768, 'n_head': 12, 'n_layer': 12, 'n_positions': 1024, 'resid_pdrop': 0.1,
  'summary_activation': None, 'summary_first_dropout': 0.1, 'summary_proj_to_labels': True,
  'summary_type': 'cls_index', 'summary_use_proj': True, 'vocab_size': 50257,
  'task_specific_params': {'text-generation': {'do_sample': True, 'max_length': 50}},
}  # fmt: skip
GEMMA = {
  **{key: value for key, value in LLAMA.items() if key != 'hidden_act'},
  'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 2, 'eos_token_id': 1,
  'pad_token_id': 0, 'head_dim': 256, 'max_position_embeddings': 8192, 'rms_norm_eps': 1e-6,
  'rope_theta': 10000.0, 'vocab_size': 256000,
}  # fmt: skip
DEEPSEEK = {
  **LLAMA, 'attention_bias': False, 'aux_loss_alpha': 0.001, 'ep_size': 1, 'moe_layer_freq': 1,
  'pretraining_tp': 1,
  'kv_lora_rank': 512, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64, 'v_head_dim': 128, 'seq_aux': True,
  'max_position_embeddings': 163840, 'rope_theta': 10000, 'rms_norm_eps': 1e-6, 'tie_word_embeddings': False,
}  # fmt: skip
YARN = {
  'beta_fast': 32, 'beta_slow': 1, 'factor': 40, 'original_max_position_embeddings': 4096, 'type': 'yarn',
}  # fmt: skip
RELEASES = {
  'SmolLM2-135M': {
    **LLAMA, 'model_type': 'llama', 'attention_bias': False, 'attention_dropout': 0.0, 'hidden_size': 576,
    'intermediate_size': 1536, 'is_llama_config': True, 'max_position_embeddings': 8192, 'mlp_bias': False,
    'num_attention_heads': 9, 'num_hidden_layers': 30, 'num_key_value_heads': 3, 'pretraining_tp': 1,
    'rope_interleaved': False, 'rope_scaling': None, 'rope_theta': 100000, 'tie_word_embeddings': True,
    'vocab_size': 49152, 'transformers.js_config': {'kv_cache_dtype': {'fp16': 'float16'}},
  },
  'LLaMA-7B': {
    **LLAMA, 'model_type': 'llama', 'hidden_size': 4096, 'intermediate_size': 11008,
    'max_sequence_length': 2048,
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'pad_token_id': -1, 'rms_norm_eps': 1e-6,
    'tie_word_embeddings': False, 'vocab_size': 32000,
  },
  'Llama-3.1-8B': {
    **LLAMA, 'model_type': 'llama', 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 128000,
    'eos_token_id': [128001, 128008, 128009], 'hidden_size': 4096, 'intermediate_size': 14336,
    'max_position_embeddings': 131072, 'mlp_bias': False, 'num_attention_heads': 32, 'num_hidden_layers': 32,
    'num_key_value_heads': 8, 'pretraining_tp': 1, 'rope_theta': 500000.0, 'tie_word_embeddings': False,
    'rope_scaling': {'factor': 8.0, 'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
                     'original_max_position_embeddings': 8192, 'rope_type': 'llama3'},
    'vocab_size': 128256,
  },
  'Mistral-7B': {
    **LLAMA, 'model_type': 'mistral', 'hidden_size': 4096, 'intermediate_size': 14336,
    'max_position_embeddings': 32768, 'num_attention_heads': 32, 'num_hidden_layers': 32,
    'num_key_value_heads': 8, 'rope_theta': 10000.0, 'sliding_window': 4096, 'tie_word_embeddings': False,
    'vocab_size': 32000,
  },
  'Mixtral-8x7B': {
    **LLAMA, 'model_type': 'mixtral', 'attention_dropout': 0.0, 'hidden_size': 4096, 'intermediate_size': 14336,
    'max_position_embeddings': 32768, 'num_attention_heads': 32, 'num_experts_per_tok': 2,
    'num_hidden_layers': 32, 'num_key_value_heads': 8, 'num_local_experts': 8, 'output_router_logits': False,
    'rope_theta': 1000000.0, 'router_aux_loss_coef': 0.02, 'sliding_window': None,
    'tie_word_embeddings': False, 'vocab_size': 32000,
  },
  'Qwen2.5-0.5B': {
    **LLAMA, 'model_type': 'qwen2', 'attention_dropout': 0.0, 'bos_token_id': 151643, 'eos_token_id': 151643,
    'hidden_size': 896, 'intermediate_size': 4864, 'max_position_embeddings': 32768, 'max_window_layers': 24,
    'num_attention_heads': 14, 'num_hidden_layers': 24, 'num_key_value_heads': 2, 'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0, 'sliding_window': 32768, 'tie_word_embeddings': True, 'use_mrope': False,
    'use_sliding_window': False, 'vocab_size': 151936,
  },
  'Qwen3-0.6B': {
    **LLAMA, 'model_type': 'qwen3', 'attention_bias': False, 'attention_dropout': 0.0, 'bos_token_id': 151643,
    'eos_token_id': 151645, 'head_dim': 128, 'hidden_size': 1024, 'intermediate_size': 3072,
    'max_position_embeddings': 40960, 'max_window_layers': 28, 'num_attention_heads': 16,
    'num_hidden_layers': 28, 'num_key_value_heads': 8, 'rms_norm_eps': 1e-6, 'rope_scaling': None,
    'rope_theta': 1000000, 'sliding_window': None, 'tie_word_embeddings': True, 'use_sliding_window': False,
    'vocab_size': 151936,
  },
  'Qwen3-30B-A3B': {
    **LLAMA, 'model_type': 'qwen3_moe', 'attention_bias': False, 'attention_dropout': 0.0,
    'bos_token_id': 151643, 'decoder_sparse_step': 1, 'eos_token_id': 151645, 'head_dim': 128,
    'hidden_size': 2048, 'intermediate_size': 6144, 'max_position_embeddings': 40960, 'max_window_layers': 48,
    'mlp_only_layers': [], 'moe_intermediate_size': 768, 'norm_topk_prob': True, 'num_attention_heads': 32,
    'num_experts': 128, 'num_experts_per_tok': 8, 'num_hidden_layers': 48, 'num_key_value_heads': 4,
    'output_router_logits': False, 'rms_norm_eps': 1e-6, 'rope_scaling': None, 'rope_theta': 1000000.0,
    'router_aux_loss_coef': 0.001, 'sliding_window': None, 'tie_word_embeddings': False,
    'use_sliding_window': False, 'vocab_size': 151936,
  },
  'OLMo-2-7B': {
    **LLAMA, 'model_type': 'olmo2', 'attention_bias': False, 'attention_dropout': 0.0, 'eos_token_id': 100257,
    'hidden_size': 4096, 'intermediate_size': 11008, 'max_position_embeddings': 4096,
    'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 32, 'pad_token_id': 100277,
    'rms_norm_eps': 1e-6, 'rope_scaling': None, 'rope_theta': 500000, 'tie_word_embeddings': False,
    'vocab_size': 100352,
  },
  'GLM-4-9B': {
    **LLAMA, 'model_type': 'glm', 'attention_bias': True, 'attention_dropout': 0.0,
    'eos_token_id': [151329, 151336, 151338], 'head_dim': 128, 'hidden_size': 4096, 'intermediate_size': 13696,
    'max_position_embeddings': 131072, 'num_attention_heads': 32, 'num_hidden_layers': 40,
    'num_key_value_heads': 2, 'pad_token_id': 151329, 'partial_rotary_factor': 0.5, 'rms_norm_eps': 1.5625e-07,
    'rope_theta': 10000.0, 'tie_word_embeddings': False, 'vocab_size': 151552,
  },
  'StableLM-3B-4E1T': {
    'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'silu', 'hidden_size': 2560, 'initializer_range': 0.02,
    'intermediate_size': 6912, 'layer_norm_eps': 1e-5, 'max_position_embeddings': 4096,
    'model_type': 'stablelm', 'num_attention_heads': 32, 'num_hidden_layers': 32, 'num_key_value_heads': 32,
    'partial_rotary_factor': 0.25, 'rope_theta': 10000, 'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
    'use_cache': True, 'use_qkv_bias': False, 'vocab_size': 50304,
  },
  'Gemma-3-270M': {
    **GEMMA, 'model_type': 'gemma3_text', '_sliding_window_pattern': 6, 'attn_logit_softcapping': None,
    'final_logit_softcapping': None, 'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 640,
    'intermediate_size': 2048, 'layer_types': (['sliding_attention'] * 5 + ['full_attention']) * 3,
    'max_position_embeddings': 32768, 'num_attention_heads': 4, 'num_hidden_layers': 18,
    'num_key_value_heads': 1, 'query_pre_attn_scalar': 256, 'rope_local_base_freq': 10000.0,
    'rope_scaling': None, 'rope_theta': 1000000.0, 'sliding_window': 512, 'vocab_size': 262144,
    'use_bidirectional_attention': False,
  },
  'Gemma-1.1-2B': {
    **GEMMA, 'model_type': 'gemma', 'hidden_act': 'gelu_pytorch_tanh', 'hidden_activation': 'gelu_pytorch_tanh',
    'hidden_size': 2048, 'intermediate_size': 16384, 'num_attention_heads': 8, 'num_hidden_layers': 18,
    'num_key_value_heads': 1, 'rope_scaling': None,
  },
  'Gemma-2-9B': {
    **GEMMA, 'model_type': 'gemma2', 'attn_logit_softcapping': 50.0, 'cache_implementation': 'hybrid',
    'final_logit_softcapping': 30.0, 'hidden_act': 'gelu_pytorch_tanh',
    'hidden_activation': 'gelu_pytorch_tanh', 'hidden_size': 3584,
    'intermediate_size': 14336, 'num_attention_heads': 16, 'num_hidden_layers': 42,
    'num_key_value_heads': 8, 'query_pre_attn_scalar': 256, 'sliding_window': 4096, 'sliding_window_size': 4096,
  },
  'BERT base': BERT,
  'BERT base multilingual': {
    **BERT, 'vocab_size': 119547, 'directionality': 'bidi', 'pooler_fc_size': 768,
    'pooler_num_attention_heads': 12, 'pooler_num_fc_layers': 3, 'pooler_size_per_head': 128,
    'pooler_type': 'first_token_transform',
  },
  'GPT-2': GPT2,
  'DistilGPT2': {
    **GPT2, 'n_layer': 6, '_num_labels': 1, 'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0},
  },
  'GPT-2 medium': {
    **GPT2, 'n_embd': 1024, 'n_head': 16, 'n_layer': 24, 'n_special': 0, 'predict_special_tokens': True,
  },
  'GPT-J-6B': {
    **GPT2, 'model_type': 'gptj', 'gradient_checkpointing': False, 'n_embd': 4096, 'n_head': 16,
    'n_inner': None,
    'n_layer': 28, 'n_positions': 2048, 'rotary': True, 'rotary_dim': 64, 'scale_attn_weights': True,
    'tie_word_embeddings': False, 'tokenizer_class': 'GPT2Tokenizer', 'use_cache': True, 'vocab_size': 50400,
  },
  'Pythia-70M': {
    'bos_token_id': 0, 'eos_token_id': 0, 'hidden_act': 'gelu', 'hidden_size': 512, 'initializer_range': 0.02,
    'intermediate_size': 2048, 'layer_norm_eps': 1e-5, 'max_position_embeddings': 2048,
    'model_type': 'gpt_neox',
    'num_attention_heads': 8, 'num_hidden_layers': 6, 'rotary_emb_base': 10000, 'rotary_pct': 0.25,
    'tie_word_embeddings': False, 'torch_dtype': 'float16', 'use_cache': True, 'use_parallel_residual': True,
    'vocab_size': 50304,
  },
  'Phi-2': {
    'attention_dropout': 0.0, 'bos_token_id': 50256, 'embd_pdrop': 0.0, 'eos_token_id': 50256,
    'hidden_act': 'gelu_new', 'hidden_size': 2560, 'initializer_range': 0.02, 'intermediate_size': 10240,
    'layer_norm_eps': 1e-5, 'max_position_embeddings': 2048, 'model_type': 'phi', 'num_attention_heads': 32,
    'num_hidden_layers': 32, 'num_key_value_heads': 32, 'partial_rotary_factor': 0.4, 'qk_layernorm': False,
    'resid_pdrop': 0.1, 'rope_scaling': None, 'rope_theta': 10000.0, 'tie_word_embeddings': False,
    'use_cache': True, 'vocab_size': 51200,
  },
  'Falcon-7B': {
    'alibi': False, 'apply_residual_connection_post_layernorm': False, 'attention_dropout': 0.0, 'bias': False,
    'bos_token_id': 11, 'eos_token_id': 11, 'hidden_dropout': 0.0, 'hidden_size': 4544,
    'initializer_range': 0.02, 'layer_norm_epsilon': 1e-5, 'model_type': 'falcon', 'multi_query': True,
    'new_decoder_architecture': False, 'num_attention_heads': 71, 'num_hidden_layers': 32,
    'parallel_attn': True, 'use_cache': True, 'vocab_size': 65024,
  },
  'BLOOM-560M': {
    'apply_residual_connection_post_layernorm': False, 'attention_dropout': 0.0,
    'attention_softmax_in_fp32': True,
    'bias_dropout_fusion': True, 'bos_token_id': 1, 'eos_token_id': 2, 'pad_token_id': 3, 'unk_token_id': 0,
    'hidden_dropout': 0.0, 'initializer_range': 0.02, 'layer_norm_epsilon': 1e-5, 'masked_softmax_fusion': True,
    'model_type': 'bloom', 'n_embed': 1024, 'n_inner': None, 'n_layer': 24, 'num_attention_heads': 16,
    'offset_alibi': 100, 'pretraining_tp': 1, 'seq_length': 2048, 'skip_bias_add': True,
    'skip_bias_add_qkv': False, 'use_cache': True, 'vocab_size': 250880,
  },
  'MPT-7B': {
    'attn_config': {'alibi': True, 'alibi_bias_max': 8, 'attn_impl': 'torch', 'attn_pdrop': 0, 'clip_qkv': None,
                    'attn_type': 'multihead_attention', 'attn_uses_sequence_id': False, 'prefix_lm': False,
                    'qk_ln': False, 'softmax_scale': None},
    'd_model': 4096, 'emb_pdrop': 0, 'embedding_fraction': 1.0, 'expansion_ratio': 4, 'init_device': 'cpu',
    'init_config': {'emb_init_std': None, 'fan_mode': 'fan_in', 'name': 'kaiming_normal_', 'verbose': 0},
    'learned_pos_emb': True, 'logit_scale': None, 'max_seq_len': 2048, 'model_type': 'mpt', 'n_heads': 32,
    'n_layers': 32, 'no_bias': True, 'norm_type': 'low_precision_layernorm', 'resid_pdrop': 0,
    'tokenizer_name': 'EleutherAI/gpt-neox-20b', 'use_cache': False, 'verbose': 0, 'vocab_size': 50432,
  },
  'OPT-125M': {
    'activation_dropout': 0.0, 'activation_function': 'relu', 'attention_dropout': 0.0, 'bos_token_id': 2,
    'do_layer_norm_before': True, 'dropout': 0.1, 'eos_token_id': 2, 'ffn_dim': 3072, 'hidden_size': 768,
    'init_std': 0.02, 'layerdrop': 0.0, 'max_position_embeddings': 2048, 'model_type': 'opt',
    'num_attention_heads': 12, 'num_hidden_layers': 12, 'pad_token_id': 1, 'prefix': '</s>', 'use_cache': True,
    'vocab_size': 50272, 'word_embed_proj_dim': 768,
  },
  'T5 small': {**T5, 'model_type': 't5', 'd_ff': 2048, 'n_positions': 512, 'num_heads': 8, 'num_layers': 6},
  'Flan-T5 small': {
    **T5, 'model_type': 't5', 'dense_act_fn': 'gelu_new', 'feed_forward_proj': 'gated-gelu',
    'is_gated_act': True, 'n_positions': 512, 'num_decoder_layers': 8, 'relative_attention_max_distance': 128,
    'tie_word_embeddings': False, 'use_cache': True,
  },
  'mT5 small': {
    **T5, 'model_type': 'mt5', 'feed_forward_proj': 'gated-gelu', 'num_decoder_layers': 8,
    'tie_word_embeddings': False, 'tokenizer_class': 'T5Tokenizer', 'vocab_size': 250112,
  },
  'Switch base 8': {
    **{key: value for key, value in T5.items() if key != 'output_past'}, 'model_type': 'switch_transformers',
    'add_router_probs': False, 'd_ff': 3072, 'd_model': 768, 'decoder_sparse_step': 2, 'dense_act_fn': 'relu',
    'encoder_sparse_step': 2, 'expert_capacity': 64, 'feed_forward_proj': 'relu', 'is_gated_act': False,
    'num_decoder_layers': 12, 'num_experts': 8, 'num_heads': 12, 'num_layers': 12,
    'num_sparse_decoder_layers': 6, 'num_sparse_encoder_layers': 6, 'relative_attention_max_distance': 128,
    'router_aux_loss_coef': 0.001, 'router_bias': False, 'router_dtype': 'float32', 'router_jitter_noise': 0.01,
    'router_ignore_padding_tokens': False, 'router_type': 'tokens_masked', 'router_z_loss_coef': 0.001,
  },
  'Mamba-130M': {
    'bos_token_id': 0, 'conv_kernel': 4, 'd_inner': 1536, 'd_model': 768, 'eos_token_id': 0, 'expand': 2,
    'fused_add_norm': True, 'hidden_act': 'silu', 'hidden_size': 768, 'initializer_range': 0.1,
    'intermediate_size': 1536, 'layer_norm_epsilon': 1e-5, 'model_type': 'mamba', 'n_layer': 24,
    'num_hidden_layers': 24, 'pad_token_id': 0, 'pad_vocab_size_multiple': 8, 'rescale_prenorm_residual': False,
    'residual_in_fp32': True, 'rms_norm': True, 'ssm_cfg': {}, 'state_size': 16, 'time_step_floor': 1e-4,
    'time_step_init_scheme': 'random', 'time_step_max': 0.1, 'time_step_min': 0.001, 'time_step_rank': 48,
    'time_step_scale': 1.0, 'use_bias': False, 'use_cache': True, 'use_conv_bias': True, 'vocab_size': 50280,
  },
  'Mamba-2-130M': {
    'bos_token_id': 0, 'chunk_size': 256, 'conv_kernel': 4, 'eos_token_id': 0, 'expand': 2, 'head_dim': 64,
    'hidden_act': 'silu', 'hidden_size': 768, 'initializer_range': 0.1, 'layer_norm_epsilon': 1e-5,
    'model_type': 'mamba2', 'n_groups': 1, 'norm_before_gate': True, 'num_heads': 24, 'num_hidden_layers': 24,
    'pad_token_id': 0, 'rescale_prenorm_residual': False, 'residual_in_fp32': True, 'rms_norm': True,
    'state_size': 128, 'tie_word_embeddings': True, 'time_step_limit': [0.0, float('inf')],
    'time_step_rank': 48, 'use_bias': False, 'use_cache': True, 'use_conv_bias': True, 'vocab_size': 50288,
  },
  'Jamba-v0.1': {
    **LLAMA, 'attn_layer_offset': 4, 'attn_layer_period': 8, 'calc_logits_for_entire_prompt': False,
    'expert_layer_offset': 1, 'expert_layer_period': 2, 'hidden_size': 4096, 'intermediate_size': 14336,
    'mamba_conv_bias': True, 'mamba_d_conv': 4, 'mamba_d_state': 16, 'mamba_dt_rank': 256, 'mamba_expand': 2,
    'mamba_inner_layernorms': True, 'mamba_proj_bias': False, 'model_type': 'jamba', 'n_ctx': 262144,
    'num_attention_heads': 32, 'num_experts': 16, 'num_experts_per_tok': 2, 'num_hidden_layers': 32,
    'num_key_value_heads': 8, 'num_logits_to_keep': 1, 'output_router_logits': False,
    'router_aux_loss_coef': 0.001, 'sliding_window': None, 'tie_word_embeddings': False,
    'use_mamba_kernels': True, 'vocab_size': 65536,
  },
  'DeepSeek-V2-Lite': {
    **DEEPSEEK, 'model_type': 'deepseek_v2', 'first_k_dense_replace': 1, 'hidden_size': 2048,
    'intermediate_size': 10944, 'moe_intermediate_size': 1408, 'n_group': 1, 'n_routed_experts': 64,
    'n_shared_experts': 2, 'norm_topk_prob': False, 'num_attention_heads': 16, 'num_experts_per_tok': 6,
    'num_hidden_layers': 27, 'num_key_value_heads': 16, 'q_lora_rank': None, 'routed_scaling_factor': 1.0,
    'rope_scaling': {**YARN, 'mscale': 0.707, 'mscale_all_dim': 0.707}, 'scoring_func': 'softmax',
    'topk_group': 1, 'topk_method': 'greedy', 'vocab_size': 102400,
  },
  'DeepSeek-V3': {
    **DEEPSEEK, 'model_type': 'deepseek_v3', 'first_k_dense_replace': 3, 'hidden_size': 7168,
    'intermediate_size': 18432, 'moe_intermediate_size': 2048, 'n_group': 8, 'n_routed_experts': 256,
    'n_shared_experts': 1, 'norm_topk_prob': True, 'num_attention_heads': 128, 'num_experts_per_tok': 8,
    'num_hidden_layers': 61, 'num_key_value_heads': 128, 'num_nextn_predict_layers': 1, 'q_lora_rank': 1536,
    'rope_scaling': {**YARN, 'mscale': 1.0, 'mscale_all_dim': 1.0}, 'routed_scaling_factor': 2.5,
    'scoring_func': 'sigmoid', 'topk_group': 4, 'topk_method': 'noaux_tc', 'vocab_size': 129280,
  },
}  # fmt: skip

# Experts have so many tensors that a few layers must do.
FEW_LAYERS = {
  'Mixtral-8x7B': {'num_hidden_layers': 2}, 'Qwen3-30B-A3B': {'num_hidden_layers': 2},
  'Jamba-v0.1': {'num_hidden_layers': 8}, 'DeepSeek-V2-Lite': {'num_hidden_layers': 2},
  'DeepSeek-V3': {'num_hidden_layers': 4},
}  # fmt: skip


def read(config: dict) -> str:
  family, settings = inwards.family_of(config)
  return inwards.gin_text(family, settings)


@pytest.mark.parametrize('name', RELEASES)
def test_the_config_of_a_release_is_read(name):
  config = RELEASES[name]
  assert f'VOCAB = {config.get("vocab_size")}' in read(config)


def test_a_key_that_transformers_has_dropped_is_refused_with_another_value():
  tried = 0
  for config in RELEASES.values():
    for key, values in RELEASED.get(config['model_type'], {}).items():
      if values is ANY or key not in config:
        continue
      tried += 1
      with pytest.raises(UserError, match=f'{key} = .* is not supported'):
        read({**config, key: 'another'})
  assert tried > 10


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [
    ('Pythia-70M', 'head_dim', 128),  # transformers would rotate 32 of 64 channels and not 16
    ('Qwen2.5-0.5B', 'head_dim', None),
    ('Falcon-7B', 'head_dim', 64),
    ('Gemma-3-270M', 'attn_logit_softcapping', 50.0),  # the cap is not applied there
    ('DeepSeek-V3', 'rms_norm_eps', 1e-5),  # the inner norms keep 1e-6
    ('DeepSeek-V3', 'n_group', 256),
    ('DeepSeek-V3', 'head_dim', 128),  # positions would be made for 128 channels and not 64
    ('Mamba-130M', 'intermediate_size', 1024),
    ('Mamba-130M', 'rescale_prenorm_residual', True),  # rescales the weights that it loads
    ('mT5 small', 'tie_word_embeddings', None),
  ],
)
def test_a_value_that_transformers_takes_otherwise_is_refused_by_name(name, key, value):
  with pytest.raises(UserError, match=key):
    read(RELEASES[name] | {key: value})


@pytest.mark.slow
@pytest.mark.parametrize('name', RELEASES)
def test_the_model_of_a_release_has_the_tensors_of_transformers(name):
  """At full width, but without any values: names and shapes are those that transformers saves."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  from transformers.core_model_loading import revert_weight_conversion

  from research.core import configs

  config = RELEASES[name] | FEW_LAYERS.get(name, {})
  gin = configs.Config('MODEL')
  gin._read(read(config), 'model.gin')
  family, _ = inwards.family_of(config)
  ours = {tensor.name: tensor.shape for tensor in inwards.table(gin.tree(), family)}
  with torch.device('meta'):
    model = getattr(transformers, family.architecture)(transformers.AutoConfig.for_model(**config))
    saved = revert_weight_conversion(model, model.state_dict())  # one tensor for every expert
  theirs = {key: tuple(value.shape) for key, value in saved.items()}
  assert not {key for key, shape in ours.items() if theirs.get(key) != shape}
