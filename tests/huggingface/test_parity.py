"""Every family is the function that transformers computes: tiny random models, float32, through convert.

The largest difference of the logits must be under 1e-4 of the logits' own scale; gradients of the loss under
1e-4 of each tensor's scale. Converting there and back is bit-identical.
"""

# ruff: noqa: C408  the configurations read as the calls that they are
import functools
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from research.core import configs
from research.huggingface import files, inwards, outwards
from research.huggingface.companions import IDS
from research.model import counts
from research.parallel.mesh import Mesh

os.environ.setdefault('HF_HUB_OFFLINE', '1')
torch = pytest.importorskip('torch')
T = pytest.importorskip('transformers')

TOLERANCE = 1e-4
LENGTH = 12
VOCAB = 96
BASE = dict(
  hidden_size=32,
  num_hidden_layers=2,
  num_attention_heads=4,
  vocab_size=VOCAB,
  max_position_embeddings=64,
  bos_token_id=None,
  eos_token_id=None,
  pad_token_id=None,
)
LLAMA = dict(BASE, num_key_value_heads=2, intermediate_size=48)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB)
T5 = dict(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=VOCAB)
FALCON = dict(BASE, max_position_embeddings=2048)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
LATENT = dict(
  LLAMA,
  num_key_value_heads=4,
  moe_intermediate_size=24,
  num_experts_per_tok=2,
  kv_lora_rank=12,
  qk_nope_head_dim=8,
  qk_rope_head_dim=4,
  v_head_dim=6,
  first_k_dense_replace=1,
)
ROPES = {
  'llama3': dict(
    rope_type='llama3',
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
  ),
  'linear': dict(rope_type='linear', rope_theta=1e4, factor=4.0),
  'yarn': dict(
    rope_type='yarn',
    rope_theta=1e4,
    factor=4.0,
    original_max_position_embeddings=64,
    mscale=1.0,
    mscale_all_dim=0.8,
    beta_fast=32,
    beta_slow=1,
  ),
}


def _llama(rope):
  return lambda: T.LlamaConfig(**LLAMA, head_dim=8, rope_parameters=ROPES[rope])


