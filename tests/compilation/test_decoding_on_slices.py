"""Llama 2 7B decoding on slices of TPUs: the bytes of int4, and no copy of the cache."""

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
  # 4 bits, a float16 scale and a float16 offset for 128; token vectors and the head in 8.
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


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('mesh', [{'fsdp': 1, 'tensor': 8}, {'fsdp': 8}], ids=['tensor', 'fsdp'])
def test_a_step_copies_no_part_of_the_cache(mesh):
  """Four of the layers, 16 rows of 2,048 tokens. FSDP also gathers a layer's matrices and the head."""
  chips.prepare('v5e:2x4')
  bindings = ['LAYERS=4', *(f'Mesh.{axis}={devices}' for axis, devices in mesh.items())]
  run = configs.load([MODEL, 'gin/quantisation/bfloat16.gin'], bindings).build()
  report = compile_decode(run, 'v5e:2x4', batch=16, room=2048)
  memory, step = report['memory'], report['step']
  assert memory['cache'] == pytest.approx(2**28, rel=1e-3)
  gathered = 2 * 32000 * 4096 + 4 * 11008 * 4096 if mesh['fsdp'] > 1 else 0
  assert step['temporaries'] < gathered + 0.05 * memory['cache']
  if 'tensor' in mesh:
    # Parameters and cache are read once, and a layer's keys and values again for their product.
    assert step['moved_bytes_per_device'] < 2 * (memory['parameters'] + memory['cache'])
