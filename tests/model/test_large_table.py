"""The products with a large table on one CPU, against their definition in numpy, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.model.kernels import large_table
from research.model.parameters import project
from research.parallel.mesh import Mesh


@pytest.fixture
def tables_are_large(monkeypatch):
  monkeypatch.setattr(large_table, 'WEIGHTS', 1)
  monkeypatch.setattr(large_table, 'ROWS', 2)


def of_table(transposed: bool):
  """The lowered value and gradients of a head, and its arguments."""

  def f(x, table, dy):
    def y(x, table):
      axes = ('vocab', 'embed') if transposed else ('embed', 'vocab')
      return project(x, table, axes, ('batch', 'length', 'vocab'), transposed=transposed)

    value, vjp = jax.vjp(y, x, table)
    return value, *vjp(dy)

  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 5, 8))
  table = jax.random.normal(keys[1], (24, 8) if transposed else (8, 24))
  dy = jax.random.normal(keys[2], (2, 5, 24))
  with Mesh(data=1).use(jax.devices()[:1]):
    return jax.jit(f).lower(x, table, dy), (x, table, dy)


@pytest.mark.parametrize('transposed', [False, True])
def test_products_with_a_large_table_are_their_definition(transposed, tables_are_large):
  program, arguments = of_table(transposed)
  got = program.compile()(*arguments)
  x, table, dy = (np.asarray(a, np.float64) for a in arguments)
  kernel = table.T if transposed else table
  d_kernel = np.einsum('btd,btv->dv', x, dy)
  want = x @ kernel, dy @ kernel.T, d_kernel.T if transposed else d_kernel
  for ours, theirs in zip(got, want, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max())


def test_only_a_large_table_has_them(monkeypatch):
  small = of_table(transposed=True)[0].as_text()
  monkeypatch.setattr(large_table, 'WEIGHTS', 24 * 8)
  assert of_table(transposed=True)[0].as_text() == small  # of 10 rows
  monkeypatch.setattr(large_table, 'ROWS', 10)
  assert of_table(transposed=True)[0].as_text() != small


def test_a_matrix_of_long_vectors_has_none(monkeypatch):
  monkeypatch.setattr(large_table, 'ROWS', 10)
  monkeypatch.setattr(large_table, 'WEIGHTS', 24 * 8)
  monkeypatch.setattr(large_table, 'VECTOR', 8)
  special = of_table(transposed=True)[0].as_text()
  monkeypatch.setattr(large_table, 'VECTOR', 7)
  assert of_table(transposed=True)[0].as_text() != special


def test_an_odd_number_of_rows_has_no_halves(tables_are_large):
  assert large_table.is_large(jnp.zeros((2, 5, 8)), 1, jnp.zeros((24, 8)))
  assert not large_table.is_large(jnp.zeros((3, 5, 8)), 1, jnp.zeros((24, 8)))
