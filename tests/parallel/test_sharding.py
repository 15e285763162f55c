"""Names of axes on the mesh."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from research.core.errors import Invalid
from research.parallel import axes, hosts
from research.parallel.mesh import MESH_AXES, Mesh, count_slices, default_mesh, describe


def test_a_mesh_fills_the_devices():
  assert Mesh().shape(8)['data'] == 8
  sizes = Mesh(data=2, fsdp=-1, tensor=2).shape(8)
  assert (sizes['data'], sizes['fsdp'], sizes['tensor']) == (2, 2, 2)
  assert set(sizes) == set(MESH_AXES)


def test_slices_multiply_data_or_stages():
  assert Mesh(data=1, fsdp=-1).shape(16, slices=2) == {
    'data': 2, 'stage': 1, 'fsdp_outer': 1, 'fsdp': 8, 'expert': 1, 'context': 1, 'tensor': 1,
  }  # fmt: skip
  sizes = Mesh(data=2, fsdp=-1, stage=2, dcn_stage=4).shape(32, slices=4)
  assert (sizes['data'], sizes['stage'], sizes['fsdp']) == (2, 8, 2)
  assert Mesh(data=2, fsdp=4).batch_shards(16, slices=2) == 16


@pytest.mark.parametrize(
  ('sizes', 'says'),
  [
    ({'data': 3}, r'Mesh\.data: a mesh of data 3 needs 3 devices and there are 8 here'),
    (
      {'data': -1, 'fsdp': 3},
      r'Mesh\.fsdp: .* needs a multiple of 3 devices and there are 8 here; change Mesh\.fsdp\.$',
    ),
    ({'data': -1, 'fsdp': -1}, r'only one mesh axis may be -1'),
    ({'data': 0}, r'Mesh\.data: 0 is not a number of devices'),
    ({'dcn_stage': -1}, r'Mesh\.dcn_stage: -1 is not a number'),
    ({'dcn_data': 2}, r'Mesh\.dcn_data: data 2 x stage 1 over DCN are not the 1 slices here'),
    ({'sum_dtype': 'float16'}, r"sum_dtype: 'float16' must be 'float32', 'bfloat16' or None"),
    ({'rules': {'mpl': 'tensor'}}, r"no array axis 'mpl'\. Did you mean mlp\?"),
    ({'rules': {'mlp': 'tensr'}}, r"no mesh axis 'tensr'\. Did you mean tensor\?"),
  ],
)
def test_an_impossible_mesh_is_one_sentence(sizes, says):
  with pytest.raises(Invalid, match=says):
    Mesh(**sizes).shape(8)


def test_names_become_places_only_where_they_fit():
  with Mesh(data=2, fsdp=2, tensor=2).use():
    assert axes.spec('batch', 'length', 'embed') == P(('data', 'fsdp'), None, None)
    assert axes.spec('embed', 'mlp') == P('fsdp', 'tensor')
    # 7 is not divided by 2, and of two names on one mesh axis the first has it.
    assert axes.spec('embed', 'mlp', shape=(8, 7)) == P('fsdp', None)
    assert axes.spec('heads', 'mlp') == P('tensor', None)
  with Mesh(data=2, fsdp=2, tensor=2, rules={'mlp': None}).use():
    assert axes.spec('embed', 'mlp') == P('fsdp', None)
  # An axis of one device splits nothing.
  with Mesh(data=8).use():
    assert axes.spec('embed', 'mlp') == P(None, None)


def test_stages_share_the_vocabulary_where_they_divide_it():
  with Mesh(data=1, stage=4, tensor=2).use():
    assert axes.spec('vocab', 'embed', shape=(16, 8)) == P(('tensor', 'stage'), None)
    assert axes.on_each(16, 'vocab') == 2
    axes.check({'tokens': (('vocab', 'embed'), (18, 8))})
    assert axes.spec('vocab', 'embed', shape=(18, 8)) == P('tensor', None)
    assert axes.on_each(18, 'vocab') == 9
    with pytest.raises(Invalid, match="tensor 2 does not divide the 17 'vocab'"):
      axes.check({'tokens': (('vocab', 'embed'), (17, 8))})
  with Mesh(data=1, fsdp=2, stage=4, rules={'vocab': None}).use():
    assert axes.spec('vocab', 'embed', shape=(16, 8)) == P(None, 'fsdp')


def test_parameters_are_split_over_every_axis_that_would_hold_copies_of_them():
  with Mesh(data=1, fsdp=2, context=2, expert=2).use():
    assert axes.spec('batch', 'length') == P(('fsdp', 'expert'), 'context')
    assert axes.spec('embed', 'mlp') == P(('fsdp', 'expert', 'context'), None)
    # An expert's matrix has its own axis there, and embed the rest.
    assert axes.spec('expert', 'embed', 'mlp') == P('expert', ('fsdp', 'context'), None)
    assert axes.axis_size('batch') == 4
    assert axes.axis_size('length') == 2


@pytest.mark.parametrize(
  ('rules', 'names', 'shape', 'says'),
  [
    ({}, ('embed', 'mlp'), (8, 6), r"tensor 4 does not divide the 6 'mlp' of mlp.kernel \[8 embed"),
    ({}, ('embed', 'mlp'), (7, 8), r"Mesh.fsdp: fsdp 2 does not divide the 7 'embed'"),
    ({'embed': 'tensor'}, ('embed', 'mlp'), (8, 8), r"'embed' and 'mlp' of mlp.kernel .* both claim"),
  ],
)  # fmt: skip
def test_a_parameter_that_does_not_fit_is_one_sentence(rules, names, shape, says):
  with (
    Mesh(data=1, fsdp=2, tensor=4, rules=rules).use(),
    pytest.raises(Invalid, match=says),
  ):
    axes.check({'mlp.kernel': (names, shape)})


def test_few_keys_stay_whole():
  with Mesh(data=1, fsdp=2, tensor=4).use():
    names, shape = ('embed', 'kv_heads', 'head_dim'), (8, 1, 16)
    axes.check({'key.kernel': (names, shape)})
    assert axes.spec(*names, shape=shape) == P('fsdp', None, None)


def test_a_run_without_a_mesh_gets_one_by_its_size():
  assert default_mesh(10**9, 16 * 10**9) == Mesh()
  assert default_mesh(10**10, None) == Mesh()
  assert default_mesh(10**10, 16 * 10**9) == Mesh(data=1, fsdp=-1)


def test_slices_are_told_by_their_devices():
  device = lambda i: types.SimpleNamespace(slice_index=i)
  assert count_slices([device(0), device(1), device(1)]) == 2
  assert count_slices(jax.devices()) == 1


def test_outside_a_mesh_everything_is_whole():
  x = jnp.ones((4, 4))
  assert axes.shard(x, 'batch', 'embed') is x
  assert axes.spec('batch', 'embed') == P(None, None)


def test_a_batch_is_split_over_data_and_fsdp_and_its_length_over_context():
  with Mesh(data=2, fsdp=2, tensor=2).use() as mesh:
    batch = {'tokens': np.arange(32, dtype=np.int32).reshape(8, 4)}
    placed = hosts.place(batch)['tokens']
    assert placed.sharding.spec == P(('data', 'fsdp'), None)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(np.asarray(placed), batch['tokens'])
    moved = axes.shard(placed, None, None)
    assert jax.typeof(moved).sharding.spec == P(None, None)
    assert describe(mesh) == 'data 2 x fsdp 2 x tensor 2'
  assert Mesh(data=2, fsdp=2, tensor=2).batch_shards(8) == 4
  with Mesh(data=2, context=4).use():
    assert {s.data.shape for s in hosts.place(batch)['tokens'].addressable_shards} == {(4, 1)}
