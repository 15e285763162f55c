"""muP: what it scales, and the coordinate check."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.training import mup, optimizers

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_matrices_are_slower_and_the_rest_is_not():
  params = {
    'embedder': {'tokens': jnp.ones((8, 64))},
    'stack': {'kernel': jnp.ones((64, 64)), 'scale': jnp.ones(64)},
    'head': {'kernel': jnp.ones((64, 8))},
  }
  kinds = {
    'embedder': {'tokens': 'table'},
    'stack': {'kernel': 'matrix', 'scale': 'vector'},
    'head': {'kernel': 'matrix'},
  }
  moved = {}
  for width in (32, 128):
    tx = mup.mup(learning_rate=0.1, inner=optax.adam, width=width, base=32)
    tx = optimizers.knowing(kinds, tx)
    updates, _ = tx.update(params, tx.init(params), params)
    moved[width] = jax.tree.map(lambda u: float(jnp.abs(u).max()), updates)
  ratio = jax.tree.map(lambda a, b: a / b, moved[32], moved[128])
  assert ratio == {
    'embedder': {'tokens': 1.0}, 'stack': {'kernel': 4.0, 'scale': 1.0}, 'head': {'kernel': 4.0}
  }  # fmt: skip


def test_the_head_starts_at_the_usual_size_at_the_base_width():
  for width, stddev in ((64, 64**-0.5), (256, 8 / 256)):
    kernel = mup.head_init(jax.random.key(0), (width, 2000), base=64)
    assert float(jnp.std(kernel)) == pytest.approx(stddev, rel=0.02)


@pytest.mark.slow
def test_coordinate_check():
  """Under muP four steps move the logits of every width alike; otherwise the wider move further."""
  check = runpy.run_path(str(ROOT / 'experiments/mup/coordinate_check.py'))
  widths, slopes = (32, 64, 128), {}
  for name, file in check['PARAMETRISATIONS'].items():
    moved = [check['movement'](file, width) for width in widths]
    slopes[name] = np.polyfit(np.log(widths), np.log(moved), 1)[0]
  assert abs(slopes['muP']) < 0.15
  assert slopes['standard'] > 0.4
