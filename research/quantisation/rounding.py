"""Rounding one trained matrix: to nearest, by GPTQ, by AWQ.

Each method takes a matrix [inputs, outputs] and `gram` [inputs, inputs], the sum of x x^T over its inputs x on
a calibration text. The squared error of the outputs is tr(E^T gram E), where E is the error of the matrix.
Everything is numpy, in float64 where sums are long.
"""

import dataclasses

import numpy as np

from research.quantisation.formats import Format

# Added to the diagonal of GPTQ's gram matrix, as a share of its mean (Frantar et al. 2023, section 3.3).
DAMPING = 0.01
BLOCK = 128  # columns whose corrections are summed before they are applied to the rest
AWQ_POWERS = np.linspace(0, 1, 21)  # Lin et al. 2023, section 3.2: a grid over [0, 1]
AWQ_RANGES = np.linspace(1, 0.5, 11)  # and of shares of a group's range, as in its implementation


@dataclasses.dataclass(frozen=True)
class Rounded:
  """A matrix [inputs, outputs] in few bits.

  Attributes:
    codes: [inputs, outputs].
    scale, zero: [groups, outputs]; zero is None where there are no zero points.
    input_scale: [inputs], multiplied the matrix before it was rounded; None where nothing did.
  """

  codes: np.ndarray
  scale: np.ndarray
  zero: np.ndarray | None = None
  input_scale: np.ndarray | None = None

  def matrix(self, form: Format) -> np.ndarray:
    """The matrix that the codes stand for, float32 [inputs, outputs]."""
    repeat = len(self.codes) // len(self.scale)
    zero = None if self.zero is None else np.repeat(self.zero, repeat, axis=0)
    matrix = form.decode(self.codes, zero) * np.repeat(self.scale, repeat, axis=0)
    return matrix if self.input_scale is None else matrix / self.input_scale[:, None]


def output_error(matrix: np.ndarray, other: np.ndarray, gram: np.ndarray) -> float:
  """The squared error of the outputs over their squared size, between 0 and about 1."""
  return _squared(matrix - other, gram) / max(_squared(matrix, gram), 1e-300)


def _squared(matrix: np.ndarray, gram: np.ndarray) -> float:
  """The squared size of a matrix's outputs."""
  return float(np.sum(matrix * (gram @ matrix), dtype=np.float64))


def corrected(matrix: np.ndarray, gram: np.ndarray, drift: np.ndarray) -> np.ndarray:
  """The matrix whose outputs on the inputs x come closest to what `matrix` makes of the original inputs y.

  The matrices before this one are rounded, so that its inputs have drifted from y to x; the least-squares
  solution compensates that. It is damped as GPTQ's inverse is, towards `matrix` itself.

  Args:
    matrix: float32 [inputs, outputs].
    gram, drift: the sums of x x^T and of x (y - x)^T.
  """
  change = np.linalg.solve(_damped(gram), drift @ matrix.astype(np.float64))
  return (matrix + change).astype(np.float32)


def _scales(matrix: np.ndarray, group: int, form: Format, zeros: bool):
  """Scales and zero points [groups, outputs] of a matrix [inputs, outputs]."""
  split = matrix.reshape(-1, group, matrix.shape[1])
  scale, zero = form.scales(split, (1,), zeros)
  return scale[:, 0], None if zero is None else zero[:, 0]


def nearest(
  matrix: np.ndarray, gram: np.ndarray | None, group: int, form: Format, zeros: bool
) -> Rounded:
  """Every number becomes the nearest one that its group can represent.

  Args:
    matrix: float32 [inputs, outputs].
    gram: [inputs, inputs]; not read here.
    group: how many inputs share a scale.
    form: the format.
    zeros: whether groups have zero points.
  """
  scale, zero = _scales(matrix, group, form, zeros)
  wide = None if zero is None else np.repeat(zero, group, axis=0)
  codes = form.encode(matrix / np.repeat(scale, group, axis=0), wide)
  return Rounded(codes, scale, zero)


