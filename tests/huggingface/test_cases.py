"""The folders of Hugging Face's kind that public reports describe compute what transformers computes of them.

Old spellings of rotary options, buffers among the weights, names without prefixes, configs of first releases,
windows in other patterns, nulls, heads that are not tied, options that change the function, shards of another
save. What the stack has no part for is refused by the name of its key.
"""

import json
import re

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.huggingface import inwards
from research.parallel.mesh import Mesh
from tests.conftest import ROOT
from tests.huggingface import test_parity
from tests.huggingface.test_parity import COMPILE, TOLERANCE, _converted, _logits

torch = pytest.importorskip('torch')
T = pytest.importorskip('transformers')
CASES = ROOT.parent / 'shared' / 'cases'
EQUAL = (
  '04-old-rotary-spelling/phi_old_partial', '04-old-rotary-spelling/pythia_old_base',
  '04-old-rotary-spelling/pythia_old_config', '04-old-rotary-spelling/stablelm_old_partial',
  '05-integer-buffers/bert_position_ids', '05-integer-buffers/gptj_bool',
  '05-integer-buffers/pythia_bool_buffers', '06-no-prefix-names/gpt2_released_names',
  '08-gemma3-old-config/gemma3_old_config', '09-layer-types/gemma2_layer_types',
  '09-layer-types/gemma3_other_pattern', '09-layer-types/qwen3_moe_sliding',
  '09-layer-types/qwen3_sliding', '10-null-keeps-default/gemma2_no_softcap',
  '11-untied-heads/bert_untied', '11-untied-heads/gemma2_untied', '11-untied-heads/gemma3_untied',
  '11-untied-heads/llama_tied_differs', '12-ignored-options/mamba2_tl', '12-ignored-options/mpt_clip',
  '12-ignored-options/mpt_scale', '12-ignored-options/yarn64_file_without_original',
  '14-stray-safetensors/stale', '16-special-paths/ok',
)  # fmt: skip
LONGEST = 200  # tokens: more than YaRN's original positions


def theirs(folder, tokens: np.ndarray) -> np.ndarray:
  """The logits that transformers computes of the folder, in float32."""
  auto = T.AutoModelForMaskedLM if 'bert' in folder.name else T.AutoModelForCausalLM
  model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation='eager')
  with torch.no_grad():
    return model.eval()(input_ids=torch.tensor(tokens).long()).logits.numpy()


@pytest.mark.slow
@pytest.mark.parametrize('name', EQUAL)
def test_a_reported_folder_computes_what_transformers_computes(name):
  folder = CASES / name
  if not folder.is_dir():
    pytest.skip('the failing inputs are not beside the checkout')
  config = json.loads((folder / 'config.json').read_text())
  length = min(config.get('max_position_embeddings', 64), LONGEST)
  tokens = np.random.default_rng(0).integers(1, config['vocab_size'], (2, length)).astype(np.int32)
  want = theirs(folder, tokens)
  with Mesh().use(jax.devices()[:1]):
    _, params, graphdef = _converted(folder)
    forward = jax.jit(_logits, static_argnums=0, compiler_options=COMPILE)
    got = np.asarray(forward(graphdef, params, {'decoder_input_tokens': tokens}))
  assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()


def test_an_option_that_no_part_has_is_refused_by_name():
  folder = CASES / '09-layer-types' / 'read_gemma3_text_use_bidirectional_attention'
  if not folder.is_dir():
    pytest.skip('the failing inputs are not beside the checkout')
  with pytest.raises(UserError, match='use_bidirectional_attention = True is not supported'):
    inwards.load(folder)


@pytest.mark.slow
@pytest.mark.parametrize('name', test_parity.CASES)
def test_a_save_of_the_model_without_its_head_lacks_that_head_alone(name, tmp_path):
  """AutoModel's names have no prefix. With a tied head it is the whole model; another head is missing."""
  reference = test_parity._reference(name)
  body = reference.base_model
  body.save_pretrained(tmp_path)
  head, tokens = reference.get_output_embeddings(), reference.get_input_embeddings()
  if body is not reference and (head.weight is not tokens.weight or name == 'bert'):
    with pytest.raises(UserError, match='is missing') as error:
      _converted(tmp_path)
    missing = re.findall(r'([\w.]+) is missing', str(error.value))
    assert not [tensor for tensor in missing if tensor.endswith(tuple(body.state_dict()))]
    assert 'is unknown' not in str(error.value)
    return
  ours, theirs, real = test_parity._batch(name)
  with torch.no_grad():
    want = reference(**theirs).logits.numpy()[real]
  forward = jax.jit(_logits, static_argnums=0, compiler_options=COMPILE)
  with Mesh().use(jax.devices()[:1]):
    _, params, graphdef = _converted(tmp_path)
    got = np.asarray(forward(graphdef, params, ours))[real]
  assert np.abs(got - want).max() < TOLERANCE * np.abs(want).max()
