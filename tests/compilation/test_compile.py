"""What the compiler did: memory, collectives, and where arrays live."""

import dataclasses
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections import Counter

import jax
import pytest

from research.compilation import chips, hlo
from research.compilation import report as report_module
from research.compilation.report import DoesNotFit, compile_run, lower, memory
from research.compilation.show import show
from research.core import configs
from research.core.errors import UserError
from research.model import counts
from research.parallel.mesh import Mesh

TINY = [
  'LAYERS=2',
  "streams.Stream.lengths={'targets': 32}",
  'Run.batch_size=8',
  'Run.logits_chunks=2',
]
TINY += ['Stack.scan=True', "Stack.remat='full'"]
HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU, reason='libtpu is not installed: it compiles for TPUs on any Linux machine'
)

# A loop of three steps, each with a gather over pairs; a reduce-scatter after it, written as a TPU does.
PROGRAM = """HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[64,8]) -> bf16[8,8] {
  %all-reduce.5 = bf16[64,8]{1,0} all-reduce(%p), channel_id=4, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = bf16[8,8]{1,0} dynamic-slice(%all-reduce.5, %i), dynamic_slice_sizes={8,8}
}

%body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %all-gather.1 = f32[8,8]{1,0} all-gather(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

%condition (t: (s32[], f32[4,8])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

ENTRY %main (w: f32[4,8]) -> f32[4,8] {
  %loop = (s32[], f32[4,8]) while(%init), condition=%condition, body=%body
  %scattered = bf16[8,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = f32[4,8]{1,0} copy(%y)
}
"""


def test_collectives_are_counted_with_their_loops():
  found = {c.kind: c for c in hlo.collectives(PROGRAM)}
  assert set(found) == {'all-gather', 'reduce-scatter'}
  gather, scatter = found['all-gather'], found['reduce-scatter']
  assert (gather.count, gather.bytes, gather.group) == (3, 8 * 8 * 4, (0, 1))
  assert gather.wire_bytes == 3 * 256 / 2
  assert (scatter.count, scatter.bytes, len(scatter.group)) == (1, 64 * 8 * 2, 8)


def test_transfers_between_slices_are_collectives():
  send = """  %send = (bf16[64,8]{1,0}, u32[], token[]) send(%y, %t), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target=TARGET,_xla_megascale_transfer_type="TYPE"}
  ROOT %out"""
  for target, kind, group, name in (
    ('{{100000->200000},{200000->100000}}', 'ONE_TO_ONE', (0, 1), 'collective-permute'),
    ('"{1:3}x{0:7}"', 'ALL_REDUCE', (0, 1, 2), 'all-reduce'),
  ):
    text = PROGRAM.replace('  ROOT %out', send.replace('TARGET', target).replace('TYPE', kind))
    (found,) = [c for c in hlo.collectives(text) if c.dcn]
    assert (found.kind, found.count, found.bytes, found.group) == (name, 1, 1024, group)


@pytest.mark.parametrize(
  ('text', 'group', 'axes'),
  [
    ('replica_groups={{0,2},{1,3}}', [0, 2], ('fsdp',)),
    ('replica_groups=[4,2]<=[8]', [0, 1], ('tensor',)),
    ('replica_groups=[2,4]<=[2,2,2]T(1,0,2)', [0, 1, 4, 5], ('data', 'tensor')),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [0, 1, 2, 3], ('fsdp', 'tensor')),
    ('source_target_pairs={{0,4},{4,0}}', [0, 4], ('data',)),
  ],
)
def test_groups_are_read_as_mesh_axes(text, group, axes):
  assert hlo.replica_group(text) == group
  assert hlo.axes_of(tuple(group), {'data': 2, 'fsdp': 2, 'tensor': 2}) == axes


def tiny(*bindings, mesh=None):
  run = configs.load('gin/runs/tiny.gin', [*TINY, *bindings]).build()
  return dataclasses.replace(run, mesh=mesh)


@pytest.fixture(scope='module')
def fsdp():
  """The step of a small model under FSDP over eight devices: (run, compiled, state)."""
  run = tiny(mesh=Mesh(data=1, fsdp=8))
  with run.mesh.use() as mesh:
    lowered, state, *_ = lower(run, mesh)
    return run, lowered.compile(), state


def matrices(state) -> int:
  """Elements of the parameters that FSDP splits."""
  return sum(x.size for x in jax.tree.leaves(state['params']) if x.sharding.spec.count('fsdp'))


