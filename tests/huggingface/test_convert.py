"""Reading and writing Hugging Face folders: files, config.json, errors, the command."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from research.checkpoints import manager, streamed
from research.core import configs
from research.core.errors import UserError
from research.huggingface import families, inwards, outwards
from research.huggingface.files import Tensors, write_tensors
from research.model import counts
from research.parallel.mesh import Mesh
from tests.families import tiny

CONFIG = {
  'model_type': 'llama', 'vocab_size': 32, 'hidden_size': 16, 'num_hidden_layers': 2, 'hidden_act': 'silu',
  'num_attention_heads': 4, 'num_key_value_heads': 2, 'intermediate_size': 24, 'rms_norm_eps': 1e-5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
  """A small LLaMA in two files, as written by hand."""
  return tmp_path, write_llama(tmp_path)


def write_llama(path, vocab: int = 32) -> dict:
  """A Hugging Face folder with `CONFIG` and random tensors, which are returned by name."""
  rng = np.random.default_rng(0)
  tensors = {
    'model.embed_tokens.weight': (vocab, 16), 'model.norm.weight': (16,), 'lm_head.weight': (vocab, 16),
  }  # fmt: skip
  for i in range(2):
    layer = {
      'input_layernorm': (16,), 'post_attention_layernorm': (16,), 'self_attn.q_proj': (16, 16),
      'self_attn.k_proj': (8, 16), 'self_attn.v_proj': (8, 16), 'self_attn.o_proj': (16, 16),
      'mlp.gate_proj': (24, 16), 'mlp.up_proj': (24, 16), 'mlp.down_proj': (16, 24),
    }  # fmt: skip
    tensors.update({f'model.layers.{i}.{k}.weight': v for k, v in layer.items()})
  values = {k: rng.normal(size=v).astype(np.float32) for k, v in tensors.items()}
  write(path, values)
  (path / 'config.json').write_text(json.dumps({**CONFIG, 'vocab_size': vocab}))
  return values


def write(folder, values, dtype='float32'):
  shapes = {name: x.shape for name, x in sorted(values.items())}
  write_tensors(folder, iter(values.items()), shapes, dtype, file_bytes=7000)


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
  text, params = inwards.load(path)
  query = params['stack']['sublayers'][0]['parts'][0]['query']['kernel']
  assert query.shape == (2, 16, 4, 4)
  for i in range(2):
    theirs = values[f'model.layers.{i}.self_attn.q_proj.weight']
    assert (query[i] == theirs.T.reshape(16, 4, 4)).all()
  assert counts.count(gin_of(text).tree(), {'targets': 8}).params_total == sum(
    v.size for v in values.values()
  )


def restored(folder, log=print):
  """The parameters of a converted checkpoint, as training would restore them; None where they are damaged."""
  checkpoint = manager.Checkpoints(folder)
  with Mesh(data=-1).use():
    wanted = counts.abstract(gin_of((folder / 'model.gin').read_text()).tree())
    params = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.typeof(x).sharding),
      nnx.to_pure_dict(nnx.state(wanted)),
    )
    found = checkpoint.restore({'params': params}, log)
  checkpoint.close()
  return found and found[1]['params']


def test_a_converted_checkpoint_is_restored_and_verified_as_any_other(folder, tmp_path):
  path, _ = folder
  inwards.from_hf(path, tmp_path / 'ours')
  _, params = inwards.load(path)
  again = restored(tmp_path / 'ours')
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_pieces_go_there_and_back_in_several_files(folder, tmp_path):
  path, values = folder
  inwards.from_hf(path, tmp_path / 'ours')
  params = streamed.Params(tmp_path / 'ours')
  gin = gin_of((tmp_path / 'ours' / 'model.gin').read_text())
  outwards.save(tmp_path / 'back', gin, params, 'llama', file_bytes=8000)
  files = sorted((tmp_path / 'back').glob('*.safetensors'))
  index = json.loads((tmp_path / 'back' / 'model.safetensors.index.json').read_text())
  assert len(files) == 3
  assert all(file.stat().st_size < 8000 + 2000 for file in files)  # a header of names
  assert index['metadata']['total_size'] == sum(v.nbytes for v in values.values())
  assert index['weight_map'].keys() == values.keys()
  back = Tensors(tmp_path / 'back')
  assert all(back.places[k][0].name == index['weight_map'][k] for k in values)
  assert all((back[k] == values[k]).all() for k in values)
  assert not params.in_memory  # every piece was read by itself


def test_a_conversion_cut_short_is_found_to_be_damaged(folder, tmp_path, monkeypatch):
  path, _ = folder
  pieces, passes = inwards.pieces, []

  def cut(wanted, given):
    passes.append(len(wanted))
    for i, piece in enumerate(pieces(wanted, given)):
      if len(passes) == 2 and i == 5:
        raise KeyboardInterrupt
      yield piece

  monkeypatch.setattr(inwards, 'pieces', cut)
  with pytest.raises(KeyboardInterrupt):
    inwards.from_hf(path, tmp_path / 'ours')
  (tmp_path / 'ours' / 'model.gin').write_text(inwards.load(path)[0])
  said = []
  assert restored(tmp_path / 'ours', said.append) is None
  assert 'damaged' in said[0]


def test_a_checkpoint_of_training_is_read_a_parameter_at_a_time(tmp_path):
  kernel = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  saved = manager.Checkpoints(tmp_path / 'checkpoints')
  saved.save(3, {'params': {'a': {0: jax.numpy.asarray(kernel)}}, 'step': 3}, {})
  saved.close()
  params = streamed.Params(tmp_path)
  assert (params.piece(('a', 0), (1,)) == kernel[1]).all()
  assert params.in_memory.keys() == {('a', 0)}
  params.forget()
  assert not params.in_memory
  with pytest.raises(UserError, match='has no parameter b/c'):
    params.piece(('b', 'c'), ())


@pytest.mark.parametrize('cut', [1, 7, 60])
def test_checksums_of_pieces_add_up(cut):
  x = np.random.default_rng(0).normal(size=60).astype(np.float32)
  whole = manager.checksums({'x': jax.numpy.asarray(x.reshape(3, 4, 5))})['x']
  parts = manager.partial_checksum(x[:cut], 0) + manager.partial_checksum(x[cut:], cut)
  assert parts % 2**32 == whole


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8', 'uint32'])
def test_checksums_on_the_host_are_those_on_devices(dtype):
  x = {'x': jax.numpy.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)) * 50).astype(dtype)}
  assert manager.checksums(x) == manager.checksums(jax.device_get(x))
  assert manager.checksums(x)['x'] == int(manager._checksums(x)['x'])


MEMORY = """
import resource, sys
from research.core import configs
from research.huggingface import inwards, outwards
from research.checkpoints import streamed
folder = sys.argv[1]
if sys.argv[2] == 'from':
  inwards.from_hf(folder, folder + '/ours')