# A row per family that transformers can build; windows are shorter than the sequence, heads grouped.
CASES = {
  'llama': _llama('llama3'),
  'llama-linear': _llama('linear'),
  'llama-yarn': _llama('yarn'),
  'mistral': lambda: T.MistralConfig(**LLAMA, sliding_window=5),
  'mixtral': lambda: T.MixtralConfig(**LLAMA, num_local_experts=4, sliding_window=None),
  'qwen2': lambda: T.Qwen2Config(**LLAMA, tie_word_embeddings=True),
  'qwen2_moe': lambda: T.Qwen2MoeConfig(**LLAMA, **MOE, shared_expert_intermediate_size=40),
  'qwen3': lambda: T.Qwen3Config(**LLAMA, head_dim=16),
  'qwen3_moe': lambda: T.Qwen3MoeConfig(**LLAMA, **MOE, head_dim=16, norm_topk_prob=True),
  'gemma': lambda: T.GemmaConfig(**LLAMA, head_dim=16),
  'gemma2': lambda: T.Gemma2Config(
    **LLAMA, head_dim=16, sliding_window=5, query_pre_attn_scalar=20
  ),
  'gemma3_text': lambda: T.Gemma3TextConfig(
    **{**LLAMA, 'num_hidden_layers': 7}, head_dim=16, sliding_window=5, query_pre_attn_scalar=20
  ),
  'glm': lambda: T.GlmConfig(**LLAMA, head_dim=8),
  'glm4': lambda: T.Glm4Config(**LLAMA, head_dim=8),
  'olmo2': lambda: T.Olmo2Config(**LLAMA),
  'stablelm': lambda: T.StableLmConfig(**LLAMA),
  'phi': lambda: T.PhiConfig(**BASE, intermediate_size=48),
  'falcon-7b': lambda: T.FalconConfig(**FALCON, multi_query=True),
  'falcon-40b': lambda: T.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2),
  'bloom': lambda: T.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCAB),
  'mpt': lambda: T.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=VOCAB, max_seq_len=64),
  'opt': lambda: T.OPTConfig(**BASE, ffn_dim=48, word_embed_proj_dim=32),
  'gpt2': lambda: T.GPT2Config(**GPT2, bos_token_id=None, eos_token_id=None),
  'gptj': lambda: T.GPTJConfig(**GPT2, rotary_dim=4, bos_token_id=None, eos_token_id=None),
  'gpt_neox': lambda: T.GPTNeoXConfig(**BASE, intermediate_size=48),
  'bert': lambda: T.BertConfig(**BASE, intermediate_size=48),
  't5-1.0': lambda: T.T5Config(**T5, feed_forward_proj='relu'),
  't5-1.1': lambda: T.T5Config(**T5, feed_forward_proj='gated-gelu', tie_word_embeddings=False),
  't5-silu': lambda: T.T5Config(**T5, feed_forward_proj='gated-silu'),
  'mt5': lambda: T.MT5Config(**T5),
  'switch': lambda: T.SwitchTransformersConfig(
    **{**T5, 'num_layers': 4},
    num_decoder_layers=4,
    num_sparse_encoder_layers=2,
    num_sparse_decoder_layers=2,
    num_experts=4,
    expert_capacity=4,
  ),
  'mamba': lambda: T.MambaConfig(
    hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB, state_size=8
  ),
  'mamba2': lambda: T.Mamba2Config(
    hidden_size=32,
    num_hidden_layers=2,
    vocab_size=VOCAB,
    state_size=8,
    num_heads=8,
    head_dim=8,
    n_groups=2,
    chunk_size=4,
  ),
  'jamba': lambda: T.JambaConfig(
    **{**LLAMA, 'num_hidden_layers': 8},
    num_experts=4,
    num_experts_per_tok=2,
    mamba_d_state=8,
    mamba_dt_rank=4,
  ),
  'deepseek_v2': lambda: T.DeepseekV2Config(
    **LATENT,
    q_lora_rank=None,
    n_routed_experts=4,
    n_shared_experts=2,
    topk_method='greedy',
    n_group=1,
    topk_group=1,
  ),
  'deepseek_v2-groups': lambda: T.DeepseekV2Config(
    **LATENT,
    q_lora_rank=16,
    n_routed_experts=8,
    n_shared_experts=1,
    topk_method='group_limited_greedy',
    n_group=4,
    topk_group=2,
  ),
  'deepseek_v3': lambda: T.DeepseekV3Config(
    **LATENT,
    q_lora_rank=16,
    n_routed_experts=8,
    n_shared_experts=1,
    n_group=4,
    topk_group=2,
    rope_parameters=ROPES['yarn'],
  ),
}
# Another member of a kind that is checked in full above: the slow suite has them.
SLOW = (
  'llama-linear', 'llama-yarn', 'gptj', 'glm4', 'qwen3_moe', 'deepseek_v2', 'deepseek_v2-groups', 'mt5',
  'gemma', 'mpt',
  'jamba', 't5-1.0', 't5-silu', 'qwen3', 'mistral', 'phi', 'gpt_neox', 'qwen2_moe',
)  # fmt: skip
ENCODER_DECODERS = ('t5-1.0', 't5-1.1', 't5-silu', 'mt5', 'switch')
# One of each kind of part.
GRADIENTS = (
  'llama',
  'mixtral',
  'mamba',
  'gemma2',
  'bert',
  't5-1.1',
  'mamba2',
  'bloom',
  'deepseek_v3',
)


def _slow(names, slow):
  return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


EVERY = _slow(CASES, SLOW)
# Compiling is most of the time, and nothing here runs twice.
COMPILE = {'xla_backend_optimization_level': 0}


def _randomise(model, seed=0):
  """Weights large enough that attention is far from uniform, and norms and biases that are not 1 and 0."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for p in (
      *model.parameters(),
      *(b for n, b in model.named_buffers() if n.endswith('correction_bias')),
    ):
      if p.ndim > 1:
        p.mul_(max(1.0, 0.15 / float(p.std())))
      else:
        p.add_(0.1 * torch.randn(p.shape, generator=generator))


@functools.cache
def _reference(name):
  torch.manual_seed(0)
  config = CASES[name]()
  auto = T.AutoModelForCausalLM
  if name == 'bert':
    auto = T.AutoModelForMaskedLM
  if name in ENCODER_DECODERS:
    auto = T.AutoModelForSeq2SeqLM
  model = auto.from_config(config, attn_implementation='eager').eval()
  if name == 't5-1.1':
    # Release 1.1 has a matrix for the head; this version of transformers ties it whatever the config says.
    model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB, 32))
  _randomise(model)
  return model


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  @functools.cache
  def export(name):
    folder = tmp_path_factory.mktemp(name)
    _reference(name).save_pretrained(folder)
    if name == 't5-1.1':
      _save_with_head(folder, _reference(name).lm_head.weight)
    return folder

  return export


def _save_with_head(folder, head):
  path = folder / 'config.json'
  path.write_text(json.dumps({**json.loads(path.read_text()), 'tie_word_embeddings': False}))
  given = dict(files.Tensors(folder))
  given = {k: np.array(v) for k, v in given.items()} | {'lm_head.weight': head.detach().numpy()}
  files.write_tensors(
    folder, iter(given.items()), {k: v.shape for k, v in given.items()}, 'float32'
  )


@functools.cache
def _converted(folder: pathlib.Path):
  text, params = inwards.load(folder)
  gin = configs.Config('MODEL')
  gin._read(text, 'model.gin')
  return gin, params, nnx.graphdef(counts.abstract(gin.tree()))


def _batch(name, seed=0):
  """Tokens for us and for transformers; the second row ends in padding where the family masks it."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(1, VOCAB, (2, LENGTH)).astype(np.int32)
  if name in ENCODER_DECODERS:
    source = rng.integers(1, VOCAB, (2, LENGTH)).astype(np.int32)
    source[1, 9:] = 0
    ours = {'encoder_input_tokens': source, 'decoder_input_tokens': tokens}
    theirs = {'input_ids': source, 'attention_mask': source > 0, 'decoder_input_ids': tokens}
    real = np.ones_like(tokens)
  else:
    real = np.ones_like(tokens)
    real[1, 9:] = 0
    ours = {'decoder_input_tokens': tokens, 'decoder_segment_ids': real}
    theirs = {'input_ids': tokens, 'attention_mask': real}
  theirs = {k: torch.tensor(v).long() for k, v in theirs.items()}
  return ours, theirs, real.astype(bool)


