"""What is written: transformers computes the same from it, and every preset of a known family is written."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from research.checkpoints import pretrained, streamed
from research.core import configs
from research.core.errors import UserError
from research.huggingface import inwards, outwards
from research.model.parameters import abstract_model
from research.parallel.mesh import Mesh
from tests.huggingface import test_parity

torch = pytest.importorskip('torch')
T = pytest.importorskip('transformers')

# The presets that a family of Hugging Face can say, and the family.
PRESETS = {
  'baichuan/7b': 'llama', 'bert/base': 'bert', 'bloom/560m': 'bloom', 'byt5/small': 't5',
  'deepseek/v2_lite': 'deepseek_v2', 'deepseek/v3': 'deepseek_v3',
  'falcon/7b': 'falcon', 'falcon/40b': 'falcon',
  'gemma/2b': 'gemma', 'gemma2/2b': 'gemma2', 'gemma3/1b': 'gemma3_text', 'gemma3/270m': 'gemma3_text',
  'gemma2/9b': 'gemma2', 'gemma2/27b': 'gemma2', 'gemma3/4b': 'gemma3_text', 'gemma3/12b': 'gemma3_text',
  'gemma3/27b': 'gemma3_text', 'gptj/6b': 'gptj',
  'glm/4_9b': 'glm', 'glm/4_9b_0414': 'glm4', 'gpt2/124m': 'gpt2', 'gpt3/125m': 'gpt2',
  'gpt_neox/20b': 'gpt_neox', 'jamba/52b': 'jamba', 'llama/7b': 'llama', 'llama/tiny': 'llama',
  'llama2/70b': 'llama', 'llama3/8b': 'llama', 'mamba/130m': 'mamba', 'mamba2/130m': 'mamba2',
  'mistral/7b': 'mistral', 'mixtral/8x7b': 'mixtral', 'mpt/7b': 'mpt', 'mt5/small': 'mt5', 'olmo2/7b': 'olmo2',
  'opt/125m': 'opt', 'pythia/70m': 'gpt_neox', 'qwen/7b': 'qwen2', 'qwen2/0_5b': 'qwen2',
  'qwen2/57b_a14b': 'qwen2_moe',
  'qwen2_5/0_5b': 'qwen2', 'qwen3/0_6b': 'qwen3', 'qwen3/30b_a3b': 'qwen3_moe',
  'switch/base_8': 'switch_transformers', 't5/1_0_small': 't5', 't5/1_1_small': 't5', 'ul2/20b': 't5',
}  # fmt: skip
RUN = """
from __gin__ import dynamic_registration
from research.data import corpora
from research.data import streams
include 'gin/runs/tiny.gin'
streams.Stream.corpus = @corpora.TextFiles()
corpora.TextFiles.files = '{files}'
corpora.TextFiles.validation_fraction = 0.2
train/streams.Stream.examples = 120
validation/streams.Stream.examples = 16
"""
FAST = ('llama/tiny', 'gemma3/270m', 'gpt2/124m')


@pytest.mark.parametrize(
  'name', [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS]
)
def test_a_preset_has_a_config_json(name):
  gin = configs.load([f'gin/models/{name}.gin'], root='MODEL')
  wanted, config = outwards.family_to_write(gin, PRESETS[name])
  assert config['vocab_size'] > 0
  assert len({tensor.name for tensor in wanted}) == len(wanted)


def test_what_a_family_cannot_say_is_refused():
  gin = configs.load(['gin/models/baichuan/13b.gin'], root='MODEL')  # ALiBi
  with pytest.raises(UserError, match='has no rotary positions'):
    outwards.family_to_write(gin, 'llama')


@pytest.mark.parametrize(
  'name',
  [n if n == 'gemma2' else pytest.param(n, marks=pytest.mark.slow) for n in test_parity.CASES],
)
def test_transformers_computes_the_same_from_what_is_written(name, tmp_path):
  reference = test_parity._reference(name)
  theirs = tmp_path / 'theirs'
  reference.save_pretrained(theirs)
  if name == 't5-1.1':
    test_parity._save_with_head(theirs, reference.lm_head.weight)
  config = json.loads((theirs / 'config.json').read_text())
  config |= {'bos_token_id': 3, 'eos_token_id': 4, 'pad_token_id': 5}
  (theirs / 'config.json').write_text(json.dumps(config))
  ours, back = tmp_path / 'ours', tmp_path / 'back'
  inwards.from_hf(theirs, ours)
  gin = configs.load([str(ours / 'model.gin')], root='MODEL')
  outwards.save(back, gin, streamed.Params(ours), config['model_type'], source=ours)
  model = type(reference).from_pretrained(back, attn_implementation='eager', dtype=torch.float32)
  _, batch, real = test_parity._batch(name)
  with torch.no_grad():
    want, got = (m.eval()(**batch).logits.numpy()[real] for m in (reference, model))
  assert np.abs(got - want).max() < test_parity.TOLERANCE * np.abs(want).max()
  loaded = model.config
  assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (3, 4, 5)


@pytest.mark.slow
def test_a_run_is_exported_by_the_commands_of_the_docs(tmp_path, text_file, user_environment):
  """docs/families.md: twenty steps of gin/models/llama/tiny.gin, here on a small text, and its tokenizer."""
  run, out, gin_file = tmp_path / 'run', tmp_path / 'hf', tmp_path / 'run.gin'
  gin_file.write_text(RUN.format(files=text_file))
  commands = [
    ['train', f'--gin_file={gin_file}', f'--workdir={run}', '--gin.Run.steps=20'],
    ['convert', f'--to_hf={out}', f'--checkpoint={run}', '--gin_file=gin/models/llama/tiny.gin',
     '--model_type=llama'],
  ]  # fmt: skip
  environment = {**user_environment, 'ISOFLOP_CACHE': os.environ['ISOFLOP_CACHE']}
  for name, *flags in commands:
    command = [sys.executable, '-m', f'research.{name}', *flags]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
  tokens = np.arange(3, 67)[None]
  with Mesh().use(jax.devices()[:1]):
    trained = pretrained.Pretrained(folder=str(run))
    params = pretrained.read_params(trained.model, trained.checkpoint)
    graphdef = nnx.graphdef(abstract_model(trained.model))
    want = np.asarray(nnx.merge(graphdef, params)({'decoder_input_tokens': tokens})[0])
  model = T.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
  with torch.no_grad():
    got = model(torch.tensor(tokens)).logits.numpy()
  assert np.abs(got - want).max() < test_parity.TOLERANCE * np.abs(want).max()
  assert (model.config.eos_token_id, model.config.pad_token_id) == (1, 0)
  ids = T.AutoTokenizer.from_pretrained(out)('loss').input_ids
  assert ids[:4] == [byte + 3 for byte in b'loss']
