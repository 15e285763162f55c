"""Matrices that are stored in 2 to 8 bits and multiplied as the numbers that their codes stand for.

    models.LanguageModel.weight = @quantised.Quantised
    quantised.Quantised.format = 'int4'

replaces every matrix: projections, experts, heads and token tables. `research.quantise` fills them from a
trained model. They do not learn, but LoRA may learn beside them (`lora.LoRA.base`, QLoRA).
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from research.core.errors import Invalid
from research.model.parameters import check_sizes, look_up, param, project
from research.model.weights import Matrix, Weight
from research.parallel.axes import axis_size, shard
from research.quantisation.formats import Format, group_size, knob_format


class Layout:
  """How a matrix is cut into groups: along its last input axis, or the rows of a table along their vector.

  Attributes:
    shape, axes: the matrix's, as in `weights.Matrix`.
    axis: the axis that is cut into groups and packed into bytes.
    whole: the other axes over which a group extends, where all inputs of an output share one scale.
    group: the size of a group along `axis`.
  """

  def __init__(self, matrix: Matrix, group: int | None):
    self.shape = matrix.shape
    self.axes = matrix.axes
    inputs = range(matrix.stacked, matrix.stacked + matrix.inputs)
    table = matrix.kind == 'table'
    self.axis = len(matrix.shape) - 1 if table else inputs[-1]
    self.whole = tuple(inputs[:-1]) if group is None and not table else ()
    self.group = group_size(matrix.shape[self.axis], group)

  @property
  def groups(self) -> int:
    """How many groups the axis has."""
    return self.shape[self.axis] // self.group

  @property
  def scale_shape(self) -> tuple[int, ...]:
    """The shape of scales and offsets."""
    sizes = list(self.shape)
    sizes[self.axis] = self.groups
    for axis in self.whole:
      sizes[axis] = 1
    return tuple(sizes)

  def split(self, x):
    """The matrix with its axis as [groups, group], and the axes over which a group extends."""
    before = x.shape[: self.axis]
    after = x.shape[self.axis + 1 :]
    return x.reshape(*before, self.groups, self.group, *after), (*self.whole, self.axis + 1)

  def spread(self, scale: jax.Array) -> jax.Array:
    """Scales [.., groups, ..] as [.., inputs, ..], one for every number of a group."""
    if self.group == 1:
      return scale
    before = scale.shape[: self.axis]
    after = scale.shape[self.axis + 1 :]
    wide = jnp.expand_dims(scale, self.axis + 1)
    wide = jnp.broadcast_to(wide, (*before, self.groups, self.group, *after))
    return wide.reshape(*before, self.shape[self.axis], *after)


def encode(x, layout: Layout, form: Format, offsets: bool) -> dict:
  """A matrix rounded to nearest: 'packed', 'scale', and 'offset' where there are offsets."""
  split, axes = layout.split(x)
  scale, offset = form.scales(split, axes, offsets)
  codes = form.encode(split, scale, offset).reshape(layout.shape)
  stored = {'packed': form.pack(codes, layout.axis), 'scale': scale.reshape(layout.scale_shape)}
  if offsets:
    stored['offset'] = offset.reshape(layout.scale_shape)
  return stored


class Quantised(Weight):
  """A matrix of codes, several to a byte, and a scale for each group: w = scale x value of the code, or, with
  offsets, w = scale x code + offset.

  Parameters: `packed` [matrix's shape, the grouped axis shorter]; `scale` and `offset` [the same, an entry for
  each group] in float16, or `scale` alone in float32; `input_scale` float32 [inputs]. A group lies along the
  last input axis; that of a token table along the vector of a token.

  Knobs:
    format: 'int2' to 'int8', 'nf4', 'fp8_e4m3' or 'fp8_e5m2' (`formats.FORMATS`); a number n is 'int<n>'.
    group: how many inputs share a scale; the largest divisor of the axis up to this number is taken. None: all
      inputs of an output share one.
    offsets: whether each group has an offset (integers alone), which makes its codes reach from its smallest to
      its largest number.
    input_scales: whether the inputs are divided by a vector before the product; the matrix was multiplied by it
      before it was rounded (AWQ: Lin et al. 2023, arXiv:2306.00978; SmoothQuant: Xiao et al. 2022,
      arXiv:2211.10438).
    activations: 'int8' rounds the inputs of every token too and multiplies whole numbers; it needs format
      'int8', no offsets and group None (Dettmers et al. 2022, arXiv:2208.07339, section 2). None does not.
  """

  def __init__(
    self,
    matrix: Matrix,
    *,
    format: str | int = 'int8',
    group: int | None = None,
    offsets: bool = False,
    input_scales: bool = False,
    activations: str | None = None,
    rngs: nnx.Rngs,
  ):
    super().__init__(matrix)
    check_sizes(type(self), group=group)
    self.form = knob_format(type(self), 'format', format, offsets)
    self._check_activations(activations, group, offsets)
    self.offsets = offsets
    self.activations = activations
    self.layout = Layout(matrix, group)
    form = self.form
    layout = self.layout
    size = matrix.shape[layout.axis]
    if size % form.per_byte:
      raise Invalid(
        type(self),
        'format',
        f'{form.name} packs {form.per_byte} numbers in a byte, and a matrix has {size} inputs; leave it plain, '
        "or in 'int8'.",
      )
    # The codes of a freshly drawn matrix; on one device, since a group may lie on several parts of it.
    drawn = encode(
      matrix.init(rngs.params(), matrix.shape, jnp.float32, out_sharding=None),
      layout,
      form,
      offsets,
    )

    def stored(name: str, holds: int, axes: tuple) -> nnx.Param:
      x = drawn[name]
      kind = matrix.kind if holds else 'vector'
      return param(
        rngs, x.shape, axes, lambda *_, **__: shard(x, *axes), kind=kind, active=matrix.active,
        dtype=x.dtype, holds=holds,
      )  # fmt: skip

    self.packed = stored('packed', form.per_byte, _where_it_divides(matrix.axes, drawn['packed']))
    beside = _where_it_divides(matrix.axes, drawn['scale'])
    self.scale = stored('scale', 0, beside)
    self.offset = stored('offset', 0, beside) if offsets else None
    end = matrix.stacked + matrix.inputs
    drawn['input_scale'] = jnp.ones(matrix.shape[:end])
    of_inputs = (*matrix.axes[: matrix.stacked], *[None] * matrix.inputs)
    scaled = input_scales and matrix.kind == 'matrix'
    self.input_scale = stored('input_scale', 0, of_inputs) if scaled else None

  def _check_activations(self, activations, group, offsets) -> None:
    if activations not in (None, 'int8'):
      why = f"{activations!r} is not supported; only 'int8' or None."
      raise Invalid(type(self), 'activations', why)
    if activations and (self.form.name != 'int8' or offsets or group is not None):
      why = "needs format = 'int8', offsets = False and group = None: whole numbers are summed over all inputs."
      raise Invalid(type(self), 'activations', why)

  def __getitem__(self, index) -> jax.Array:
    return self.whole()[index]

  def _read(self, parameter) -> jax.Array:
    """A stored array, gathered where FSDP splits it: codes are fewer bytes than the matrix."""
    return shard(parameter[...], *(None if axis == 'embed' else axis for axis in parameter.axes))

  def whole(self) -> jax.Array:
    """The matrix, float32."""
    whole = self._rounded()
    if self.input_scale is None:
      return whole
    wide = self.input_scale[...]
    return whole / wide.reshape(*wide.shape, *[1] * (whole.ndim - wide.ndim))

  def _rounded(self) -> jax.Array:
    codes = self.form.unpack(self._read(self.packed), self.layout.axis)
    scale = self._spread(self._read(self.scale))
    offset = None if self.offset is None else self._spread(self._read(self.offset))
    return self.form.decode(codes, scale, offset)

  def _spread(self, scale: jax.Array) -> jax.Array:
    wide = self.layout.spread(scale)
    return shard(wide, *(None if axis == 'embed' else axis for axis in self.axes))

  def multiply(self, x: jax.Array, to: tuple[str | None, ...]) -> jax.Array:
    """x times the matrix, as a product of whole numbers where `activations` is 'int8'."""
    if self.activations is None:
      return project(x, self.whole(), self.axes, to, contract=self.inputs)
    if self.input_scale is not None:
      x = x / self.input_scale[...].astype(x.dtype)
    scale = self.scale[...].reshape(self.shape[self.inputs :])
    scale = shard(scale, *to[x.ndim - self.inputs :])  # as the result, which it multiplies
    return _int8_product(self.axes, to, self.inputs, x, self.packed[...], scale)

  def rows(self, index: jax.Array, dtype) -> jax.Array:
    """Rows of a table, of which only the codes of these tokens are looked up."""
    if self.layout.axis != 1:
      return super().rows(index, dtype)

    def stored_rows(parameter):
      return look_up(parameter[...], self.axes[0], index)

    packed = stored_rows(self.packed)
    codes = self.form.unpack(packed, packed.ndim - 1)
    repeat = functools.partial(jnp.repeat, repeats=self.layout.group, axis=-1)
    scale = repeat(stored_rows(self.scale))
    offset = None if self.offset is None else repeat(stored_rows(self.offset))
    return self.form.decode(codes, scale, offset).astype(dtype)


def _where_it_divides(axes: tuple, x: jax.Array) -> tuple:
  """Names of axes, with None where the mesh in use cannot split a stored array of this shape."""
  pairs = zip(axes, x.shape, strict=True)
  return tuple(axis if axis and size % axis_size(axis) == 0 else None for axis, size in pairs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _int8_product(axes, to, inputs, x, codes, scale):
  """x times (codes x scale), x rounded to int8 by token; codes int8 [inputs, outputs], scale [outputs]."""
  over = tuple(range(x.ndim - inputs, x.ndim))
  largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=over, keepdims=True)
  of_token = jnp.where(largest > 0, largest / 127, 1)
  rounded = jnp.round(x / of_token).astype(jnp.int8)
  y = project(rounded, codes, axes, to, contract=inputs, dtype=jnp.int32).astype(jnp.float32)
  of_token = of_token.reshape(*x.shape[: x.ndim - inputs], *[1] * scale.ndim)
  return (y * of_token * scale).astype(x.dtype)


def _int8_forward(axes, to, inputs, x, codes, scale):
  return _int8_product(axes, to, inputs, x, codes, scale), (x, codes, scale)


def _int8_backward(axes, to, inputs, residuals, dy):
  # Straight through the rounding of x: the gradient of the product with the matrix that the codes stand for.
  x, codes, scale = residuals

  def plain(x):
    matrix = codes.astype(jnp.float32) * scale
    return project(x, matrix, axes, to, contract=inputs)

  return jax.vjp(plain, x)[1](dy)[0], None, jnp.zeros_like(scale)


_int8_product.defvjp(_int8_forward, _int8_backward)


def bits_per_number(weight: Quantised) -> float:
  """The bits of a number of the matrix, with its share of scales and offsets."""
  arrays = (weight.packed, weight.scale, weight.offset, weight.input_scale)
  stored = [x for x in arrays if x is not None]
  size = sum(8 * math.prod(x.shape) * x.dtype.itemsize for x in stored)
  return size / (math.prod(weight.packed.shape) * weight.form.per_byte)


class BFloat16(Weight):
  """A plain matrix that is stored in bfloat16: half the bytes, and no scales."""

  def __init__(self, matrix: Matrix, *, rngs: nnx.Rngs):
    super().__init__(matrix)

    def drawn(*args, **options):
      # Drawn in float32, so that the numbers are those of the plain matrix, rounded.
      key, shape, dtype = args
      return matrix.init(key, shape, jnp.float32, **options).astype(dtype)

    self.packed = param(
      rngs,
      matrix.shape,
      matrix.axes,
      drawn,
      kind=matrix.kind,
      active=matrix.active,
      dtype=jnp.bfloat16,
    )

  def __getitem__(self, index) -> jax.Array:
    return self.packed[index]