def _logits(graphdef, params, batch):
  return nnx.merge(graphdef, params)(batch)[0]


@pytest.fixture(autouse=True)
def _one_device():
  with Mesh().use(jax.devices()[:1]):
    yield


@pytest.mark.parametrize('name', EVERY)
def test_logits_are_those_of_transformers(name, exported):
  _, params, graphdef = _converted(exported(name))
  ours, theirs, real = _batch(name)
  with torch.no_grad():
    want = _reference(name)(**theirs).logits.numpy()[real]
  got = np.asarray(
    jax.jit(_logits, static_argnums=0, compiler_options=COMPILE)(graphdef, params, ours)
  )[real]
  assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
  assert np.abs(want).std() > 0.1  # there is something to compare


@pytest.mark.parametrize('name', EVERY)
def test_round_trip_is_bit_identical(name, exported, tmp_path):
  gin, params, _ = _converted(exported(name))
  before = files.Tensors(exported(name))
  config = json.loads((exported(name) / 'config.json').read_text())
  outwards.save(tmp_path, gin, params, config['model_type'])
  after = files.Tensors(tmp_path)
  assert before.keys() == after.keys()
  for key, x in before.items():
    assert x.shape == after[key].shape
    assert x.tobytes() == after[key].tobytes(), key
  again = json.loads((tmp_path / 'config.json').read_text())
  new = {k: v for k, v in again.items() if k in config and config[k] is not None and config[k] != v}
  assert not {k: v for k, v in new.items() if k not in IDS and not _close(v, config[k])}


def _close(a, b):
  if isinstance(a, dict):
    return all(_close(v, b[k]) for k, v in a.items() if k in b)
  return a == pytest.approx(b) if isinstance(a, float) else a == b


@pytest.mark.parametrize('name', _slow(GRADIENTS, GRADIENTS[3:]))
def test_gradients_are_those_of_transformers(name, exported):
  gin, params, graphdef = _converted(exported(name))
  ours, theirs, real = _batch(name)
  labels = np.random.default_rng(1).integers(1, VOCAB, real.shape)

  @functools.partial(jax.jit, compiler_options=COMPILE)
  def gradient(params):
    def loss(params):
      logits = _logits(graphdef, params, ours)
      picked = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(labels, VOCAB), axis=-1)
      return -jnp.sum(picked * real)

    return jax.grad(loss)(params)

  got = jax.tree.map(np.asarray, gradient(params))
  model = _reference(name)
  model.zero_grad()
  logits = model(**theirs).logits
  loss = torch.nn.functional.cross_entropy(
    logits[torch.tensor(real)], torch.tensor(labels)[torch.tensor(real)], reduction='sum'
  )
  loss.backward()
  want = _as_ours(gin, exported(name), model)
  for tensor, value in want:
    mine = tensor.join([_at(got, piece) for piece in tensor.pieces])
    scale = max(np.abs(value).max(), 1e-3 * float(loss.detach()))
    assert np.abs(mine - value).max() < TOLERANCE * scale, tensor.name


def _as_ours(gin, folder, model):
  """(tensor of the table, its gradient in transformers), for those that have one name in both."""
  config = json.loads((folder / 'config.json').read_text())
  family, _ = inwards.family_of(config)
  named = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
  found = [(t, named[t.name].numpy()) for t in inwards.table(gin.tree(), family) if t.name in named]
  assert len(found) > 10
  return found


def _at(tree, piece):
  for key in piece.path:
    tree = tree[key]
  return tree[piece.index]
