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
RANGES = (1.0, 0.9, 0.8, 0.7, 0.6)  # shares of a group's range that are tried
OUTPUTS = 64  # outputs whose scales are fitted together


@dataclasses.dataclass(frozen=True)
class Rounded:
  """A matrix [inputs, outputs] in few bits.

  Attributes:
    codes: [inputs, outputs].
    scale, offset: [groups, outputs]; the offset is None where there are no offsets.
    input_scale: [inputs], multiplied the matrix before it was rounded; None where nothing did.
  """

  codes: np.ndarray
  scale: np.ndarray
  offset: np.ndarray | None = None
  input_scale: np.ndarray | None = None

  def matrix(self, form: Format) -> np.ndarray:
    """The matrix that the codes stand for, float32 [inputs, outputs]."""
    group = len(self.codes) // len(self.scale)
    matrix = form.decode(self.codes, *_wide(group, self.scale, self.offset))
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


def _wide(group: int, scale: np.ndarray, offset: np.ndarray | None):
  """Scales and offsets [groups, outputs] for every input, [inputs, outputs]."""
  return tuple(None if x is None else np.repeat(x, group, axis=0) for x in (scale, offset))


def nearest(
  matrix: np.ndarray, gram: np.ndarray | None, group: int, form: Format, offsets: bool
) -> Rounded:
  """Every number becomes the nearest one that its group can represent.

  Args:
    matrix: float32 [inputs, outputs].
    gram: [inputs, inputs]; not read here.
    group: how many inputs share a scale.
    form: the format.
    offsets: whether groups have offsets.
  """
  split = matrix.reshape(-1, group, matrix.shape[1])
  scale, offset = form.scales(split, (1,), offsets)
  codes = form.encode(split, scale, offset).reshape(matrix.shape)
  return Rounded(codes, scale[:, 0], None if offset is None else offset[:, 0])


