"""Rounds a trained model: the stored arrays of every quantised matrix, and the error that rounding made."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx

from research.core.errors import UserError, did_you_mean
from research.model import counts
from research.model.weights import Weight
from research.quantisation import calibration
from research.quantisation.quantised import BFloat16, Quantised
from research.quantisation.rounding import METHODS, Rounded, output_error


@dataclasses.dataclass(frozen=True)
class Error:
  """The error that rounding made in a matrix of one layer.

  Attributes:
    name: the matrix, such as 'stack/sublayers/0/parts/0/query/kernel'.
    index: its layer, and its expert.
    method: the method that rounded it.
    weights: the squared error of the matrix over its squared size.
    outputs: the same for its outputs on the calibration text; None where its inputs were not recorded.
  """

  name: str
  index: tuple[int, ...]
  method: str
  weights: float
  outputs: float | None


def quantise(
  model,
  params: Mapping,
  method: str,
  batches: Iterable[dict] = (),
) -> tuple[dict, list[Error]]:
  """The parameters of a quantised model, from those of the plain one.

  Args:
    model: makes the quantised model, `model(rngs=...)`; its `quantised.Quantised` matrices are rounded.
    params: the parameters of the plain model, host arrays as nested dicts.
    method: a key of `rounding.METHODS`. A matrix whose inputs are not recorded (experts, heads, token tables)
      is always rounded to nearest.
    batches: calibration tokens in batches, as for training.

  Raises:
    UserError: the method is unknown; the model has no quantised matrix, or knobs that the method does not fill.
  """
  weights = check(model, method)
  grams = {}
  if method != 'nearest':
    grams = calibration.grams(calibration.recorded(model), _for_recording(weights, params), batches)
  tree, errors = dict(params), []
  for path, weight in weights.items():
    matrix = np.asarray(_at(params, path), np.float32)
    if isinstance(weight, BFloat16):
      stored = {'packed': matrix.astype(ml_dtypes.bfloat16)}
    else:
      name = '/'.join(map(str, path))
      stored, of_matrix = _all_layers(weight, matrix, grams.get(path), method)
      errors += [dataclasses.replace(error, name=name) for error in of_matrix]
    tree = _put(tree, path, stored)
  return tree, errors


def check(model, method: str) -> dict[tuple, Weight]:
  """The matrices of a model that `quantise` fills, by path; arguments and errors as of `quantise`."""
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


def _for_recording(weights: Mapping[tuple, Weight], params: Mapping) -> dict:
  """The plain parameters under the names that `Recorded` gives them."""
  tree = dict(params)
  for path in weights:
    tree = _put(tree, path, {'base': _at(params, path)})
  return tree


def _all_layers(weight: Quantised, matrix, gram, method: str) -> tuple[dict, list[Error]]:
  """The stored arrays of a matrix [layers..., stacked..., inputs..., outputs...], a slice at a time."""
  lead = matrix.ndim - len(weight.shape) + weight.stacked
  # The groups of a token table lie along the vectors, which therefore take the place of the inputs.
  table = weight.packed.kind == 'table'
  arrays: dict[str, Any] = {}
  errors = []
  for index in np.ndindex(*matrix.shape[:lead]):
    layer = matrix[index]
    flat = layer.T if table else layer.reshape(math.prod(layer.shape[: weight.inputs]), -1)
    # Where all inputs share a scale, the inputs of all heads are one group.
    group = len(flat) if weight.layout.whole else weight.layout.group
    seen = None if gram is None else gram[index[: gram.ndim - 2]]
    chosen = method if seen is not None else 'nearest'
    rounded = METHODS[chosen](flat, seen, group, weight.form, weight.zeros)
    if weight.input_scale is not None and rounded.input_scale is None:
      rounded = dataclasses.replace(rounded, input_scale=np.ones(len(flat), np.float32))
    whole = rounded.matrix(weight.form)
    size = float(np.sum(flat.astype(np.float64) ** 2))
    errors.append(
      Error(
        '', index, chosen, float(np.sum((flat - whole).astype(np.float64) ** 2)) / max(size, 1e-300),
        None if seen is None else output_error(flat, whole, seen),
      )
    )  # fmt: skip
    for name, x in _stored(weight, rounded, table).items():
      if name not in arrays:
        arrays[name] = np.empty((*matrix.shape[:lead], *x.shape), x.dtype)
      arrays[name][index] = x
  return arrays, errors


def _stored(weight: Quantised, rounded: Rounded, table: bool) -> dict[str, np.ndarray]:
  """The arrays of one layer as `Quantised` has them."""
  start, layout = weight.stacked, weight.layout
  shape = weight.shape[start:]
  scales = layout.scale_shape[start:]
  turn = np.transpose if table else lambda x: x
  codes = turn(rounded.codes).reshape(shape)
  stored = {
    'packed': weight.form.pack(codes, layout.axis - start),
    'scale': turn(rounded.scale).reshape(scales),
  }
  if weight.zeros:
    stored['zero'] = turn(rounded.zero).reshape(scales).astype(np.uint8)
  if weight.input_scale is not None:
    stored['input_scale'] = rounded.input_scale.reshape(shape[: weight.inputs])
  return stored


def _at(tree: Mapping, path: tuple):
  return functools.reduce(lambda node, key: node[key], path, tree)


def _put(tree: Mapping, path: tuple, value) -> dict:
  return {**tree, path[0]: _put(tree[path[0]], path[1:], value)} if path else value
