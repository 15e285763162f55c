"""Families as Hugging Face has them: names of tensors per part, and keys of config.json beside gin's.

A row is a `Family`. Most are a gin file, tables of names shared with others, and the keys that differ.
"""

from research.huggingface.bert import BERT
from research.huggingface.gpt_like import GPT_LIKE
from research.huggingface.llama_like import LLAMA_LIKE
from research.huggingface.mamba_and_latent import OTHERS
from research.huggingface.t5_like import ENCODER_DECODERS

FAMILIES = (*LLAMA_LIKE, *GPT_LIKE, *BERT, *ENCODER_DECODERS, *OTHERS)
