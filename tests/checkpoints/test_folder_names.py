"""Checkpoints in folders whose names mean something to a glob or a URL."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.checkpoints import streamed
from research.checkpoints.manager import Checkpoints

NAMES = ['a[1]', 'a#1 ? 50%', 'gs:', 'a%20b*|\\~ä']


@pytest.mark.parametrize('name', NAMES)
def test_a_checkpoint_is_restored_whatever_its_folder_is_called(tmp_path, name):
  state = {'params': {'w': jnp.arange(8.0)}}
  folder = tmp_path / name / 'checkpoints'
  checkpoints = Checkpoints(folder, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(step, state, {'seen': step})
  checkpoints.close()
  with jax.set_mesh(jax.make_mesh((1,), ('data',), devices=jax.devices()[:1])):
    step, restored, meta = Checkpoints(folder).restore(
      jax.eval_shape(lambda: state), log=pytest.fail
    )
  assert (step, meta) == (3, {'seen': 3})
  np.testing.assert_array_equal(restored['params']['w'], state['params']['w'])
  assert sorted(path.name for path in folder.iterdir()) == ['2', '3']
  assert [path.name for path in (tmp_path / name).iterdir()] == ['checkpoints']
  params = streamed.Params(tmp_path / name)
  np.testing.assert_array_equal(params.piece(('w',), ()), np.arange(8.0))


@pytest.mark.parametrize('name', NAMES)
def test_parameters_are_written_and_read_by_pieces_whatever_the_folder_is_called(tmp_path, name):
  values = np.arange(8, dtype=np.float32).reshape(2, 4)
  pieces = lambda: [(('w',), (i,), values[i]) for i in range(2)]
  streamed.write_params(tmp_path / name, {('w',): (2, 4)}, {('w',): 1}, pieces)
  params = streamed.Params(tmp_path / name)
  np.testing.assert_array_equal(params.piece(('w',), (1,)), values[1])
