"""Solves many small robust regressions at once, in float64: one compiled program for all starts and replicates.

Each lane solves one problem of a queue. When its problem has converged, the lane writes the answer and takes
the next problem, so that no lane waits for the slowest. A step is Newton's on the exact Hessian where that is
positive definite. Otherwise it is a step of iteratively reweighted least squares (IRLS), whose matrix bounds
the curvature of the Huber loss from above.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import precise
from research.scaling.objective import TINY, Point, expand

# Rows that fit into one bucket of compiled shapes; more are solved at their own shape.
_MOST_PADDED_ROWS = 2**14
# Values of y and w up to which each problem gets a row of them, copied where it shares one.
_MOST_COPIED_VALUES = 2**24


def _solve_positive(matrix, vector):
  """(solution [free], whether `matrix` [free, free] is positive definite), by Gauss-Jordan elimination.

  A symmetric matrix is positive definite if and only if all pivots are positive without an exchange of rows.
  The elimination is written out because a LAPACK call for each 5 x 5 lane costs more than the rest of a step.
  """
  n = vector.shape[0]
  table = jnp.concatenate([matrix, vector[:, None]], axis=1)
  # A pivot that cancellation left below rounding error counts as zero.
  floor = 1e-13 * jnp.abs(jnp.diagonal(matrix)) + TINY
  good = jnp.bool_(True)
  for k in range(n):
    pivot = table[k, k]
    good = good & (pivot > floor[k])
    row = table[k] / jnp.where(jnp.abs(pivot) > TINY, pivot, 1.0)
    table = table - (table[:, k] - jnp.eye(n)[k])[:, None] * row
  return table[:, n], good


class _Lane(NamedTuple):
  """The state of one problem while it is solved."""

  index: jax.Array  # which problem of the queue
  z: jax.Array
  point: Point
  damping: jax.Array
  careful: jax.Array  # the last Newton step failed: take an IRLS step
  steps: jax.Array


def _propose(lane: _Lane, low, high):
  """(the trial z, the decrease that its quadratic model promises, whether the step is Newton's)."""
  point, z = lane.point, lane.z
  # A coordinate at a bound whose descent direction leads out of the bounds stays there for this step.
  blocked = ((z <= low) & (point.gradient > 0)) | ((z >= high) & (point.gradient < 0))
  gradient = jnp.where(blocked, 0.0, point.gradient)
  mask = ~blocked[:, None] & ~blocked[None, :]
  eye = jnp.eye(z.shape[0])
  scale = jnp.maximum(jnp.diagonal(point.irls), 1e-12 * jnp.trace(point.irls) + TINY)

  def system(matrix):
    # Marquardt's damping, in proportion to the diagonal: a step does not depend on a parameter's scale.
    return jnp.where(mask, matrix + lane.damping * jnp.diag(scale), eye)

  newton, definite = _solve_positive(system(point.newton), -gradient)
  # The ridge keeps the IRLS matrix, which is only semidefinite, from a pivot of zero.
  irls, _ = _solve_positive(system(point.irls) + 1e-14 * jnp.diag(scale), -gradient)
  use_newton = definite & ~lane.careful & jnp.isfinite(newton).all()
  step = jnp.where(use_newton, newton, jnp.where(jnp.isfinite(irls), irls, 0.0))
  # Coordinates are logarithms or of order one: the quadratic model says nothing about a longer step than 2.
  trial = jnp.clip(z + jnp.clip(step, -2.0, 2.0), low, high)
  return trial, -(gradient * step).sum(), use_newton


def _advance(problem, lane, y, w, data, low, high, delta, tau):
  """(the lane after one step, whether its problem is solved). A step that does not improve is undone."""
  trial, promise, newton = _propose(lane, low, high)
  point = expand(problem, trial, y, w, data, delta, tau)
  # A lane whose start was not evaluated yet; see `_at_start`.
  fresh = jnp.isinf(lane.point.f)
  better = (point.f < lane.point.f) & jnp.isfinite(point.f) & jnp.isfinite(point.gradient).all()

  def pick(new, old):
    return jax.tree.map(functools.partial(jnp.where, better), new, old)

  # A failed Newton step is tried again as an IRLS step; only if that fails too the damping rises.
  eased = jnp.where(lane.damping < 1e-7, 0.0, lane.damping * 0.1)
  stiffer = jnp.where(newton, lane.damping, jnp.maximum(lane.damping * 8, 1e-4))
  moved = jnp.abs(trial - lane.z).max()
  # Converged: no more to gain than rounding, or no step of any length improves. A step that failed although it
  # promised a little more than rounding met the noise of f: hence the second, larger threshold.
  gain = jnp.where(better, 1e-15, 1e-11) * lane.point.f
  small = (promise <= gain) | (moved <= 1e-12) | (lane.point.f < 1e-28)
  done = jnp.where(fresh, ~better, small | (stiffer > 1e10))
  advanced = _Lane(
    lane.index,
    pick(trial, lane.z),
    pick(point, lane.point),
    jnp.where(fresh, lane.damping, jnp.where(better, eased, stiffer)),
    ~better & newton,
    lane.steps + 1,
  )
  return advanced, done


def _at_start(index, z) -> _Lane:
  """Lanes at starts `z` [lanes, free] that are not evaluated yet.

  The gradient is zero, so that the first step has no length and only evaluates. A lane can then be loaded
  without a second copy of `expand` in the compiled program.
  """
  lanes, free = z.shape
  eye = jnp.broadcast_to(jnp.eye(free), (lanes, free, free))
  unknown = Point(jnp.full(lanes, jnp.inf), jnp.zeros((lanes, free)), eye, eye)
  flags = jnp.zeros(lanes, bool)
  return _Lane(index, z, unknown, jnp.full(lanes, 1e-3), flags, jnp.zeros(lanes, int))


# Without XLA's fusion emitters this compiles in three quarters of the time and runs a tenth slower, which pays
# because most fits are compiled once and run once.
@functools.partial(
  jax.jit,
  static_argnames=('problem', 'lanes', 'max_steps'),
  compiler_options={'xla_cpu_use_fusion_emitters': False},
)
def _run(problem, data, z0, count, rows, y, w, delta, tau, low, high, *, lanes, max_steps):
  """Solves the first `count` problems of the queue; see `solve`, which pads the queue to z0's length.

  The state of the loop: the lanes, the y and w [lanes, rows] of their problems, the next problem of the queue,
  and the answers [queue, ...].
  """
  size, free = z0.shape

  @jax.vmap
  def step(lane, y, w):
    return _advance(problem, lane, y, w, data, low, high, delta, tau)

  def load(index):
    safe = jnp.minimum(index, count - 1)
    return _at_start(index, z0[safe]), y[rows[safe, 0]], w[rows[safe, 1]]

  def body(state):
    lane, ys, ws, following, out = state
    lane, done = step(lane, ys, ws)
    done = done | (lane.steps >= max_steps)
    # A lane that has nothing to write, or no problem, writes beyond the end, where JAX drops it.
    slot = jnp.where(done & (lane.index < count), lane.index, size)
    answer = (lane.z, lane.point.f, lane.steps, lane.point.newton, lane.point.gradient)
    out = tuple(a.at[slot].set(b, mode='drop') for a, b in zip(out, answer, strict=True))
    # The lanes that are free take the next problems in their order.
    index = jnp.where(done, following + jnp.cumsum(done) - 1, lane.index)

    def pick(new, old):
      return jnp.where(done.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    def refill(_):
      return jax.tree.map(pick, load(index), (lane, ys, ws))

    def leave(_):
      return lane, ys, ws

    # Most steps end no problem; the gathers of `load` would cost as much as the step.
    lane, ys, ws = jax.lax.cond(done.any(), refill, leave, None)
    return lane, ys, ws, following + done.sum(), out

  def unfinished(state):
    return (state[0].index < count).any()

  first = jnp.arange(lanes)
  out = (
    jnp.zeros((size, free)),
    jnp.full(size, jnp.inf),
    jnp.full(size, max_steps),
    jnp.zeros((size, free, free)),
    jnp.zeros((size, free)),
  )
  return jax.lax.while_loop(unfinished, body, (*load(first), jnp.asarray(lanes), out))[-1]


class Solution(NamedTuple):
  """Where each problem of a queue ended."""

  z: np.ndarray  # [problems, free]
  objective: np.ndarray  # [problems]; inf where the start itself could not be evaluated
  steps: np.ndarray  # [problems]; max_steps where it did not converge
  hessian: np.ndarray  # [problems, free, free]
  gradient: np.ndarray  # [problems, free]


def solve(problem, data, z0, y, w, *, rows=None, delta=1e-3, tau=0.5, max_steps=300) -> Solution:
  """Minimises every problem of a queue. JAX's global precision setting stays as it was.

  Args:
    data: the rows, as `fit_data.make_data` gives them.
    z0: starts [problems, free]; a start outside the bounds moves to the nearest bound.
    y: targets [targets, rows]: the observed outputs, or their logarithms.
    w: weights [weightings, rows].
    rows: which target and which weighting each problem has [problems, 2]; None for the first of each.
    delta, tau: of the loss, see `objective.rho`.
    max_steps: after which a problem counts as not converged.
  """
  z0 = np.atleast_2d(np.asarray(z0, np.float64))
  y, w = (np.atleast_2d(np.asarray(a, np.float64)) for a in (y, w))
  if rows is None:
    rows = np.zeros((len(z0), 2), int)
  low, high = problem.bounds()
  z0 = np.clip(z0, low, high)
  data, y, w, rows, size = _share_shapes(data, y, w, rows, len(z0))
  # Few lanes: a working set in cache, and little idle work while the last problems finish.
  lanes = int(np.clip(2**11 // y.shape[1], 4, 64))
  z0_padded = _repeat_first(z0, size - len(z0))
  rows = _repeat_first(rows, size - len(rows))
  with precise():
    out = _run(
      problem, data, z0_padded, len(z0), rows, y, w, float(delta), float(tau), low, high,
      lanes=lanes, max_steps=max_steps,
    )  # fmt: skip
    out = jax.device_get(out)
  return Solution(*(a[: len(z0)] for a in out))


def _share_shapes(data, y, w, rows, problems):
  """(data, y, w, rows, the size of the queue), padded to a few sizes: most calls then share a compiled program.

  Rows that are added have a weight of 0.
  """
  n = y.shape[1]
  size = padded_size(problems, 1024, 4)
  if n > _MOST_PADDED_ROWS:
    return data, y, w, rows, size
  extra = _missing_rows(n)
  # Repeated rows are valid inputs, so that no NaN arises which a weight of 0 would not cancel.
  data = _with_rows(data, extra)
  y = np.pad(y, ((0, 0), (0, extra)), constant_values=y[0, 0])
  w = np.pad(w, ((0, 0), (0, extra)))
  if size * (n + extra) <= _MOST_COPIED_VALUES:
    # Each problem gets its own row of y and w, so that starts and replicates share one shape.
    y = _repeat_first(y[rows[:, 0]], size - problems)
    w = _repeat_first(w[rows[:, 1]], size - problems)
    rows = np.stack([np.arange(problems)] * 2, axis=1)
  return data, y, w, rows, size


def padded_size(count: int, least: int, factor: int) -> int:
  """The first of least, least x factor, least x factor^2, ... that holds `count`."""
  size = least
  while size < count:
    size *= factor
  return size


def _missing_rows(n: int) -> int:
  """How many rows to add to `n`: two sizes for each doubling of n, but no step below 16 rows."""
  step = max(16, (1 << max(n - 1, 1).bit_length()) >> 2)
  return -n % step if n <= _MOST_PADDED_ROWS else 0


def _with_rows(data: dict, count: int) -> dict:
  """The data with `count` copies of its first row at the end."""
  inputs = {name: _repeat_first(values, count) for name, values in data['x'].items()}
  return {**data, 'x': inputs, 'ones': _repeat_first(data['ones'], count)}


def predictions(problem, data: dict, z: np.ndarray) -> np.ndarray:
  """The law at many points `z` [points, free] of the free coordinates: [points, rows]."""
  points, n = len(z), len(data['ones'])
  data = _with_rows(data, _missing_rows(n))
  padded = _repeat_first(z, padded_size(points, 64, 4) - points)
  with precise():
    predicted = np.asarray(_predictions(problem, data, padded))
  return predicted[:points, :n]


def with_slopes(problem, data: dict, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The law at one point `z` [free], [rows], and its derivatives there, [rows, free]."""
  n = len(data['ones'])
  data = _with_rows(data, _missing_rows(n))
  with precise():
    predicted, slopes = _with_slopes(problem, data, np.asarray(z, np.float64))
  return np.asarray(predicted)[:n], np.asarray(slopes)[:n]


# One program for each of a few shapes: JAX's operations one by one compile each for every number of rows.
@functools.partial(jax.jit, static_argnames='problem')
def _predictions(problem, data, z):
  return jax.vmap(problem.predict, in_axes=(0, None))(z, data)


@functools.partial(jax.jit, static_argnames='problem')
def _with_slopes(problem, data, z):
  return problem.with_slopes(z, data)


def _repeat_first(array: np.ndarray, count: int) -> np.ndarray:
  """The array with `count` more copies of its first row at the end."""
  return np.concatenate([array, np.repeat(array[:1], count, axis=0)])
