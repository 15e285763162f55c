"""What an int4 Llama 2 7B takes in the memory of a slice of TPUs, and of the counts."""

import importlib.util

import pytest

from research.compilation import chips
from research.compilation.decoding import compile_decode
from research.core import configs
from research.model import counts

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec('libtpu') is None, reason='libtpu is not installed'
)
MODEL, SLICE = 'experiments/tpu_fit/llama2_7b.gin', 'v5e:2x2'


def run_of(quantisation: str):
  return configs.load([MODEL, f'gin/quantisation/{quantisation}.gin']).build()


def test_the_counts_say_how_many_bytes():
  stored = {
    name: counts.count(run_of(name).model, {'targets': 128}) for name in ('bfloat16', 'int4')
  }
  assert stored['int4'].params_total == stored['bfloat16'].params_total == 6_738_415_616
  # 4 bits, a float32 scale and a uint8 zero point for 128; token vectors and the head in 8.
  assert stored['int4'].stored_bytes < 0.29 * stored['bfloat16'].stored_bytes
  decoded = counts.count_decoding(run_of('int4').model, {'targets': 128})
  half = counts.count_decoding(run_of('bfloat16').model, {'targets': 128})
  assert decoded.params_bytes < 0.29 * half.params_bytes


@needs_libtpu
@pytest.mark.slow
def test_a_decoding_step_in_int4_needs_less_than_a_third_of_bfloat16s_arguments():
  chips.prepare(SLICE)
  step = {
    name: compile_decode(run_of(name), SLICE, batch=4, room=128)['step']['arguments']
    for name in ('bfloat16', 'int4')
  }
  assert step['int4'] <= 0.30 * step['bfloat16']
