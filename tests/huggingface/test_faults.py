"""Other people's folders, as public reports describe them: the right model, or a sentence that says why not."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from research.core.errors import UserError
from research.huggingface import companions, inwards
from research.huggingface.files import INDEX, ONE, Tensors, write_tensors
from tests.conftest import ROOT
from tests.huggingface.test_convert import CONFIG, folder  # noqa: F401

CASES = ROOT.parent / 'shared' / 'cases'
BROKEN = {
  'config_bom': 'byte order mark', 'config_trailing_comma': 'is not JSON', 'config_truncated': 'is not JSON',
  'empty_file': 'is empty', 'lfs_pointer': 'Git LFS pointer', 'missing_shard': 'is missing',
  'truncated': 'is cut', 'truncated_header': 'ends within its header',
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_a_broken_file_is_one_sentence_with_its_name(name):
  path = CASES / '15-broken-files' / name
  if not path.is_dir():
    pytest.skip('the failing inputs are not beside the checkout')
  with pytest.raises(UserError, match=BROKEN[name]) as error:
    inwards.load(path)
  assert '\n' not in str(error.value)
  assert 'config.json' in str(error.value) or '.safetensors' in str(error.value)


@pytest.mark.parametrize('tail', [0, 1, 7, 8, 200, -100])
def test_a_file_cut_anywhere_is_a_sentence(folder, tail):  # noqa: F811
  path, _ = folder
  one(path)
  data = (path / ONE).read_bytes()
  (path / ONE).write_bytes(data[:tail])
  with pytest.raises(UserError, match=r'empty|cut'):
    inwards.load(path)


def one(path: pathlib.Path, more=None) -> None:
  """The folder's shards as one file, with more tensors."""
  tensors = {name: np.array(value) for name, value in Tensors(path).items()} | (more or {})
  for file in (*path.glob('*.safetensors'), path / INDEX):
    file.unlink()
  write_tensors(path, iter(tensors.items()), {k: v.shape for k, v in tensors.items()}, 'float32')


def test_the_index_decides_and_not_the_folder(folder):  # noqa: F811
  path, values = folder
  stale = {name: value + 1 for name, value in values.items()}
  other = path / 'other'
  other.mkdir()
  write_tensors(other, iter(stale.items()), {k: v.shape for k, v in stale.items()}, 'float32')
  shutil.copy(other / ONE, path / 'model-00009-of-00009.safetensors')
  shutil.copy(other / ONE, path / 'consolidated.safetensors')
  _, params = inwards.load(path)
  assert (params['embedder']['tokens'] == values['model.embed_tokens.weight']).all()
  (path / INDEX).unlink()
  with pytest.raises(UserError, match=r'neither model\.safetensors nor'):
    inwards.load(path)


def test_an_adapter_without_its_model_is_called_so(tmp_path):
  (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
  (tmp_path / 'adapter_model.safetensors').write_bytes(b'')
  with pytest.raises(UserError, match='an adapter without its model'):
    inwards.load(tmp_path)


def test_names_without_the_prefix_are_the_same_model(folder):  # noqa: F811
  path, values = folder
  tensors = {name.removeprefix('model.'): value for name, value in values.items()}
  for file in (*path.glob('*.safetensors'), path / INDEX):
    file.unlink()
  write_tensors(path, iter(tensors.items()), {k: v.shape for k, v in tensors.items()}, 'float32')
  _, params = inwards.load(path)
  assert (params['embedder']['tokens'] == values['model.embed_tokens.weight']).all()


def test_a_model_without_its_head_is_called_so(folder):  # noqa: F811
  path, values = folder
  tensors = {name: value for name, value in values.items() if name != 'lm_head.weight'}
  for file in (*path.glob('*.safetensors'), path / INDEX):
    file.unlink()
  write_tensors(path, iter(tensors.items()), {k: v.shape for k, v in tensors.items()}, 'float32')
  with pytest.raises(UserError, match=r'without its head \(lm_head\.weight is missing\)') as error:
    inwards.load(path)
  assert 'LlamaForCausalLM' in str(error.value)


def test_a_tied_config_with_another_head_in_the_file_keeps_that_head(folder):  # noqa: F811
  path, values = folder
  (path / 'config.json').write_text(json.dumps({**CONFIG, 'tie_word_embeddings': True}))
  text, params = inwards.load(path)
  assert 'UntiedHead' in text
  assert (params['head']['kernel'] == values['lm_head.weight'].T).all()
  one(path, {'lm_head.weight': values['model.embed_tokens.weight']})
  text, params = inwards.load(path)
  assert '@heads.TiedHead' in text
  assert 'head' not in params


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'hidden_size': None}, 'hidden_size is null, and llama needs it'),
    ({'hidden_size': '16'}, "hidden_size = '16' of llama is not of the type int"),
    ({'attention_bias': 1}, 'attention_bias = 1 of llama is not of the type bool'),
    ({'rope_scaling': {'type': 'linear'}}, 'rope_scaling.factor is missing'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2.0, 'twist': 1}}, 'rope_scaling.twist = 1'),
    ({'quantization_config': {'bits': 4}}, 'says that the weights are packed, and no tensor of the files is'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor = 0.5 of llama is not supported'),
    ({'num_experts': 4}, 'num_experts = 4 of llama is not supported'),
    ({'num_attention_heads': 0}, 'makes no sense|is not a size'),
  ],
)  # fmt: skip
def test_a_key_that_is_wrong_or_unknown_is_refused_by_name(folder, change, message):  # noqa: F811
  path, _ = folder
  (path / 'config.json').write_text(json.dumps({**CONFIG, **change}))
  with pytest.raises(UserError, match=message):
    inwards.load(path)


def test_null_is_what_the_family_takes_it_for(folder):  # noqa: F811
  path, _ = folder
  nulls = {'rope_scaling': None, 'head_dim': None, 'pad_token_id': None, 'an_unknown_key': None}
  usual, _ = inwards.load(path)
  (path / 'config.json').write_text(json.dumps({**CONFIG, **nulls}))
  assert inwards.load(path)[0] == usual


@pytest.mark.parametrize('name', ['a[1]', 'a#b', 'a?b', 'a%20b', 'a b é'])
def test_a_folder_may_have_any_name(folder, tmp_path, name):  # noqa: F811
  from research.checkpoints import streamed

  path, values = folder
  special = tmp_path / name
  special.mkdir()
  for file in (*path.glob('*.safetensors'), path / INDEX, path / 'config.json'):
    shutil.copy(file, special)
  inwards.from_hf(special, special / 'ours')
  kernel = streamed.Params(special / 'ours').piece(('embedder', 'tokens'), ())
  assert (kernel == values['model.embed_tokens.weight']).all()


def test_the_tokenizer_and_the_special_ids_go_along(folder, tmp_path):  # noqa: F811
  path, _ = folder
  (path / 'config.json').write_text(
    json.dumps({**CONFIG, 'eos_token_id': [2, 5], 'pad_token_id': 99})
  )
  (path / 'tokenizer.json').write_text('{"version": "1.0"}')
  companions.keep_companions(path, tmp_path / 'ours')
  out = tmp_path / 'out'
  out.mkdir()
  ids = companions.write_companions(out, tmp_path / 'ours', vocab_size=32)
  assert ids == {'bos_token_id': 1, 'eos_token_id': [2, 5], 'pad_token_id': None}  # 99 is outside
  assert (out / 'tokenizer.json').read_text() == '{"version": "1.0"}'