else:
  gin = configs.Config('MODEL')
  gin._read(open(folder + '/ours/model.gin').read(), 'model.gin')
  outwards.save(folder + '/back', gin, streamed.Params(folder + '/ours'), 'llama', file_bytes=3e7)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_is_near_that_of_one_file_in_both_directions(tmp_path, user_environment):
  """A model of eight files of 26 MB costs no more than one file above what a model of one file costs."""
  wide = {'hidden_size': 512, 'intermediate_size': 1408, 'vocab_size': 512, 'num_attention_heads': 8,
          'num_key_value_heads': 8}  # fmt: skip
  peaks, sizes = {'from': [], 'to': []}, []
  for layers in (2, 16):
    path = tmp_path / str(layers)
    path.mkdir()
    config = {**CONFIG, **wide, 'num_hidden_layers': layers}
    (path / 'config.json').write_text(json.dumps(config))
    family, settings = inwards.family_of(config)
    wanted = inwards.table(gin_of(inwards.gin_text(family, settings)).tree(), family)
    rng, shapes = np.random.default_rng(0), {t.name: t.shape for t in wanted}
    values = ((name, rng.random(shape, np.float32)) for name, shape in shapes.items())
    write_tensors(path, values, shapes, 'float32', file_bytes=2.6e7)
    sizes.append(sum(f.stat().st_size for f in path.glob('*.safetensors')))
    for way, peak in peaks.items():
      run = [sys.executable, '-c', MEMORY, str(path), way]
      done = subprocess.run(run, check=True, capture_output=True, text=True, env=user_environment)
      peak.append(int(done.stdout.split()[-1]))
    back, theirs = Tensors(path / 'back'), Tensors(path)
    assert all((back[name] == theirs[name]).all() for name in shapes)
  assert sizes[1] - sizes[0] > 7 * 2.5e7
  for small, large in peaks.values():
    assert large - small < 2.6e7