def gptq(matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, offsets: bool) -> Rounded:
  """Rounds input by input; the inputs that are not rounded yet compensate the error of those that are.

  Frantar et al. 2023, arXiv:2210.17323, algorithm 1. The largest inputs come first (act_order of the authors'
  implementation), and the scales of all groups are fitted to the original matrix (`_fitted`). Arguments as of
  `nearest`.
  """
  scale, offset = _fitted(matrix, gram, group, form, offsets)
  # The order in which inputs are rounded.
  order = np.argsort(-np.diag(gram), kind='stable')
  left = matrix[order].astype(np.float64)
  upper = _inverse_cholesky(gram[np.ix_(order, order)])
  codes: list[np.ndarray | None] = [None] * len(left)
  for start in range(0, len(left), BLOCK):
    end = min(start + BLOCK, len(left))
    errors = np.empty((end - start, left.shape[1]))
    for i in range(start, end):
      s = scale[order[i] // group]
      z = None if offset is None else offset[order[i] // group]
      code = form.encode(left[i], s, z)
      codes[order[i]] = code
      errors[i - start] = (left[i] - form.decode(code, s, z)) / upper[i, i]
      left[i + 1 : end] -= np.outer(upper[i, i + 1 : end], errors[i - start])
    left[end:] -= upper[start:end, end:].T @ errors
  return Rounded(np.stack(codes), scale, offset)


def _fitted(matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, offsets: bool):
  """Scales and offsets [groups, outputs] with the least error of the outputs of each group by itself.

  The ranges `RANGES` of a group are tried, and for each of them the scale and the offset that fit its codes
  best by least squares. Arguments as of `nearest`.
  """
  split = matrix.reshape(-1, group, matrix.shape[1])
  damped = _damped(gram)
  starts = range(0, len(matrix), group)
  blocks = np.stack([damped[a : a + group, a : a + group] for a in starts])
  # A few outputs at a time stay in the processor's cache.
  parts = [
    _fitted_outputs(split[..., a : a + OUTPUTS], blocks, form, offsets)
    for a in range(0, matrix.shape[1], OUTPUTS)
  ]
  return tuple(
    None if x[0] is None else np.concatenate(x, axis=1) for x in zip(*parts, strict=True)
  )


def _fitted_outputs(split: np.ndarray, blocks: np.ndarray, form: Format, offsets: bool):
  """As `_fitted`, of numbers [groups, group, outputs], with the gram matrices of their groups."""
  middle = np.zeros_like(split[:, :1])
  if offsets:
    middle = (split.min(axis=1, keepdims=True) + split.max(axis=1, keepdims=True)) / 2
  least = np.full(middle.shape, np.inf)
  best = form.scales(split, (1,), offsets)
  for share in RANGES:
    grid = form.scales(middle + share * (split - middle), (1,), offsets)
    for scale, offset in (grid, _least_squares(split, blocks, form, *grid)):
      error = split - form.decode(form.encode(split, scale, offset), scale, offset)
      harm = np.sum(error * (blocks @ error), axis=1, keepdims=True)
      better = harm < least
      least = np.where(better, harm, least)
      pairs = zip((scale, offset), best, strict=True)
      best = [None if new is None else np.where(better, new, old) for new, old in pairs]
  return [None if x is None else x[:, 0] for x in best]


def _least_squares(split, blocks, form: Format, scale, offset):
  """The scales and offsets that fit the codes of a grid best; arguments as in `_fitted`.

  Args:
    split: [groups, group, outputs].
    blocks: [groups, group, group], the gram matrices that measure the errors.
    scale, offset: the grid, [groups, 1, outputs].
  """
  codes = form.encode(split, scale, offset)
  error = split - form.decode(codes, scale, offset)
  values = form.decode(codes, 1.0, None if offset is None else 0.0).astype(np.float64)
  columns = [values] if offset is None else [values, np.ones_like(values)]
  weighted = [blocks @ column for column in columns]
  normal = [[np.sum(w * column, axis=1) for column in columns] for w in weighted]
  normal = np.moveaxis(np.array(normal), (0, 1), (-2, -1))
  moment = np.stack([np.sum(w * error, axis=1) for w in weighted], axis=-1)
  # Where all codes of a group are the same they do not determine both; the smallest change does as well.
  ridge = np.maximum(1e-9 * np.trace(normal, axis1=-2, axis2=-1), 1e-300)
  normal += ridge[..., None, None] * np.eye(len(columns))
  change = np.linalg.solve(normal, moment[..., None])[:, None, ..., 0]
  fitted = scale + change[..., 0]
  fitted = np.where(fitted > 0, fitted, scale).astype(scale.dtype)
  return fitted, None if offset is None else (offset + change[..., 1]).astype(offset.dtype)


def _inverse_cholesky(gram: np.ndarray) -> np.ndarray:
  """The upper Cholesky factor of the inverse of a damped gram matrix."""
  inverse = np.linalg.inv(_damped(gram))
  return np.linalg.cholesky((inverse + inverse.T) / 2).T


def _damped(gram: np.ndarray) -> np.ndarray:
  """A gram matrix, float64, with a share of the mean of its diagonal added to its diagonal."""
  gram = gram.astype(np.float64)
  size = max(float(np.diag(gram).mean()), 1e-30)
  return gram + DAMPING * size * np.eye(len(gram))


def awq(matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, offsets: bool) -> Rounded:
  """Rounds to nearest after every row was multiplied by size^power, which gives large inputs finer steps.

  Lin et al. 2023, arXiv:2306.00978, equations 4 and 5. The power is the one of a grid with the smallest error
  of the outputs, and the size of an input is the root of its mean square. Then the scales of groups are fitted
  (`_fitted`; the authors' implementation narrows ranges), if that lessens the error of the outputs too.
  Arguments as of `nearest`.
  """
  # A common factor of all sizes changes nothing, so sums serve as means.
  size = np.sqrt(np.maximum(np.diag(gram), 0))
  size = np.maximum(size / max(float(size.mean()), 1e-30), 1e-4)

  def harm(rounded: Rounded) -> float:
    return _squared(matrix - rounded.matrix(form), gram)

  def scaled(power: float) -> Rounded:
    by = size**power
    by = (by / np.sqrt(by.max() * by.min())).astype(np.float32)
    rounded = nearest(matrix * by[:, None], gram, group, form, offsets)
    return dataclasses.replace(rounded, input_scale=by)

  # The power 0 leaves the matrix as it is, so the result is never worse than `nearest`.
  best = min(map(scaled, AWQ_POWERS), key=harm)
  by = best.input_scale
  larger = matrix * by[:, None]
  scale, offset = _fitted(larger, gram / np.outer(by, by), group, form, offsets)
  codes = form.encode(larger, *_wide(group, scale, offset))
  # Errors of different groups may add up, so what is better for each group may be worse for the outputs.
  return min(best, Rounded(codes, scale, offset, by), key=harm)


def smooth(
  matrix: np.ndarray, gram: np.ndarray, group: int, form: Format, offsets: bool
) -> Rounded:
  """Rounds to nearest after half of the inputs' unevenness moved into the matrix; int8 inputs then lose less.

  Xiao et al. 2022, arXiv:2211.10438, equation 4 with alpha 1/2, by root mean squares in place of largest
  magnitudes. Arguments as of `nearest`.
  """
  of_inputs = np.sqrt(np.maximum(np.diag(gram), 0) / max(float(np.diag(gram).mean()), 1e-30))
  of_matrix = np.abs(matrix).max(axis=1)
  by = np.sqrt(np.maximum(of_inputs, 1e-4) / np.maximum(of_matrix, 1e-8)).astype(np.float32)
  rounded = nearest(matrix * by[:, None], gram, group, form, offsets)
  return dataclasses.replace(rounded, input_scale=by)
