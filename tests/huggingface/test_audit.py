"""Every key of every family's config: changed, null or absent, it is read as transformers reads it, or refused.

A tiny random model of each family is saved once. Then its config.json is changed in one key at a time; what
transformers computes from the changed folder must be what our conversion computes, or the conversion must end
in a sentence. A key that is ignored, or taken for something else, is neither.
"""

import collections
import dataclasses
import functools
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from research.core import configs, describe
from research.core.errors import UserError
from research.huggingface import inwards
from research.huggingface.defaults import ALIASES, DEFAULTS, SPECIAL_IDS
from research.model import counts
from research.parallel.mesh import Mesh
from tests.huggingface import test_parity
from tests.huggingface.test_parity import COMPILE, ENCODER_DECODERS, TOLERANCE

torch = pytest.importorskip('torch')
T = pytest.importorskip('transformers')
# transformers warns of old keys, which it still reads; old keys are among those that are tried here.
pytestmark = pytest.mark.filterwarnings('ignore:.* is deprecated and will be removed:FutureWarning')

# One configuration of each model_type, and two where options exclude each other.
AUDITED = (
  'llama', 'llama-linear', 'llama-yarn', 'mistral', 'mixtral', 'qwen2', 'qwen2_moe', 'qwen3', 'qwen3_moe',
  'gemma', 'gemma2', 'gemma3_text', 'glm', 'glm4', 'olmo2', 'stablelm', 'phi', 'falcon-7b', 'falcon-40b',
  'bloom', 'mpt', 'opt', 'gpt2', 'gptj', 'gpt_neox', 'bert', 't5-1.0', 't5-1.1', 'mt5', 'switch', 'mamba',
  'mamba2', 'jamba', 'deepseek_v2', 'deepseek_v2-groups', 'deepseek_v3',
)  # fmt: skip
# Rotary options are tried on these, every other key on 'llama'.
OTHER_ROTATION = ('llama-linear', 'llama-yarn')
# Keys that older files have, in no class any more, and values to try.
OLD = {
  'rope_theta': [5e4], 'rope_scaling': [{'type': 'linear', 'factor': 2.0}], 'partial_rotary_factor': [0.5],
  'rotary_pct': [0.5], 'rotary_emb_base': [5e4], 'rope_local_base_freq': [5e4], 'sliding_window_pattern': [2],
  'sliding_window': [3], 'layer_types': [['full_attention', 'sliding_attention']], 'head_dim': [4, 8, 16],
  'original_max_position_embeddings': [8], 'tie_word_embeddings': [True], 'pruned_heads': [{'0': [1]}],
  'quantization_config': [{'bits': 4}], 'is_decoder': [True], 'add_cross_attention': [True],
  'is_encoder_decoder': [True], 'an_option_of_tomorrow': [1],
}  # fmt: skip
ABSENT = object()
REFUSED = 'refused'


