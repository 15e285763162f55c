"""The report of decoding: no hidden copy of the cache, and an update in place counts as what it writes."""

import dataclasses
import math

import jax
import pytest

from research.compilation import chips, traffic
from research.compilation.decoding import compile_decode, show
from research.core import configs
from research.core.errors import UserError
from research.model import counts
from research.parallel.mesh import Mesh

# A fusion and an operation that change a cache in place; one that makes the array it changes; a whole result.
PROGRAM = """HloModule step

%fused_in_place (p: f32[64,128], u: f32[1,128], i: s32[]) -> f32[64,128] {
  %p = f32[64,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %update = f32[64,128]{1,0} dynamic-update-slice(%p, %u, %i, %i)
}

%fused_fresh (u: f32[1,128], i: s32[]) -> f32[64,128] {
  %zero = f32[] constant(0)
  %zeros = f32[64,128]{1,0} broadcast(%zero), dimensions={}
  %u.1 = f32[1,128]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %update.1 = f32[64,128]{1,0} dynamic-update-slice(%zeros, %u.1, %i.1, %i.1)
}

ENTRY %main (cache: f32[64,128], new: f32[1,128], place: s32[]) -> f32[64,128] {
  %cache = f32[64,128]{1,0} parameter(0)
  %new = f32[1,128]{1,0} parameter(1)
  %place = s32[] parameter(2)
  LINES
  ROOT %out = f32[64,128]{1,0} bitcast(%last)
}
"""
ROW, ALL = 4 * 128, 4 * 64 * 128


@pytest.mark.parametrize(
  ('line', 'written'),
  [
    ('fusion(%cache, %new, %place), kind=kLoop, calls=%fused_in_place', ROW),
    ('dynamic-update-slice(%cache, %new, %place, %place)', ROW),
    ('scatter(%cache, %place, %new), to_apply=%assign', ROW),
    ('fusion(%new, %place), kind=kLoop, calls=%fused_fresh', ALL),
    ('copy(%cache)', ALL),
  ],
)
def test_an_update_in_place_counts_as_what_it_writes(line, written):
  text = PROGRAM.replace('LINES', f'%last = f32[64,128]{{1,0}} {line}')
  assert traffic.moved_bytes(text) == 2 * written


@pytest.mark.parametrize(
  ('more', 'moved'),
  [('', 6 * ALL), (', output_to_operand_aliasing={{}: (0, {})}', 5 * ALL)],
)
def test_a_kernel_counts_what_it_says_to_move(more, moved):
  """And one reading of its result, where that is an array of its own."""
  config = (
    f'{{"custom_call_config":{{"cost_estimate":{{"flops":"9","bytes_accessed":"{5 * ALL}"}}}}}}'
  )
  line = f'custom-call(%cache), custom_call_target="tpu_custom_call", backend_config={config}{more}'
  text = PROGRAM.replace('LINES', f'%last = f32[64,128]{{1,0}} {line}')
  assert traffic.moved_bytes(text) == moved


def test_the_start_of_a_copy_counts_its_copy():
  text = PROGRAM.replace(
    'LINES', '%last = (f32[64,128]{1,0:S(1)}, f32[64,128]{1,0}, u32[]) copy-start(%cache)'
  )
  assert traffic.moved_bytes(text) == 2 * (ALL + 4)


@pytest.fixture(scope='module')
def run():
  bindings = ['LAYERS=4', 'Stack.scan=True', "streams.Stream.lengths={'targets': 32}"]
  return dataclasses.replace(configs.load('gin/runs/tiny.gin', bindings).build(), mesh=Mesh())


def test_a_step_has_no_copy_of_the_cache(run, one_device, capsys):
  batch, room = 8, 1024
  report = compile_decode(run, 'here', batch=batch, room=room)
  count = counts.count(run.model, {'targets': room})
  cache = report['memory']['cache']
  # Beside keys and values there is a length of four bytes for each row.
  assert cache == batch * (room * count.kv_cache_bytes_per_token + 4)
  # What a step must hold beside them: one layer's scores and logits, far from a layer's keys and values.
  assert report['step']['temporaries'] < 0.25 * cache
  parameters = report['memory']['parameters']
  assert parameters == 4 * count.params_total
  moved = report['step']['moved_bytes_per_device']
  assert parameters + cache < moved < 1.5 * (parameters + cache)
  assert f'{cache / chips.GIB:8.3f} GiB' in show(report)


def test_the_costs_of_a_token(run):
  """By hand: parameters that multiply, and attention to 32 tokens; the cache has all of them."""
  layers, embed, heads, head_dim, mlp, vocab = 4, 64, 4, 16, 192, 384
  params = layers * (4 * embed * heads * head_dim + 3 * embed * mlp + 2 * embed) + embed
  got = counts.count_decoding(run.model, {'targets': 32})
  assert got.flops == 2 * (params + embed * vocab) + layers * 4 * heads * head_dim * 32
  assert got.params_bytes == 4 * (params + embed * vocab)
  assert got.cache_bytes == layers * 2 * heads * head_dim * 32 * 4


@pytest.mark.parametrize(
  ('knobs', 'message'),
  [
    (
      {'batch': 4, 'room': 16, 'prompt': 16},
      'a prompt has 1 token or more, and fewer than the room',
    ),
    ({'batch': 0, 'room': 16}, 'ask for 1 or more rows'),
  ],
)
def test_sizes_that_do_not_go_together_are_refused(run, knobs, message):
  with pytest.raises(UserError, match=message):
    compile_decode(run, 'here', **knobs)


def test_rows_that_the_mesh_does_not_divide_are_refused(run):
  split = dataclasses.replace(run, mesh=Mesh(data=8))
  with pytest.raises(UserError, match='12 rows are not a multiple of the 8 devices'):
    compile_decode(split, 'here', batch=12, room=16)


@pytest.mark.slow
def test_on_a_mesh_every_device_has_its_part(run):
  whole = dataclasses.replace(run, mesh=Mesh(data=2, tensor=4))
  report = compile_decode(whole, 'here', batch=8, room=256)
  count = counts.count(run.model, {'targets': 256})
  every = 8 * 256 * count.kv_cache_bytes_per_token
  assert report['memory']['cache'] == pytest.approx(every / len(jax.devices()), rel=0.01)
  assert report['step']['temporaries'] < 0.5 * report['memory']['cache']
  assert math.isfinite(report['prefill']['flops'])
