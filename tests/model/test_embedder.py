"""The noise on token vectors: as large as the paper says, and each row's own."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import Invalid
from research.model.embedder import Embedder, uniform_noise


def test_the_noise_is_within_the_bound_of_its_segment():
  """Jain et al. 2023, equation 1: uniform within alpha / sqrt(L d), L the tokens of the sequence."""
  lengths = (10, 30, 60)
  segments = np.repeat([1, 2, 3], lengths)[None].repeat(8, 0)
  seeds = np.arange(16, dtype=np.uint32).reshape(8, 2)
  x = jnp.zeros((8, 100, 64))
  noise = np.asarray(uniform_noise(seeds, segments, x))
  for number, length in enumerate(lengths, 1):
    part, bound = noise[:, segments[0] == number], 1 / np.sqrt(length * 64)
    assert 0.99 * bound < np.abs(part).max() <= bound * (1 + 1e-6)
    np.testing.assert_allclose(part.std(), bound / np.sqrt(3), rtol=0.02)
    assert abs(part.mean()) < 0.03 * bound
  unpacked = np.asarray(uniform_noise(seeds, None, x))
  assert 0.99 / 80 < np.abs(unpacked).max() <= (1 + 1e-6) / 80
  # A row has its own noise, which does not depend on the rows beside it.
  np.testing.assert_array_equal(noise[2:4], uniform_noise(seeds[2:4], segments[2:4], x[2:4]))
  assert len(np.unique(noise[:, 0, 0])) == 8


def test_negative_noise_is_refused():
  with pytest.raises(Invalid, match=r'Embedder\.noise: -1\.0 must be 0 or more'):
    functools.partial(Embedder, 8, 16, noise=-1.0)(rngs=None)