def test_fsdp_is_all_gather_and_reduce_scatter_of_the_right_sizes(fsdp):
  _, compiled, state = fsdp
  found = hlo.collectives(compiled.as_text())
  moved = lambda kind: sum(c.count * c.bytes for c in found if c.kind == kind)
  assert moved('reduce-scatter') == 4 * matrices(state)
  # Forward and again for the backward pass; table and head, outside the loop, once each.
  params = state['params']
  outside = params['embedder']['tokens'].size + params['head']['kernel'].size
  assert moved('all-gather') == 4 * (2 * matrices(state) - outside)
  # What is left are norms' scales and scalars.
  small = 4 * sum(x.size for x in jax.tree.leaves(params)) - 4 * matrices(state)
  assert moved('all-reduce') <= 2 * small + 4 * 64


@pytest.mark.parametrize(('dtype', 'asked', 'summed'), [
  ('bfloat16', None, 'bf16'), ('bfloat16', 'float32', 'f32'), ('float32', 'bfloat16', 'bf16'),
])  # fmt: skip
def test_gradients_are_added_up_in_the_dtype_that_the_mesh_says(dtype, asked, summed):
  run = tiny(f"LanguageModel.dtype='{dtype}'", mesh=Mesh(data=1, fsdp=8, sum_dtype=asked))
  with run.mesh.use() as mesh:
    # Before XLA for CPUs, which computes some of bfloat16 in float32.
    text = lower(run, mesh)[0].as_text()
  found = re.findall(
    r'"stablehlo.reduce_scatter".*?\}\) : \(tensor<[\dx]*x(\w+)>\)', text, re.DOTALL
  )
  assert len(found) >= 9  # the matrices of a layer, the table and the head
  assert set(found) == {summed}


def test_gradients_are_added_up_over_one_side_and_then_the_other():
  """Reduce-scatters over fsdp have whole gradients, those over fsdp_outer what is left; gathers are joint."""
  run = tiny(mesh=Mesh(data=1, fsdp=4, fsdp_outer=2))
  with run.mesh.use() as mesh:
    lowered, state, *_ = lower(run, mesh)
    found = hlo.collectives(lowered.compile().as_text())
  sizes = dict(mesh.shape)
  moved = Counter()
  for c in found:
    moved[c.kind, '+'.join(hlo.axes_of(c.group, sizes))] += c.count * c.bytes
  split = sum(x.size for x in jax.tree.leaves(state['params']) if 'fsdp' in str(x.sharding.spec))
  assert moved['reduce-scatter', 'fsdp'] == 4 * split
  assert moved['reduce-scatter', 'fsdp_outer'] == 4 * split / 4
  assert ('reduce-scatter', 'fsdp_outer+fsdp') not in moved
  assert {axes for kind, axes in moved if kind == 'all-gather'} == {'fsdp_outer+fsdp'}


def test_nothing_is_whole_that_should_be_split(fsdp):
  run, compiled, state = fsdp
  shapes = {shape for _, _, shape in hlo.arrays(compiled.as_text())}
  tokens, vocab = run.batch_size * run.target_length // 8, 384
  assert not [
    s for s in shapes if s and s[-1] == vocab and math.prod(s) >= tokens * vocab and s[0] != 64
  ]
  stacked = {x.shape for x in jax.tree.leaves(state['params']['stack']) if x.ndim > 2}
  assert len(stacked) > 2
  assert not stacked & shapes


def test_every_large_input_is_split(fsdp):
  _, compiled, state = fsdp
  (where, batch, *_), _ = compiled.input_shardings
  large = [
    (x, s)
    for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(where), strict=True)
    if x.size > 4096
  ]
  assert len(large) > 10
  assert not [x.shape for x, s in large if math.prod(s.shard_shape(x.shape)) * 8 != x.size]
  assert all(s.shard_shape((8, 32)) == (1, 32) for s in jax.tree.leaves(batch))


def test_stages_have_no_copies_of_the_vocabulary_and_the_report_tells_the_bubble():
  """Every parameter but norms is split over all devices."""
  mesh = Mesh(data=1, fsdp=2, stage=4)
  run = tiny('LAYERS=4', mesh=mesh)
  report = compile_run(run, 'here')
  assert report['pipeline'] == {
    'axis': 'stage', 'stages': 4, 'rounds': 1, 'microbatches': 4, 'ticks': 7, 'bubble': 3 / 7,
  }  # fmt: skip
  total = counts.count(run.model, run.train.lengths).params_total
  assert report['memory']['parameters'] == pytest.approx(4 * total / 8, rel=0.02)
  assert 'a stage is idle in 42.9% of them' in show(report)
  # Without the rule every stage had all of the table and of the head.
  copied = dataclasses.replace(mesh, rules={'vocab': 'tensor'})
  before = compile_run(dataclasses.replace(run, mesh=copied), 'here')['memory']['parameters']
  vocabulary = 2 * 384 * 64 * 4 / 2
  assert before - report['memory']['parameters'] == vocabulary - vocabulary / 4