def variants(value) -> list:
  """Other values of the same kind."""
  match value:
    case bool():
      return [not value]
    case int():
      return [value + 1, max(value // 2, 1)]
    case float():
      return [value * 3 + 0.5, value / 4]
    case str():
      return ['relu', 'gelu', 'something_else']
    case list():
      return [value[::-1], value[:-1], []]
    case None:
      return [2, 0.25, True]
  return [{}]


def changes(config: dict) -> dict[str, list]:
  """Every key, of nested objects too ('a.b'), and the values to try, `ABSENT` among them."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, dict) and key not in ('id2label', 'label2id'):
      for inner, nested in value.items():
        if isinstance(nested, dict):
          flat |= {f'{key}.{inner}.{k}': [*variants(v), None, ABSENT] for k, v in nested.items()}
        flat[f'{key}.{inner}'] = [*variants(nested), None, ABSENT]
      flat[f'{key}.an_option_of_tomorrow'] = [1]
    flat[key] = [*variants(value), None, ABSENT]
  for key, values in OLD.items():
    if key not in config:
      flat[key] = [*values, None]
  # GLM's own padding id is outside of a tiny vocabulary, and transformers builds no such model.
  pad = SPECIAL_IDS.get(config['model_type'], (None, None, None))[2]
  if pad is not None and pad >= config['vocab_size']:
    flat['pad_token_id'].remove(ABSENT)
  return flat


def changed(config: dict, key: str, value) -> dict:
  """The config with one key, possibly of an inner object, set or taken out."""
  config = json.loads(json.dumps(config))
  *outer, last = key.split('.')
  node = config
  for name in outer:
    node = node[name]
  if value is ABSENT:
    node.pop(last, None)
  else:
    node[last] = value
  return config


class Audit:
  """One family's folder, and what both sides compute from it under a changed config."""

  def __init__(self, name: str, folder):
    self.name, self.folder = name, folder
    test_parity._reference(name).save_pretrained(folder)
    if name == 't5-1.1':
      test_parity._save_with_head(folder, test_parity._reference(name).lm_head.weight)
    self.config = json.loads((folder / 'config.json').read_text())
    self.ours, self.theirs, self.real = test_parity._batch(name)
    if name in ENCODER_DECODERS:
      self.auto = T.AutoModelForSeq2SeqLM
    else:
      self.auto = T.AutoModelForMaskedLM if name == 'bert' else T.AutoModelForCausalLM
    self.logits = {}

  def reference(self):
    """transformers' logits, or why it refuses the folder or cannot compute."""
    try:
      model = self.auto.from_pretrained(
        self.folder, attn_implementation='eager', dtype=torch.float32
      )
      with torch.no_grad():
        logits = model.eval()(**self.theirs).logits.numpy()[self.real]
    except Exception as error:  # whatever transformers raises
      return f'transformers ends in {type(error).__name__}: {" ".join(str(error).split())[:200]}'
    return logits if np.isfinite(logits).all() else 'transformers gives infinities or NaN'

  def conversion(self):
    """Why the conversion refuses, or None; and our logits."""
    try:
      text, params = inwards.load(self.folder)
    except UserError as error:
      return str(error), None
    gin = configs.Config('MODEL')
    gin._read(text, 'model.gin')
    tree = gin.tree()
    key = describe.describe(tree)
    if key not in self.logits:  # most keys change nothing: the same model, computed once
      graphdef = nnx.graphdef(counts.abstract(tree))
      forward = functools.partial(test_parity._logits, graphdef)
      computed = jax.jit(forward, compiler_options=COMPILE)(params, self.ours)
      self.logits[key] = np.asarray(computed)[self.real]
    return None, self.logits[key]

  def outcome(self, key: str, value) -> str:
    """'equal', 'refused', or what is wrong."""
    config = changed(self.config, key, value)
    (self.folder / 'config.json').write_text(json.dumps(config))
    refused, got = self.conversion()
    if refused:
      return REFUSED if '\n' not in refused else f'several lines: {refused}'
    want = self.reference()
    if isinstance(want, str) and isinstance(value, int) and not isinstance(value, bool):
      # Where a class of transformers wants a float, an integer is the same number.
      config = changed(self.config, key, float(value))
      (self.folder / 'config.json').write_text(json.dumps(config))
      want = self.reference()
    if isinstance(want, str):
      return f'converted, and {want}'
    if got.shape != want.shape:
      return f'{got.shape} for {want.shape}'
    difference = np.abs(got - want).max() / np.abs(want).max()
    return 'equal' if difference < TOLERANCE else f'off by {difference:.1e}'


@pytest.fixture(autouse=True)
def _one_device():
  with Mesh().use(jax.devices()[:1]):
    yield


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
  """Most keys change nothing, so that the table of one model serves many cases; and no threads fight."""
  tables, table = {}, inwards.table

  def once(model, family):
    key = describe.describe(model), id(family)
    if key not in tables:
      tables[key] = table(model, family)
    return tables[key]

  monkeypatch.setattr(inwards, 'table', once)
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


def check(audit: Audit, cases) -> collections.Counter:
  """Tries every case; fails with those that are neither equal nor refused."""
  tally, wrong = collections.Counter(), []
  for key, value in cases:
    outcome = audit.outcome(key, value)
    tally[outcome] += 1
    if outcome not in ('equal', REFUSED):
      shown = 'absent' if value is ABSENT else repr(value)
      wrong.append(f'{audit.name}: {key} = {shown}: {outcome}')
  assert not wrong, '\n'.join(wrong)
  return tally


@pytest.mark.slow
@pytest.mark.parametrize('name', AUDITED)
def test_every_key_changed_null_and_absent(name, tmp_path, record_property):
  audit = Audit(name, tmp_path)
  keys = changes(audit.config)
  if name in OTHER_ROTATION:  # the other keys are the first configuration's
    keys = {key: values for key, values in keys.items() if key.startswith('rope_parameters')}
  assert audit.outcome('use_cache', True) == 'equal'
  tally = check(audit, [(key, value) for key, values in keys.items() for value in values])
  record_property('audit', [name, len(keys), tally['equal'], tally[REFUSED]])  # conftest sums them
  assert tally['equal'] > len(keys) // 3


@pytest.mark.parametrize('name', ['gpt_neox'])
def test_a_sample_of_keys(name, tmp_path):
  audit = Audit(name, tmp_path)
  cases = [
    ('layer_norm_eps', ABSENT), ('rope_parameters', ABSENT), ('attention_bias', False), ('rotary_pct', 0.5),
    ('rope_parameters.partial_rotary_factor', 0.5), ('hidden_act', 'relu'), ('bos_token_id', 3),
    ('num_hidden_layers', 3), ('hidden_size', None), ('an_option_of_tomorrow', 1), ('bos_token_id', 0.25),
    ('use_cache', None),
  ]  # fmt: skip
  tally = check(audit, cases)
  assert tally['equal'] >= 4
  assert tally[REFUSED] >= 6


def _default_of(cls, key):
  for field in dataclasses.fields(cls):
    if field.name == key:
      return field.default
  return ABSENT


@pytest.mark.parametrize('model_type', sorted(DEFAULTS))
def test_defaults_are_those_of_the_config_class(model_type):
  cls = T.CONFIG_MAPPING[model_type]
  aliases = {new: old for old, new in ALIASES.get(model_type, {}).items()}
  compared = 0
  for key, ours in DEFAULTS[model_type].items():
    theirs = _default_of(cls, key)
    if theirs is ABSENT:
      theirs = _default_of(cls, aliases.get(key, key))
    if theirs is ABSENT or theirs is dataclasses.MISSING:
      continue  # a key of older files
    compared += 1
    if isinstance(ours, type):
      assert theirs is None, key
    else:
      theirs = list(theirs) if isinstance(theirs, tuple) else theirs
      assert ours == theirs or math.isclose(ours, theirs), key
  assert compared > 5
  ids = [_default_of(cls, f'{name}_token_id') for name in ('bos', 'eos', 'pad')]
  if model_type in ('glm', 'glm4'):
    ids[1] = cls().eos_token_id  # null there means a list
  ours = SPECIAL_IDS.get(model_type, (None,) * 3)
  assert [None if i is ABSENT else i for i in ids] == list(ours)