def test_bfloat16_is_exact_there_and_back(folder, tmp_path):
  path, values = folder
  rounded = {k: v.astype(ml_dtypes.bfloat16) for k, v in values.items()}
  write(path, rounded, 'bfloat16')
  text, params = inwards.load(path)
  outwards.save(tmp_path / 'back', gin_of(text), params, 'llama', 'bfloat16')
  back = Tensors(tmp_path / 'back')
  assert all(back[k].tobytes() == rounded[k].tobytes() for k in values)


def test_every_wrong_tensor_is_listed(folder):
  path, values = folder
  del values['model.norm.weight']
  values['model.norms.weight'] = np.zeros(16, np.float32)
  values['lm_head.weight'] = np.zeros((33, 16), np.float32)
  write(path, values)
  with pytest.raises(UserError) as error:
    inwards.load(path)
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
    ({'num_hidden_layers': 10**9}, 'num_hidden_layers = 1000000000 of config.json is more than the'),
    ({'quantization_config': {'quant_method': 'gptq', 'bits': 4}}, 'no tensor of the files is; take it out'),
    ({'hidden_act': 'relu'}, "llama with hidden_act = 'relu' is not supported, only 'silu'"),
    ({'rope_scaling': {'type': 'dynamic', 'factor': 2.0}}, "rotary scaling 'dynamic' is not supported"),
  ],
)  # fmt: skip
def test_a_config_that_is_not_supported_is_one_sentence(folder, change, message):
  path, _ = folder
  (path / 'config.json').write_text(json.dumps({**CONFIG, **change}))
  with pytest.raises(UserError, match=message):
    inwards.load(path)


def test_a_folder_without_a_model_says_what_is_wanted(tmp_path):
  with pytest.raises(UserError, match=r'no config\.json here'):
    inwards.load(tmp_path)
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  with pytest.raises(UserError, match=r'no model\.safetensors and no'):
    inwards.load(tmp_path)


def test_a_model_is_not_written_as_a_family_that_cannot_say_it(folder, tmp_path):
  path, _ = folder
  text, params = inwards.load(path)
  wide = gin_of(text + 'positions.rotary.interleaved = True\n')
  with pytest.raises(UserError, match=r'rotary\.interleaved of this model is True, only False'):
    outwards.save(tmp_path / 'out', wide, params, 'llama')
  with pytest.raises(UserError, match='mixtral'):
    outwards.save(tmp_path / 'out', gin_of(text), params, 'mixtral')
  with pytest.raises(UserError, match=r'no family .lama.'):
    outwards.save(tmp_path / 'out', gin_of(text), params, 'lama')


def test_the_family_of_every_row_exists():
  for family in families.FAMILIES:
    assert configs.find_file(family.gin).is_file()


def test_a_preset_trained_here_can_be_written(tmp_path):
  model = tiny('qwen3')
  with Mesh().use(jax.devices()[:1]):
    init = lambda key: nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))
    params = jax.jit(init)(jax.random.key(0))
  gin = configs.load('gin/models/qwen3/0_6b.gin', ['LAYERS=2', 'EMBED=16', 'HEADS=4', 'KV_HEADS=2',
                     'HEAD_DIM=8', 'MLP=32', 'VOCAB=64'], root='MODEL')  # fmt: skip
  outwards.save(tmp_path, gin, params, 'qwen3')
  text, again = inwards.load(tmp_path)
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
  tensors = Tensors(back)
  assert all((tensors[k] == values[k]).all() for k in values)
  assert command('--from_hf=a', '--to_hf=b').returncode == 2
