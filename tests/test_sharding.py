"""Names of axes on the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from research import sharding
from research.errors import Invalid


def test_a_mesh_fills_the_devices():
  assert sharding.Mesh().shape(8)['data'] == 8
  sizes = sharding.Mesh(data=2, fsdp=-1, tensor=2).shape(8)
  assert (sizes['data'], sizes['fsdp'], sizes['tensor']) == (2, 2, 2)


@pytest.mark.parametrize(
  ('sizes', 'says'),
  [
    ({'data': 3}, r'Mesh\.data: a mesh of data 3 .* needs 3 devices and this machine has 8'),
    (
      {'data': -1, 'fsdp': 3},
      r'Mesh\.fsdp: .* needs a multiple of 3 devices and this machine has 8',
    ),
    ({'data': -1, 'fsdp': -1}, r'only one mesh axis may be -1'),
    ({'data': 0}, r'Mesh\.data: 0 is not a number of devices'),
    ({'rules': {'mpl': 'tensor'}}, r"no array axis 'mpl'\. Did you mean mlp\?"),
    ({'rules': {'mlp': 'tensr'}}, r"no mesh axis 'tensr'\. Did you mean tensor\?"),
  ],
)
def test_an_impossible_mesh_is_one_sentence(sizes, says):
  with pytest.raises(Invalid, match=says):
    sharding.Mesh(**sizes).shape(8)


def test_names_become_places_only_where_they_fit():
  with sharding.Mesh(data=2, fsdp=2, tensor=2).use():
    assert sharding.spec('batch', 'length', 'embed') == P(('data', 'fsdp'), None, None)
    assert sharding.spec('embed', 'mlp') == P('fsdp', 'tensor')
    # 7 is not divided by 2, and of two names on one mesh axis the first has it.
    assert sharding.spec('embed', 'mlp', shape=(8, 7)) == P('fsdp', None)
    assert sharding.spec('heads', 'mlp') == P('tensor', None)
  with sharding.Mesh(data=2, fsdp=2, tensor=2, rules={'mlp': None}).use():
    assert sharding.spec('embed', 'mlp') == P('fsdp', None)
  # An axis of one device splits nothing.
  with sharding.Mesh(data=8).use():
    assert sharding.spec('embed', 'mlp') == P(None, None)


def test_outside_a_mesh_everything_is_whole():
  x = jnp.ones((4, 4))
  assert sharding.shard(x, 'batch', 'embed') is x
  assert sharding.spec('batch', 'embed') == P(None, None)


def test_a_batch_is_split_over_data_and_fsdp():
  with sharding.Mesh(data=2, fsdp=2, tensor=2).use():
    batch = {'tokens': np.arange(32, dtype=np.int32).reshape(8, 4)}
    placed = sharding.place(batch)['tokens']
    assert placed.sharding.spec == P(('data', 'fsdp'), None)
    assert {s.data.shape for s in placed.addressable_shards} == {(2, 4)}
    np.testing.assert_array_equal(np.asarray(placed), batch['tokens'])
    moved = sharding.shard(placed, None, None)
    assert jax.typeof(moved).sharding.spec == P(None, None)
  assert sharding.Mesh(data=2, fsdp=2, tensor=2).batch_shards(8) == 4
