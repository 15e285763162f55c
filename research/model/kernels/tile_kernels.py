"""Attention tile by tile in Pallas kernels for TPUs: what splash attention, jax's own kernel, has not.

That is a bias by distance (`distance.py`), prefixes, sizes of heads that are no multiple of 128 or differ
between keys and values, lengths that are no multiple of a tile, and sequences of which a device has a part. The
forward kernel is FlashAttention-2's (Dao 2023, arXiv:2307.08691). The backward pass computes the weights again,
in one kernel for the gradient of queries and in one for that of keys and values.

Pallas is imported where a kernel is made: that takes a third of a second, and CPUs and GPUs need none.
"""

import jax
import jax.numpy as jnp

from research.model.kernels import distance
from research.model.kernels.dot_product import FLOOR
from research.model.kernels.tiles import NN, TN, At, Grid, Operands, Tiles, dot


def forward(
  tiles: Tiles, operands: Operands, at: At, dtype, so_far: tuple[jax.Array, jax.Array] | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns attention, [batch, heads, queries, head_dim of value], and the logarithms of the sums of weights.

  Args:
    tiles: the static side.
    operands: the arrays.
    at: the rows to work on, and where they are.
    dtype: that of the first result. The second is float32 [batch, heads, 1, queries]; a query that sees no key
      has zeros and a number below -1e28.
    so_far: the results for other keys, which are updated in place to those for all.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  query, value = operands.query, operands.value
  batch, heads, queries, _ = query.shape
  group = heads // operands.key.shape[1]
  fresh = so_far is None
  width = value.shape[3]

  def place(ahead, h, b, i, j):
    return b, h, jax.lax.div(h, group), i, tiles.key_tile(ahead, i, j, grid.counts[1])

  grid = Grid(tiles, operands, at, place)
  shape = (heads, grid.rows, *grid.counts)

  def kernel(at_ref, refs, saved, old, y_ref, log_ref, sums, top, total):
    i, j = pl.program_id(2), pl.program_id(3)
    ahead = at_ref[0]

    @pl.when(j == 0)
    def _():
      # What there is so far is a mean, so its weights add up to 1.
      sums[...] = jnp.zeros_like(sums) if fresh else old[0][...].T
      total[...] = jnp.full_like(total, 0 if fresh else 1)
      top[...] = jnp.full_like(top, FLOOR) if fresh else old[1][...]

    @pl.when(tiles.runs(ahead, i, j))
    def _():
      s, _ = tiles.logits(refs, ahead, i, j)
      new = jnp.maximum(top[...], jnp.max(s, axis=0, keepdims=True))
      weights = jnp.exp(s - new)
      keep = jnp.exp(top[...] - new)
      total[...] = total[...] * keep + jnp.sum(weights, axis=0, keepdims=True)
      top[...] = new
      v = refs.value[...]
      sums[...] = sums[...] * keep + dot(v, weights.astype(v.dtype), TN)

    @pl.when(j == shape[3] - 1)
    def _():
      n = jnp.maximum(total[...], 1e-30)
      y_ref[...] = (sums[...] / n).T.astype(y_ref.dtype)
      log_ref[...] = top[...] + jnp.log(n)

  out_shape = (
    jax.ShapeDtypeStruct((batch, heads, queries, width), dtype if fresh else so_far[0].dtype),
    jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
  )
  out_specs = (grid.rows_of_query(width), grid.numbers_of_query())
  scratch = [pltpu.VMEM((rows, tiles.block), jnp.float32) for rows in (width, 1, 1)]
  return _call(
    grid, kernel, shape, 'PPPA', (), so_far, out_shape, out_specs, scratch,
    name='attention_forward', products=(1, 1),
  )  # fmt: skip


def backward_query(
  tiles: Tiles,
  operands: Operands,
  at: At,
  saved,
  dtype,
  so_far: jax.Array | None = None,
  *,
  d_bias: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """Returns the gradients of the query and of the windows (if `d_bias`).

  Args:
    tiles: as in `forward`.
    operands: as in `forward`.
    at: as in `forward`.
    saved: dy [batch, heads, queries, head_dim of value], the logarithms of `forward`, and the sums of dy y over
      head_dim, float32 [batch, heads, 1, queries].
    dtype: that of the query's gradient.
    so_far: the query's gradient from other keys, which is updated in place.
    d_bias: whether the windows have a gradient.
  """
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  _, heads, _, head_dim = operands.query.shape
  group = heads // operands.key.shape[1]
  so_far = None if so_far is None else (so_far,)

  def place(ahead, h, b, i, j):
    return b, h, jax.lax.div(h, group), i, tiles.key_tile(ahead, i, j, grid.counts[1])

  grid = Grid(tiles, operands, at, place)
  shape = (heads, grid.rows, *grid.counts)

  def kernel(at_ref, refs, saved, old, dq_ref, dw_ref, dq):
    b, i, j = (pl.program_id(axis) for axis in (1, 2, 3))
    ahead = at_ref[0]

    @pl.when(j == 0)
    def _():
      dq[...] = jnp.zeros_like(dq) if old is None else old[0][...].T

    if d_bias:

      @pl.when((b == 0) & (i == 0) & (j == 0))
      def _():
        dw_ref[...] = jnp.zeros_like(dw_ref)

    @pl.when(tiles.runs(ahead, i, j))
    def _():
      _, ds, capped = tiles.gradients(refs, saved, ahead, i, j)
      if d_bias:
        dw_ref[i - j + shape[3] - 1] += distance.gathered(ds)
      k = refs.key[...]
      dq[...] += dot(k, tiles.uncapped(ds, capped).astype(k.dtype), TN)

    @pl.when(j == shape[3] - 1)
    def _():
      dq_ref[...] = dq[...].T.astype(dq_ref.dtype)

  out_shape = [jax.ShapeDtypeStruct(operands.query.shape, dtype), None]
  out_specs = [grid.rows_of_query(head_dim), None]
  if d_bias:
    sums = (operands.windows.shape[1], distance.SUBLANES, 2 * tiles.block)
    out_shape[1] = jax.ShapeDtypeStruct((heads, *sums), jnp.float32)
    out_specs[1] = pl.BlockSpec((None, *sums), lambda h, *_: (h, 0, 0, 0))
  semantics = 'PAAA' if d_bias else 'PPPA'
  dq, sums = _call(
    grid, kernel, shape, semantics, saved, so_far, tuple(out_shape), tuple(out_specs),
    [pltpu.VMEM((head_dim, tiles.block), jnp.float32)],
    name='attention_backward_query', products=(2, 1),
  )  # fmt: skip
  return dq, distance.finished(sums) if d_bias else None


def backward_keys(
  tiles: Tiles,
  operands: Operands,
  at: At,
  saved,
  dtype,
  so_far: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of keys and values. The arguments are those of `backward_query`."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  _, heads, _, head_dim = operands.query.shape
  kv_heads, width = operands.key.shape[1], operands.value.shape[3]
  group = heads // kv_heads

  def place(ahead, h, b, j, g, i):
    return b, h * group + g, h, tiles.query_tile(ahead, i, j, grid.counts[0]), j

  grid = Grid(tiles, operands, at, place)
  shape = (kv_heads, grid.rows, grid.counts[1], group, grid.counts[0])

  def kernel(at_ref, refs, saved, old, dk_ref, dv_ref, dk, dv):
    j, g, i = (pl.program_id(axis) for axis in (2, 3, 4))
    ahead = at_ref[0]

    @pl.when((g == 0) & (i == 0))
    def _():
      dk[...] = jnp.zeros_like(dk) if old is None else old[0][...]
      dv[...] = jnp.zeros_like(dv) if old is None else old[1][...]

    @pl.when(tiles.runs(ahead, i, j))
    def _():
      weights, ds, capped = tiles.gradients(refs, saved, ahead, i, j)
      q, dy = refs.query[...], saved[0][...]
      dv[...] += dot(weights.astype(dy.dtype), dy, NN)
      dk[...] += dot(tiles.uncapped(ds, capped).astype(q.dtype), q, NN)

    @pl.when((g == shape[3] - 1) & (i == shape[4] - 1))
    def _():
      dk_ref[...] = dk[...].astype(dk_ref.dtype)
      dv_ref[...] = dv[...].astype(dv_ref.dtype)

  arrays = (operands.key, operands.value)
  return _call(
    grid, kernel, shape, 'PPPAA', saved, so_far, tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays),
    (grid.rows_of_key(head_dim), grid.rows_of_key(width)),
    [pltpu.VMEM((tiles.block, size), jnp.float32) for size in (head_dim, width)],
    name='attention_backward_keys', products=(2, 2),
  )  # fmt: skip


def _call(
  grid, kernel, steps, semantics, saved, so_far, out_shape, out_specs, scratch, *, name, products
):
  """Runs a kernel: in parallel (P) along some axes of the steps, and in order (A) along the others."""
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as pltpu

  kinds = {'P': 'parallel', 'A': 'arbitrary'}
  inputs = (grid.operands, saved, so_far)
  in_place = 0 if so_far is None else len(so_far)
  first = 1 + len(jax.tree.leaves(inputs)) - in_place  # after the numbers of `At`
  by_rows = (out_shape[:1], so_far) if name == 'attention_backward_query' else (out_shape, so_far)
  once = 'key' if name == 'attention_backward_keys' else 'query'
  return pl.pallas_call(
    kernel,
    out_shape=out_shape,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=steps,
      in_specs=(
        grid.inputs(),
        grid.saved(saved) if saved else (),
        out_specs[:in_place] if in_place else None,
      ),
      out_specs=out_specs,
      scratch_shapes=scratch,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=tuple(kinds[letter] for letter in semantics)
    ),
    cost_estimate=grid.cost(saved, by_rows, products, once=once),
    input_output_aliases={first + i: i for i in range(in_place)},
    interpret=grid.tiles.interpret,
    name=name,
  )(grid.at.numbers, *inputs)
