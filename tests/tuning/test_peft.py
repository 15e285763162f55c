"""Adapters are written for peft and read from it, and both compute the same."""

import json
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from research import convert
from research.checkpoints import streamed
from research.core import configs
from research.core.errors import UserError
from research.huggingface import inwards
from research.model import counts
from research.parallel.mesh import Mesh
from research.tuning import peft as ours

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

TOKENS = np.arange(3, 11, dtype=np.int32)[None]


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  """(transformers' folder of a tiny LLaMA, the same converted)."""
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=False,
  )  # fmt: skip
  folder = tmp_path_factory.mktemp('llama')
  transformers.LlamaForCausalLM(config).save_pretrained(folder / 'theirs')
  inwards.from_hf(folder / 'theirs', folder / 'ours')
  return folder / 'theirs', folder / 'ours'


def call(*flags) -> None:
  """`python -m research.convert`, in this process."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, 'argv', ['convert', *flags])
    convert.main(convert._flags())


def logits(folder) -> np.ndarray:
  """The logits of a converted folder."""
  model = configs.load(str(folder / 'model.gin'), root='MODEL').tree()
  with Mesh().use(jax.devices()[:1]):
    params = jax.tree.map(jax.numpy.asarray, ours.params_of(model, streamed.Params(folder)))
    module = nnx.merge(nnx.graphdef(counts.abstract(model)), params)
    return np.asarray(module({'decoder_input_tokens': TOKENS})[0])


def their_logits(model) -> np.ndarray:
  # Our inputs are shifted: position i reads the token before it. Here both read the same tokens.
  with torch.no_grad():
    return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


# peft reads an attribute that transformers deprecates.
@pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')
@pytest.mark.parametrize('options', [{}, {'use_rslora': True}, {'use_dora': True}])
def test_an_adapter_computes_the_same_in_peft_and_here(options, base, tmp_path):
  peft = pytest.importorskip('peft')
  theirs, converted = base
  config = peft.LoraConfig(
    r=3, lora_alpha=7, target_modules=['q_proj', 'v_proj', 'o_proj', 'down_proj'], **options
  )
  model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(theirs), config).eval()
  torch.manual_seed(1)
  for name, parameter in model.named_parameters():
    if 'lora_B' in name or 'magnitude' in name:
      parameter.data += 0.1 * torch.randn_like(parameter)
  model.save_pretrained(tmp_path / 'adapter')
  call(
    f'--from_peft={tmp_path}/adapter',
    f'--base={converted}',
    f'--out={tmp_path}/ours',
    '--model_type=llama',
  )
  np.testing.assert_allclose(logits(tmp_path / 'ours'), their_logits(model), atol=1e-5)
  # And back.
  call(
    f'--to_peft={tmp_path}/back', f'--checkpoint={tmp_path}/ours', f'--gin_file={tmp_path}/ours/model.gin',
    '--model_type=llama',
  )  # fmt: skip
  again = transformers.LlamaForCausalLM.from_pretrained(theirs)
  again = peft.PeftModel.from_pretrained(again, tmp_path / 'back').eval()
  np.testing.assert_allclose(their_logits(again), their_logits(model), atol=1e-5)
  # Merged, it is a plain model that transformers reads.
  call(
    f'--to_hf={tmp_path}/merged', f'--checkpoint={tmp_path}/ours', f'--gin_file={tmp_path}/ours/model.gin',
    '--model_type=llama',
  )  # fmt: skip
  merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'merged').eval()
  np.testing.assert_allclose(their_logits(merged), their_logits(model), atol=1e-5)


@pytest.mark.parametrize(
  ('changed', 'why'),
  [
    ({'peft_type': 'IA3'}, "peft_type 'IA3' is not read"),
    ({'rank_pattern': {'q_proj': 4}}, 'rank_pattern = .* is not supported'),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save = .* is not supported'),
    ({'init_lora_weights': 'pissa'}, 'changes the base'),
    ({'bias': 'all'}, "bias = 'all' is not read"),
    ({'r': 0}, 'must be positive'),
  ],
)
def test_what_an_adapters_config_says_and_we_do_not_read_is_refused(changed, why, tmp_path):
  config = {'peft_type': 'LORA', 'r': 2, 'lora_alpha': 4, **changed}
  (tmp_path / 'adapter_config.json').write_text(json.dumps(config))
  with pytest.raises(UserError, match=why):
    ours.read_config(tmp_path)
