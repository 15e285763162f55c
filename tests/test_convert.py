"""Reading and writing Hugging Face folders: files, config.json, errors, the command."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from research import configs, convert
from research.errors import UserError
from research.model import counts, hf_families
from research.sharding import Mesh
from tests.families import tiny

CONFIG = {
  'model_type': 'llama', 'vocab_size': 32, 'hidden_size': 16, 'num_hidden_layers': 2, 'hidden_act': 'silu',
  'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 24, 'rms_norm_eps': 1e-5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """A small LLaMA in two files, as written by hand."""
  rng = np.random.default_rng(0)
  tensors = {
    'model.embed_tokens.weight': (32, 16), 'model.norm.weight': (16,), 'lm_head.weight': (32, 16),
  }  # fmt: skip
  for i in range(2):
    layer = {
      'input_layernorm': (16,), 'post_attention_layernorm': (16,), 'self_attn.q_proj': (16, 16),
      'self_attn.k_proj': (8, 16), 'self_attn.v_proj': (8, 16), 'self_attn.o_proj': (16, 16),
      'mlp.gate_proj': (24, 16), 'mlp.up_proj': (24, 16), 'mlp.down_proj': (16, 24),
    }  # fmt: skip
    tensors.update({f'model.layers.{i}.{k}.weight': v for k, v in layer.items()})
  values = {k: rng.normal(size=v).astype(np.float32) for k, v in tensors.items()}
  write(tmp_path, values)
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  return tmp_path, values


def write(folder, values, dtype='float32'):
  names = sorted(values)
  for i, part in enumerate((names[:5], names[5:])):
    convert.write_tensors(
      folder, ((n, values[n]) for n in part), {n: values[n].shape for n in part}, dtype
    )
    (folder / 'model.safetensors').rename(folder / f'model-0000{i + 1}-of-00002.safetensors')


def gin_of(text):
  gin = configs.Config('MODEL')
  gin._read(text, 'model.gin')
  return gin


def test_files_are_what_the_safetensors_package_reads(folder):
  safetensors = pytest.importorskip('safetensors.numpy')
  path, values = folder
  read = {}
  for file in path.glob('*.safetensors'):
    read.update(safetensors.load_file(file))
  assert read.keys() == values.keys()
  assert all((read[k] == values[k]).all() for k in values)


def test_shards_are_read_into_the_stacked_layers(folder):
  path, values = folder
  text, params = convert.load(path)
  query = params['stack']['sublayers'][0]['parts'][0]['query']['kernel']
  assert query.shape == (2, 16, 4, 4)
  for i in range(2):
    theirs = values[f'model.layers.{i}.self_attn.q_proj.weight']
    assert (query[i] == theirs.T.reshape(16, 4, 4)).all()
  assert counts.count(gin_of(text).tree(), {'targets': 8}).params_total == sum(
    v.size for v in values.values()
  )


def test_parameters_can_be_buffered_in_files(folder, tmp_path):
  path, _ = folder
  (tmp_path / 'buffers').mkdir()
  _, params = convert.load(path, tmp_path / 'buffers')
  _, again = convert.load(path)
  assert all(isinstance(x, np.memmap) for x in jax.tree.leaves(params))
  assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, again))


def test_bfloat16_is_exact_there_and_back(folder, tmp_path):
  path, values = folder
  rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in values.items()}
  write(path, rounded, 'bfloat16')
  text, params = convert.load(path)
  convert.save(tmp_path / 'back', gin_of(text), params, 'llama', 'bfloat16')
  back = convert.read_tensors(tmp_path / 'back')
  assert all(back[k].tobytes() == rounded[k].tobytes() for k in values)


def test_every_wrong_tensor_is_listed(folder):
  path, values = folder
  del values['model.norm.weight']
  values['model.norms.weight'] = np.zeros(16, np.float32)
  values['lm_head.weight'] = np.zeros((33, 16), np.float32)
  write(path, values)
  with pytest.raises(UserError) as error:
    convert.load(path)
  for wrong in (
    'model.norm.weight is missing',
    'model.norms.weight is unknown',
    'lm_head.weight is (33, 16) and should be (32, 16)',
  ):
    assert wrong in str(error.value)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'lama'}, "no family for model_type 'lama'. Did you mean .*llama"),
    ({'hidden_act': 'relu'}, "llama with hidden_act = 'relu' is not supported, only 'silu'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "no rotary scaling 'dynamic' here"),
  ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_one_sentence(folder, change, message):
  path, _ = folder
  (path / 'config.json').write_text(json.dumps({**CONFIG, **change}))
  with pytest.raises(UserError, match=message):
    convert.load(path)


def test_a_folder_without_a_model_says_what_is_wanted(tmp_path):
  with pytest.raises(UserError, match=r'no config\.json here'):
    convert.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(UserError, match=r'no \*\.safetensors here'):
    convert.load(tmp_path)


def test_a_model_is_not_written_as_a_family_that_cannot_say_it(folder, tmp_path):
  path, _ = folder
  text, params = convert.load(path)
  wide = gin_of(text + 'positions.rotary.interleaved = True\n')
  with pytest.raises(UserError, match="cannot say 'interleaved = True' of this model"):
    convert.save(tmp_path / 'out', wide, params, 'llama')
  with pytest.raises(UserError, match='mixtral'):
    convert.save(tmp_path / 'out', gin_of(text), params, 'mixtral')
  with pytest.raises(UserError, match=r'no family .lama.'):
    convert.save(tmp_path / 'out', gin_of(text), params, 'lama')


def test_the_family_of_every_row_exists():
  for family in hf_families.FAMILIES:
    assert configs.find_file(family.gin).is_file()


def test_a_preset_trained_here_can_be_written(tmp_path):
  model = tiny('qwen3')
  with Mesh().use(jax.devices()[:1]):
    init = lambda key: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))
    params = jax.jit(init)(jax.random.key(0))
  gin = configs.load('gin/models/qwen3/0_6b.gin', ['LAYERS=2', 'EMBED=16', 'HEADS=4', 'KV_HEADS=2',
                     'HEAD_DIM=8', 'MLP=32', 'VOCAB=64'], root='MODEL')  # fmt: skip
  convert.save(tmp_path, gin, params, 'qwen3')
  text, again = convert.load(tmp_path)
  assert 'EMBED = 16' in text
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


@pytest.mark.slow
def test_the_command_there_and_back(folder, tmp_path):
  path, values = folder

  def command(*flags):
    run = [sys.executable, '-m', 'research.convert', *map(str, flags)]
    return subprocess.run(run, check=False, capture_output=True, text=True, timeout=300)

  ours, back = tmp_path / 'ours', tmp_path / 'back'
  done = command(f'--from_hf={path}', f'--out={ours}')
  assert done.returncode == 0, done.stderr
  done = command(
    f'--to_hf={back}', f'--checkpoint={ours}', f'--gin_file={ours}/model.gin', '--model_type=llama'
  )
  assert done.returncode == 0, done.stderr
  tensors = convert.read_tensors(back)
  assert all((tensors[k] == values[k]).all() for k in values)
  assert command('--from_hf=a', '--to_hf=b').returncode == 2
