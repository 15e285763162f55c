"""Rounds a trained model: the stored arrays of every quantised matrix, and the error that rounding made."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping

import ml_dtypes
import numpy as np
from flax import nnx

from research.core.errors import UserError, did_you_mean
from research.model import counts
from research.model.weights import Weight
from research.quantisation import calibration
from research.quantisation.calibration import Inputs
from research.quantisation.kept import keep
from research.quantisation.quantised import BFloat16, Quantised
from research.quantisation.rounding import (
  Rounded,
  awq,
  corrected,
  gptq,
  nearest,
  output_error,
  smooth,
)

# Those that look at the inputs of a matrix, on a calibration text, and those that do not.
CALIBRATED = {'gptq': gptq, 'awq': awq, 'smooth': smooth}
METHODS = {'nearest': nearest, 'keep': keep, **CALIBRATED}


@dataclasses.dataclass(frozen=True)
class Error:
  """The error that rounding made in a matrix of one layer.

  Attributes:
    name: the matrix, such as 'stack/sublayers/0/parts/0/query/kernel'.
    index: its layer, and its expert.
    method: the method that rounded it.
    weights: the squared error of the matrix over its squared size.
    outputs: the squared error of its outputs on the calibration text over their squared size, behind rounded
      matrices and against what least squares could reach; None where its inputs were not recorded.
  """

  name: str
  index: tuple[int, ...]
  method: str
  weights: float
  outputs: float | None


def quantise(
  model,
  weights: Mapping[tuple, Weight],
  params: Mapping,
  method: str,
  batches: Iterable[dict] = (),
) -> tuple[dict, list[Error]]:
  """Returns the parameters of a quantised model, from those of the plain one, and the error of every matrix.

  Args:
    model: makes the quantised model, `model(rngs=...)`.
    weights: the matrices of it that are to be filled, as `weights_to_fill` returns them.
    params: the parameters of the plain model, host arrays as nested dicts.
    method: a key of `METHODS`. A matrix whose inputs are not recorded (experts, heads, token tables) is rounded
      to nearest, if the method is one of `CALIBRATED`.
    batches: calibration tokens in batches, as for training.
  """
  matrices = {
    path: _Filling('/'.join(map(str, path)), weight, np.asarray(_at(params, path), np.float32))
    for path, weight in weights.items()
    if isinstance(weight, Quantised)
  }

  def round_matrix(path: tuple, layer: int | None, inputs: Inputs) -> np.ndarray:
    index = () if layer is None else (layer,)
    if path in matrices:
      return matrices[path].round(index, method, inputs)
    return _in_bfloat16(_at(params, path)[index]).astype(np.float32)

  if method in CALIBRATED:
    calibration.round_in_order(model, params, batches, round_matrix)
  tree = dict(params)
  errors = []
  for path, weight in weights.items():
    if isinstance(weight, Quantised):
      stored = matrices[path].stored('nearest' if method in CALIBRATED else method)
      errors += matrices[path].errors
    else:
      stored = {'packed': _in_bfloat16(_at(params, path))}
    tree = _put(tree, path, stored)
  return tree, errors


def weights_to_fill(model, method: str) -> dict[tuple, Weight]:
  """Returns the matrices that `quantise` fills, by path, with shapes in place of arrays.

  Args:
    model: makes the quantised model, `model(rngs=...)`.
    method: a key of `METHODS`.

  Raises:
    UserError: the method is unknown; the model has no quantised matrix, or knobs that the method does not fill.
  """
  if method not in METHODS:
    raise UserError(f'no method {method!r}.{did_you_mean(method, METHODS)}')
  module = counts.abstract(model)
  weights = {path: m for path, m in nnx.iter_modules(module) if isinstance(m, Weight)}
  strange = [m for m in weights.values() if not isinstance(m, Quantised | BFloat16)]
  if strange:
    raise UserError(
      f'the gin files choose {type(strange[0]).__name__} for some matrices; rounding fills Quantised and '
      'BFloat16 alone.'
    )
  quantised = [m for m in weights.values() if isinstance(m, Quantised)]
  if not quantised:
    raise UserError(
      'the gin files quantise nothing; add one such as --gin_file=gin/quantisation/int4.gin.'
    )
  scaled = any(m.input_scale is not None for m in quantised)
  if scaled != (method in ('awq', 'smooth')):
    says = f'quantised.Quantised.input_scales = {scaled}, and --method={method}'
    needs = 'does not fill them' if scaled else 'needs them'
    raise UserError(f'{says} {needs}; add --gin.INPUT_SCALES={not scaled}.')
  return weights


class _Filling:
  """A matrix of all layers [layers..., stacked..., inputs..., outputs...] that is rounded a slice at a time.

  Attributes:
    errors: of the slices that were rounded.
  """

  def __init__(self, name: str, weight: Quantised, matrix: np.ndarray):
    self.name = name
    self.weight = weight
    self.matrix = matrix
    self.slices = matrix.shape[: matrix.ndim - len(weight.shape) + weight.stacked]
    self.arrays: dict[str, np.ndarray] = {}
    self.errors: list[Error] = []
    # The groups of a token table lie along the vectors, which therefore take the place of the inputs.
    self.is_table = weight.packed.kind == 'table'

  def round(self, index: tuple, method: str, inputs: Inputs | None) -> np.ndarray:
    """Rounds a slice, keeps its arrays and its error, and returns the matrix that they stand for."""
    weight = self.weight
    piece = self.matrix[index]
    if self.is_table:
      flat = piece.T
    else:
      flat = piece.reshape(math.prod(piece.shape[: weight.inputs]), -1)
    # Where all inputs share a scale, the inputs of all heads are one group.
    group = len(flat) if weight.layout.whole else weight.layout.group
    gram = None
    target = flat
    if inputs is not None:
      gram = inputs.gram
      target = corrected(flat, inputs.gram, inputs.drift)
    try:
      if weight.offsets:
        _check_offsets(flat)
      rounded = METHODS[method](target, gram, group, weight.form, weight.offsets)
    except UserError as error:
      name = ' '.join(map(str, (self.name, *index)))
      raise UserError(f'{name}: {error}') from None
    if weight.input_scale is not None and rounded.input_scale is None:
      rounded = dataclasses.replace(rounded, input_scale=np.ones(len(flat), np.float32))
    whole = rounded.matrix(weight.form)
    size = float(np.sum(flat.astype(np.float64) ** 2))
    difference = float(np.sum((flat - whole).astype(np.float64) ** 2))
    of_outputs = None if gram is None else output_error(target, whole, gram)
    self.errors.append(Error(self.name, index, method, difference / max(size, 1e-300), of_outputs))
    for name, x in _stored(weight, rounded, self.is_table).items():
      if name not in self.arrays:
        self.arrays[name] = np.empty((*self.slices, *x.shape), x.dtype)
      self.arrays[name][index] = x
    return (whole.T if self.is_table else whole).reshape(piece.shape)

  def stored(self, method: str) -> dict[str, np.ndarray]:
    """The arrays of all slices. Those that are not rounded yet are rounded by a method that reads no inputs."""
    done = {error.index for error in self.errors}
    for index in np.ndindex(*self.slices):
      if index not in done:
        self.round(index, method, None)
    return self.arrays


def _check_offsets(matrix: np.ndarray) -> None:
  """Raises UserError where offsets, which are float16, cannot hold the numbers of a matrix."""
  largest = float(np.abs(matrix).max())
  if largest > float(np.finfo(np.float16).max):
    raise UserError(
      f'its largest number is {largest:.4g}, and offsets are float16, which ends at 65504; take a format '
      'without offsets: --gin.Quantised.offsets=False.'
    )


def _stored(weight: Quantised, rounded: Rounded, table: bool) -> dict[str, np.ndarray]:
  """The arrays of one layer as `Quantised` has them."""
  start = weight.stacked
  shape = weight.shape[start:]
  scale_shape = weight.layout.scale_shape[start:]

  def turned(x):
    return x.T if table else x

  codes = turned(rounded.codes).reshape(shape)
  stored = {
    'packed': weight.form.pack(codes, weight.layout.axis - start),
    'scale': turned(rounded.scale).reshape(scale_shape),
  }
  if weight.offsets:
    stored['offset'] = turned(rounded.offset).reshape(scale_shape)
  if weight.input_scale is not None:
    stored['input_scale'] = rounded.input_scale.reshape(shape[: weight.inputs])
  return stored


def _in_bfloat16(matrix) -> np.ndarray:
  return np.asarray(matrix).astype(ml_dtypes.bfloat16)


def _at(tree: Mapping, path: tuple):
  return functools.reduce(lambda node, key: node[key], path, tree)


def _put(tree: Mapping, path: tuple, value) -> dict:
  return {**tree, path[0]: _put(tree[path[0]], path[1:], value)} if path else value