def test_the_report_counts_the_state_and_the_batch(fsdp):
  run, compiled, state = fsdp
  report = memory(compiled, state, {}, {}, None)
  n = sum(x.size for x in jax.tree.leaves(state['params']))
  assert report['parameters'] == pytest.approx(4 * n / 8, rel=0.02)
  assert report['optimizer'] == pytest.approx(2 * report['parameters'], rel=0.02)
  assert report['arguments'] <= report['total']
  flops = report_module.flops(run)
  assert 1 < flops['hardware_flops'] / flops['model_flops'] < 4 / 3


def test_a_batch_that_the_mesh_does_not_divide_is_told_before_compiling():
  run = tiny('Run.batch_size=12', mesh=Mesh(data=1, fsdp=8))
  with (
    run.mesh.use() as mesh,
    pytest.raises(UserError, match='batch_size: 12 is not a multiple of 8'),
  ):
    lower(run, mesh)


@pytest.mark.parametrize(
  ('topology', 'says'),
  [
    (
      'v5e-256',
      r'--topology=v5e-256 is not a slice\..*Write one like v4:4x4x4, .*not their number',
    ),
    ('v5x:4x4', r'--topology=v5x:4x4 is not a slice\. Did you mean v5e:4x4'),
    ('cpu:none', 'is not a slice'),
  ],
)
def test_a_slice_that_is_not_is_one_sentence(topology, says):
  with pytest.raises(UserError, match=says):
    chips.prepare(topology)


def command(*flags, **environment):
  return subprocess.run(
    [sys.executable, '-m', 'research.compile', *flags],
    capture_output=True, text=True, env={**os.environ, **environment},
  )  # fmt: skip


@pytest.mark.parametrize(
  ('flags', 'says'),
  [
    (['--batch=0', '--room=32'], '--batch=0 must be 1 or more.'),
    (['--batch=-2'], '--batch=-2 must be 1 or more.'),
    (['--batch=4', '--room=-3'], '--room=-3 must be 2 or more.'),
    (['--batch=4', '--room=1'], '--room=1 must be 2 or more.'),
    (['--batch=4'], '--decode needs --batch and --room.'),
  ],
)
def test_sizes_of_decoding_that_are_none_are_named(flags, says):
  done = command('--gin_file=gin/runs/tiny.gin', '--topology=cpu:8', '--decode', *flags)
  assert done.returncode == 2
  assert done.stderr == f'python -m research.compile: {says}\n'


# How a small model is split over a slice: (gin files and bindings, slice, how many, what must be there).
SMALL = ['EMBED=256', 'HEADS=2', 'HEAD_DIM=128', 'MLP=512', 'Run.batch_size=16']
SMALL += ["streams.Stream.lengths={'targets': 512}", "LanguageModel.dtype='bfloat16'"]
SMALL += ['Stack.scan=True', "Stack.remat='full'"]
EXPERTS = ['gin/models/mixtral/tiny.gin', 'gin/meshes/fsdp_expert.gin']
SPLITS = {
  # XLA takes an all-reduce in all dimensions of a torus at once for a reduce-scatter over the whole of a slice
  # that is as long as it is wide; in 2x4 the reduce-scatters are there.
  'fsdp': (['gin/meshes/fsdp.gin'], 'v5e:2x4', 1, {('all-gather', 'fsdp'), ('reduce-scatter', 'fsdp')}),
  'tensor': (['gin/meshes/fsdp_tensor.gin'], 'v5e:4x4', 1, {('all-gather', 'fsdp'), ('all-reduce', 'tensor')}),
  'context': (['gin/meshes/fsdp_context.gin'], 'v5e:4x4', 1, {('collective-permute', 'context')}),
  'expert': (EXPERTS, 'v5p:2x2x4', 1, {('all-to-all', 'expert')}),
  'stage': (['gin/meshes/pipeline.gin'], 'v5p:2x2x4', 1, {('collective-permute', 'stage')}),
  'slices': (['gin/meshes/pipeline_slices.gin'], 'v5e:2x4', 2, {('collective-permute', 'stage')}),
}  # fmt: skip


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize('split', SPLITS)
def test_on_slices_of_tpus(split):
  """Real kernels and collectives of every kind of parallelism, and bytes that add up."""
  files, topology, slices, expected = SPLITS[split]
  chips.prepare(topology)
  run = configs.load(['gin/runs/tiny.gin', *files], SMALL).build()
  report = compile_run(run, topology, slices)
  found = {(c['kind'].removeprefix('ragged-'), c['axes']) for c in report['collectives']}
  assert expected <= found
  if split == 'fsdp':
    # No matrix is summed up whole but the table, of which a device has less than the 128 lanes of a tile.
    whole = [c for c in report['collectives'] if c['kind'] == 'all-reduce' and c['bytes'] > 2**16]
    assert [(c['count'], c['bytes']) for c in whole] == [(1, 384 * 256 * 2)]
  assert (report['dcn_s'] > 0) == (slices > 1)
  assert report['memory']['total'] < 2**28
  assert 0 < report['no_overlap_mfu'] <= report['mfu'] <= 1