def gptq(matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, zeros: bool) -> Rounded:
  """Rounds input by input; the inputs that are not rounded yet compensate the error of those that are.

  Frantar et al. 2023, arXiv:2210.17323, algorithm 1. The largest inputs come first (act_order of the authors'
  implementation), and the scales of all groups are those of the original matrix. Arguments as of `nearest`.
  """
  scale, zero = _scales(matrix, group, form, zeros)
  order = np.argsort(-np.diag(gram), kind='stable')
  left = matrix[order].astype(np.float64)
  upper = _inverse_cholesky(gram[np.ix_(order, order)])
  codes = np.empty(matrix.shape, form.dtype if zero is None else np.uint8)
  for start in range(0, len(left), BLOCK):
    end = min(start + BLOCK, len(left))
    errors = np.empty((end - start, left.shape[1]))
    for i in range(start, end):
      s = scale[order[i] // group]
      z = None if zero is None else zero[order[i] // group]
      code = form.encode((left[i] / s).astype(np.float32), z)
      codes[order[i]] = code
      errors[i - start] = (left[i] - form.decode(code, z) * s) / upper[i, i]
      left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
    left[end:] -= upper[start:end, end:].T @ errors
  return Rounded(codes, scale, zero)


def _inverse_cholesky(gram: np.ndarray) -> np.ndarray:
  """The upper Cholesky factor of the inverse of a damped gram matrix."""
  inverse = np.linalg.inv(_damped(gram))
  return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _damped(gram: np.ndarray) -> np.ndarray:
  """A gram matrix, float64, with a share of the mean of its diagonal added to its diagonal."""
  gram = gram.astype(np.float64)
  size = max(float(np.diag(gram).mean()), 1e-30)
  return gram + DAMPING * size * np.eye(len(gram))


def awq(matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, zeros: bool) -> Rounded:
  """Rounds to nearest after every row was multiplied by size^power, which gives large inputs finer steps.

  Lin et al. 2023, arXiv:2306.00978, equations 4 and 5. The power is the one of a grid with the smallest error
  of the outputs, and the size of an input is the root of its mean square. Then the range of every group is
  narrowed where this lessens the group's error, as in the authors' implementation, if that lessens the error of
  the outputs too. Arguments as of `nearest`.
  """
  # A common factor of all sizes changes nothing, so sums serve as means.
  size = np.sqrt(np.maximum(np.diag(gram), 0))
  size = np.maximum(size / max(float(size.mean()), 1e-30), 1e-4)

  def harm(rounded: Rounded) -> float:
    return _squared(matrix - rounded.matrix(form), gram)

  def scaled(power: float) -> Rounded:
    by = size**power
    by = (by / np.sqrt(by.max() * by.min())).astype(np.float32)
    rounded = nearest(matrix * by[:, None], gram, group, form, zeros)
    return dataclasses.replace(rounded, input_scale=by)

  # The power 0 leaves the matrix as it is, so the result is never worse than `nearest`.
  best = min(map(scaled, AWQ_POWERS), key=harm)
  by = best.input_scale
  narrowed = _narrowed(matrix * by[:, None], gram / np.outer(by, by), group, form, zeros)
  narrowed = dataclasses.replace(narrowed, input_scale=by)
  # Errors of different groups may add up, so what is better for each group may be worse for the outputs.
  return min(best, narrowed, key=harm)


def _narrowed(matrix, gram, group: int, form: Format, zeros: bool) -> Rounded:
  """Rounds to nearest; each group has the share of its range (`AWQ_RANGES`) with the least error by itself."""
  split = matrix.reshape(-1, group, matrix.shape[1])
  starts = range(0, len(matrix), group)
  blocks = np.stack([gram[a : a + group, a : a + group] for a in starts])
  least = np.full((len(split), 1, matrix.shape[1]), np.inf)
  kept = None
  for share in AWQ_RANGES:
    # The zero point moves with the range, since numbers are cut off at both ends.
    scale, zero = form.scales(share * split, (1,), zeros)
    error = form.decode(form.encode(split / scale, zero), zero) * scale - split
    harm = np.sum(error * (blocks @ error), axis=1, keepdims=True)
    better = harm < least
    least = np.where(better, harm, least)
    of_share = scale, np.zeros_like(scale) if zero is None else zero
    kept = (
      of_share
      if kept is None
      else [np.where(better, *pair) for pair in zip(of_share, kept, strict=True)]
    )
  scale, zero = kept
  codes = form.encode(split / scale, zero if zeros else None).reshape(matrix.shape)
  return Rounded(codes, scale[:, 0].astype(np.float32), zero[:, 0] if zeros else None)


def smooth(matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, zeros: bool) -> Rounded:
  """Rounds to nearest after half of the inputs' unevenness moved into the matrix; int8 inputs then lose less.

  Xiao et al. 2022, arXiv:2211.10438, equation 4 with alpha 1/2, by root mean squares in place of largest
  magnitudes. Arguments as of `nearest`.
  """
  of_inputs = np.sqrt(np.maximum(np.diag(gram), 0) / max(float(np.diag(gram).mean()), 1e-30))
  of_matrix = np.abs(matrix).max(axis=1)
  by = np.sqrt(np.maximum(of_inputs, 1e-4) / np.maximum(of_matrix, 1e-8)).astype(np.float32)
  rounded = nearest(matrix * by[:, None], gram, group, form, zeros)
  return dataclasses.replace(rounded, input_scale=by)


METHODS = {'nearest': nearest, 'gptq': gptq, 'awq': awq, 'smooth': smooth}
