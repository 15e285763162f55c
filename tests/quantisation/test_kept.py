"""Weights that were packed before keep their codes: every number is the same, to the bit."""

import numpy as np
import pytest

from research.core.errors import UserError
from research.quantisation.formats import FORMATS
from research.quantisation.kept import keep

MATRIX = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32) * 0.02 + 0.003


def packed_by_gguf(kind: str) -> np.ndarray:
  """The matrix [inputs, outputs] that a GGUF file of this type stands for."""
  gguf = pytest.importorskip('gguf')
  kind = gguf.GGMLQuantizationType[kind]
  return gguf.dequantize(gguf.quantize(MATRIX, kind), kind).T


@pytest.mark.parametrize(
  ('kind', 'format', 'offsets'),
  [
    ('Q4_0', 'int4', True),
    ('Q4_1', 'int4', True),
    ('Q5_0', 'int5', True),
    ('Q5_1', 'int5', True),
    ('Q8_0', 'int8', False),
  ],
)
def test_the_numbers_of_a_gguf_file_are_kept(kind, format, offsets):
  matrix = packed_by_gguf(kind)
  matrix[:, 0] = 0  # a group that has one number alone
  kept = keep(matrix, None, 32, FORMATS[format], offsets)
  np.testing.assert_array_equal(kept.matrix(FORMATS[format]), matrix)
  assert kept.scale.shape == (2, 6)


def test_a_symmetric_grid_is_kept_though_its_ends_do_not_occur():
  codes = np.random.default_rng(1).integers(3, 12, (16, 5))
  scale = np.random.default_rng(2).uniform(0.01, 0.03, (2, 5)).astype(np.float16)
  matrix = (codes - 8).astype(np.float32) * np.repeat(scale, 8, axis=0).astype(np.float32)
  kept = keep(matrix, None, 8, FORMATS['int4'], True)
  np.testing.assert_array_equal(kept.matrix(FORMATS['int4']), matrix)


@pytest.mark.parametrize('name', ['nf4', 'int3', 'int8', 'fp8_e4m3'])
def test_what_a_format_rounded_is_kept_in_it(name):
  form = FORMATS[name]
  matrix = form.round_trip(MATRIX.T, (0,))
  np.testing.assert_array_equal(keep(matrix, None, 64, form, False).matrix(form), matrix)


def test_a_matrix_that_is_on_no_grid_is_refused():
  with pytest.raises(UserError, match='6 of 6 groups of 64 numbers are on no grid of int4'):
    keep(MATRIX.T, None, 64, FORMATS['int4'], True)