@needs_libtpu
@pytest.mark.slow
def test_a_mesh_axis_may_take_a_part_of_a_side():
  """8 of 4x4x4: two sides' worth are 16, one is 4."""
  chips.prepare('v5p:4x4x4')
  devices, _ = chips.devices_of('v5p:4x4x4')
  mesh = Mesh(data=1, fsdp=-1, expert=8).arrange(devices)
  assert (mesh.shape['fsdp'], mesh.shape['expert']) == (8, 8)


@needs_libtpu
@pytest.mark.slow
def test_microbatches_and_offloading_on_slices_of_tpus():
  """XLA for TPUs takes both, and what is offloaded is the input of every layer, in the host's memory."""
  chips.prepare('v5e:2x4')
  files = ['gin/runs/tiny.gin', 'gin/meshes/fsdp.gin']
  report = lambda *more: compile_run(
    configs.load(files, [*SMALL, 'LAYERS=4', *more]).build(), 'v5e:2x4'
  )
  whole, parts = report(), report('Run.microbatches=2')
  gathers = lambda r: sum(
    c['count'] * c['bytes'] for c in r['collectives'] if c['kind'] == 'all-gather'
  )
  assert gathers(parts) == 2 * gathers(whole)
  away = report("Stack.remat='offload'")
  assert whole['memory']['host'] == 0
  layers, sequences, tokens, width, itemsize = 4, 2, 512, 256, 2  # of one device
  assert away['memory']['host'] == layers * sequences * tokens * width * itemsize


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_learn_needs_no_memory_for_the_optimizer():
  """LoRA on a LLaMA of a billion parameters: the optimizer has the adapters' moments and nothing else."""
  chips.prepare('v5e:2x2')
  files = ['gin/runs/tiny.gin', 'gin/meshes/fsdp.gin', 'gin/tuning/lora.gin']
  shape = ['VOCAB=32000', 'EMBED=2048', 'LAYERS=16', 'HEADS=16', 'HEAD_DIM=128', 'MLP=8192']
  more = [
    "streams.Stream.lengths={'targets': 1024}",
    "LanguageModel.dtype='bfloat16'",
    "BASE='base'",
  ]
  more += ['Stack.scan=True', "Stack.remat='full'", 'Run.batch_size=4']
  run = configs.load(files, [*shape, *more]).build()
  memory = compile_run(run, 'v5e:2x2')['memory']
  billion = counts.count(run.model, run.train.lengths).params_total
  assert 1.1e9 < billion < 1.3e9
  assert memory['parameters'] < 0.02 * memory['frozen']
  assert memory['optimizer'] == pytest.approx(2 * memory['parameters'], rel=0.01)
  assert memory['frozen'] == pytest.approx(4 * billion / 4, rel=0.05)
  # What the step is given is these and the batch; nothing holds a moment or a gradient of what is frozen.
  given = memory['parameters'] + memory['optimizer'] + memory['frozen'] + memory['batch']
  assert memory['arguments'] == pytest.approx(given, rel=0.01)
  assert memory['temporaries'] < memory['frozen']


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_says_what_to_change():
  """16 GiB of a v5e: without recomputation, with it, and with a state that is too large by itself."""
  wide = ['EMBED=4096', 'HEADS=32', 'MLP=8192', 'LAYERS=2', 'Run.batch_size=512']
  chips.prepare('v5e:2x4')

  def fails(*bindings):
    run = configs.load(['gin/runs/tiny.gin', 'gin/meshes/fsdp.gin'], [*SMALL, *wide, *bindings])
    with pytest.raises(DoesNotFit) as error:
      compile_run(run.build(), 'v5e:2x4')
    return str(error.value)

  assert "recompute more: Stack.remat = 'full'" in fails("Stack.remat='none'", 'LAYERS=16')
  assert 'Run.microbatches' in fails('Run.batch_size=8192')
  assert 'take a larger slice' in fails('LAYERS=64', 'Run.batch_size=8')
