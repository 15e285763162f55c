"""A config.json with anything in it is read or refused in one sentence, never with a traceback."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.huggingface import inwards
from research.huggingface.defaults import ALIASES, DEFAULTS
from research.huggingface.files import write_tensors
from research.huggingface.harmless import HARMLESS
from tests.huggingface.test_convert import CONFIG, write_llama

QUICK = settings(
  max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
FAMILIES = sorted(DEFAULTS)
numbers = st.sampled_from([0, 1, 2, 3, 8, -1, 10**6, 10**18, 2**63, 10**40]) | st.floats()
words = st.sampled_from([
  'auto', 'default', 'linear', 'yarn', 'llama3', 'gelu', 'silu', 'full_attention', 'factor', 'a\nb', '@x', '%Y',
])  # fmt: skip
values = st.recursive(
  st.none() | st.booleans() | numbers | words | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=4)
    | st.dictionaries(
      words | st.sampled_from(['rope_type', 'rope_theta', 'bits']), inner, max_size=3
    )
  ),
  max_leaves=5,
)


def keys_of(family: str) -> st.SearchStrategy[str]:
  """The keys that its row reads, their aliases, keys of any family, and others."""
  known = sorted({*DEFAULTS[family], *ALIASES.get(family, {})})
  return st.sampled_from(known) | st.sampled_from(sorted(HARMLESS)) | st.text(max_size=8)


def changes_of(family: str) -> st.SearchStrategy[dict]:
  return st.dictionaries(keys_of(family), values, min_size=1, max_size=3)


def read_or_told(folder, config) -> None:
  """Only a UserError of one line may come of a config.json."""
  (folder / 'config.json').write_text(json.dumps(config))
  said = ''
  try:
    inwards.open_folder(folder)
  except UserError as error:
    said = str(error)
  assert len(said.splitlines()) < 2, said


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  folder = tmp_path_factory.mktemp('llama')
  write_llama(folder)
  return folder


@pytest.fixture(scope='module')
def one_tensor(tmp_path_factory):
  """A folder whose tensors fit no family: what is read of config.json comes before."""
  folder = tmp_path_factory.mktemp('one_tensor')
  write_tensors(folder, iter([('a', np.zeros(2, np.float32))]), {'a': (2,)}, 'float32')
  return folder


@QUICK
@example({'model_type': ['llama']})
@example({'rope_scaling': {'type': 'linear', 'factor': 1e400}})
@example({'hidden_act': 'a\nb'})
@example({'a\rkey': [0] * 1000})
@example({'hidden_size': 10**18})
@given(changes_of('llama') | st.dictionaries(st.just('model_type'), values, min_size=1))
def test_any_value_of_a_key_is_read_or_refused_in_a_sentence(llama, change):
  read_or_told(llama, {**CONFIG, **change})


@QUICK
@example(b'[]')
@example(b'{"model_type": "llama"' * 2000)
@example(b'[' * 100_000)
@example(b'{"model_type": ' + b'9' * 5000 + b'}')
@given(st.binary(max_size=30) | values.map(lambda value: json.dumps(value).encode()))
def test_a_config_json_of_any_bytes_is_refused_in_a_sentence(llama, data):
  (llama / 'config.json').write_bytes(data)
  with pytest.raises(UserError) as error:
    inwards.open_folder(llama)
  assert '\n' not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_any_value_of_any_familys_key_is_read_or_refused_in_a_sentence(family, one_tensor):
  @settings(QUICK, max_examples=25)
  @given(changes_of(family))
  def check(change):
    read_or_told(one_tensor, {'model_type': family, **change})

  check()


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_a_number_that_is_too_large_is_refused_at_once(family, one_tensor):
  """No list of as many experts, heads or layers as config.json says is made before a file is asked."""
  for key, known in DEFAULTS[family].items():
    if known is int or (isinstance(known, int) and not isinstance(known, bool)):
      read_or_told(one_tensor, {'model_type': family, key: 10**15})
