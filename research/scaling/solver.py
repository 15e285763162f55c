"""Many small robust regressions at once: one compiled program, float64, every start and every replicate.

Each lane runs one problem of a queue. A lane whose problem has converged writes its answer and takes the
next one, so nobody waits for the slowest. A step is Newton on the exact Hessian where that is positive
definite, else iteratively reweighted least squares (IRLS), whose matrix majorizes the Huber loss.
"""

import dataclasses
import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import Law, precise

_TINY = 1e-300
LOSSES = ('huber', 'l2', 'l1')


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is minimised: sum_i w_i rho(r_i), r the log or linear residual of `law`.

  `fixed`: (name, natural value) pairs; `tied`: (name, other name) pairs. The other parameters are free.
  """

  law: Law
  loss: str = 'huber'
  residuals: str = 'log'
  fixed: tuple[tuple[str, float], ...] = ()
  tied: tuple[tuple[str, str], ...] = ()

  @property
  def free(self) -> tuple[str, ...]:
    constrained = {name for name, _ in self.fixed} | {name for name, _ in self.tied}
    return tuple(name for name in self.law.parameters if name not in constrained)

  def values(self, z, center, exp=jnp.exp) -> dict:
    """Free coordinates [free, ...] -> every parameter's natural value [...]."""
    return self.law.natural(
      dict(zip(self.free, z, strict=True)), center, exp, self.fixed, self.tied
    )

  def predict(self, z, data):
    """The law at free coordinates z [free] -> [rows]."""
    values = self.values(z, data['center'])
    # A parameter meets the rows in a product with a column of ones, not a broadcast: its gradient is
    # then a dot, which XLA on CPUs vectorises, and not a sum, which it does not (2x on the Hessian).
    values = {name: data['ones'] @ jnp.reshape(v, 1) for name, v in values.items()}
    return self.law.predict(types.SimpleNamespace(**values), types.SimpleNamespace(**data['x']))

  def bounds(self) -> tuple[np.ndarray, np.ndarray]:
    parameters = [self.law.parameters[name] for name in self.free]
    return np.array([p.low for p in parameters]), np.array([p.high for p in parameters])


def rho(loss: str, r, delta, tau):
  """(rho, rho', rho'', IRLS weight) of residuals r.

  Huber: r^2/2 within delta, delta (|r| - delta/2) outside; l2: r^2/2. `l1` is solved as Huber with a
  vanishing delta (see fits.py). tau != 1/2 weighs r < 0 (a prediction below the data) by 2 tau and
  r > 0 by 2 (1 - tau): the asymmetric loss whose minimum is an expectile or, with l1, a quantile.
  """
  side = jnp.where(r < 0, 2 * tau, 2 * (1 - tau))
  if loss == 'l2':
    return side * r * r / 2, side * r, side, side
  size = jnp.abs(r)
  inside = size <= delta
  value = jnp.where(inside, r * r / 2, delta * (size - delta / 2))
  slope = jnp.where(inside, r, delta * jnp.sign(r))
  weight = jnp.where(inside, 1.0, delta / jnp.maximum(size, _TINY))
  return side * value, side * slope, side * inside, side * weight


class _Point(NamedTuple):
  f: jax.Array
  gradient: jax.Array
  newton: jax.Array  # the Hessian
  irls: jax.Array  # J^T W J, positive semidefinite


def _expand(problem: Problem, z, y, w, data, delta, tau) -> _Point:
  """Value and derivatives of sum_i w_i rho(r_i); y is the observed loss, or its logarithm."""
  predict = lambda z: problem.predict(z, data)
  m = predict(z)
  jacobian = jax.jacfwd(predict)(z)
  log = problem.residuals == 'log'
  safe = jnp.maximum(m, _TINY)
  r = jnp.log(safe) - y if log else m - y
  value, slope, curve, weight = rho(problem.loss, r, delta, tau)
  force = w * slope
  curve, pull = w * curve, force
  if log:  # d2 ln m = d2 m / m - (d ln m)(d ln m)^T
    jacobian, curve, pull = jacobian / safe[:, None], curve - force, force / safe
  pull = jax.lax.stop_gradient(pull)
  bend = jax.jacfwd(jax.grad(lambda z: pull @ predict(z)))(z)
  square = lambda c: jnp.einsum('ni,nj->ij', jacobian * c[:, None], jacobian)
  # A law that goes negative has no log residual there: such a step is refused, such a start dropped.
  total = jnp.where(log & (m <= 0).any(), jnp.inf, w @ value)
  return _Point(total, force @ jacobian, square(curve) + bend, square(w * weight))


def _solve_positive(matrix, vector):
  """(solution, was it positive definite): elimination without pivots, whose pivots are then all positive.

  Written out because a LAPACK call for each 5 x 5 lane costs more than the rest of a step.
  """
  n = vector.shape[0]
  table = jnp.concatenate([matrix, vector[:, None]], axis=1)
  floor = 1e-13 * jnp.abs(jnp.diagonal(matrix)) + _TINY
  good = jnp.bool_(True)
  for k in range(n):
    pivot = table[k, k]
    good = good & (pivot > floor[k])
    row = table[k] / jnp.where(jnp.abs(pivot) > _TINY, pivot, 1.0)
    table = table - (table[:, k] - jnp.eye(n)[k])[:, None] * row
  return table[:, n], good


class _Lane(NamedTuple):
  index: jax.Array  # which problem of the queue
  z: jax.Array
  point: _Point
  damping: jax.Array
  careful: jax.Array  # the last Newton step failed: take an IRLS step
  steps: jax.Array


def _propose(lane: _Lane, low, high):
  """A trial z, the decrease that its quadratic model promises, and whether the step was Newton's."""
  point, z = lane.point, lane.z
  # Coordinates pushed against a bound stay there for this step.
  blocked = ((z <= low) & (point.gradient > 0)) | ((z >= high) & (point.gradient < 0))
  gradient = jnp.where(blocked, 0.0, point.gradient)
  mask = ~blocked[:, None] & ~blocked[None, :]
  eye = jnp.eye(z.shape[0])
  scale = jnp.maximum(jnp.diagonal(point.irls), 1e-12 * jnp.trace(point.irls) + _TINY)
  system = lambda m: jnp.where(mask, m + lane.damping * jnp.diag(scale), eye)
  newton, definite = _solve_positive(system(point.newton), -gradient)
  irls, _ = _solve_positive(system(point.irls) + 1e-14 * jnp.diag(scale), -gradient)
  use_newton = definite & ~lane.careful & jnp.isfinite(newton).all()
  step = jnp.where(use_newton, newton, jnp.where(jnp.isfinite(irls), irls, 0.0))
  trial = jnp.clip(z + jnp.clip(step, -2.0, 2.0), low, high)
  return trial, -(gradient * step).sum(), use_newton


def _advance(problem, lane, y, w, data, low, high, delta, tau):
  trial, promise, newton = _propose(lane, low, high)
  point = _expand(problem, trial, y, w, data, delta, tau)
  fresh = jnp.isinf(lane.point.f)
  better = (point.f < lane.point.f) & jnp.isfinite(point.f) & jnp.isfinite(point.gradient).all()
  pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(better, a, b), new, old)
  eased = jnp.where(lane.damping < 1e-7, 0.0, lane.damping * 0.1)
  stiffer = jnp.where(newton, lane.damping, jnp.maximum(lane.damping * 8, 1e-4))
  moved = jnp.abs(trial - lane.z).max()
  # Converged: nothing left to gain beyond rounding, or no step of any length improves.
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
  """Lanes whose first step is of length zero and only evaluates: no second copy of the program to "
  "load one."""
  lanes, free = z.shape
  eye = jnp.broadcast_to(jnp.eye(free), (lanes, free, free))
  unknown = _Point(jnp.full(lanes, jnp.inf), jnp.zeros((lanes, free)), eye, eye)
  flags = jnp.zeros(lanes, bool)
  return _Lane(index, z, unknown, jnp.full(lanes, 1e-3), flags, jnp.zeros(lanes, int))


# Without XLA's fusion emitters this compiles in three quarters of the time and runs a tenth slower:
# most fits are compiled once and run once.
@functools.partial(
  jax.jit,
  static_argnames=('problem', 'lanes', 'max_steps'),
  compiler_options={'xla_cpu_use_fusion_emitters': False},
)
def _run(problem, data, z0, count, rows, y, w, delta, tau, low, high, *, lanes, max_steps):
  size, free = z0.shape
  step = jax.vmap(lambda lane, y, w: _advance(problem, lane, y, w, data, low, high, delta, tau))

  def load(index):
    safe = jnp.minimum(index, count - 1)
    return _at_start(index, z0[safe]), y[rows[safe, 0]], w[rows[safe, 1]]

  def body(state):
    lane, ys, ws, following, out = state
    lane, done = step(lane, ys, ws)
    done = done | (lane.steps >= max_steps)
    slot = jnp.where(done & (lane.index < count), lane.index, size)
    answer = (lane.z, lane.point.f, lane.steps, lane.point.newton, lane.point.gradient)
    out = tuple(a.at[slot].set(b, mode='drop') for a, b in zip(out, answer, strict=True))
    index = jnp.where(done, following + jnp.cumsum(done) - 1, lane.index)

    def refill(_):
      pick = lambda new, old: jnp.where(done.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)
      return jax.tree.map(pick, load(index), (lane, ys, ws))

    lane, ys, ws = jax.lax.cond(done.any(), refill, lambda _: (lane, ys, ws), None)
    return lane, ys, ws, following + done.sum(), out

  first = jnp.arange(lanes)
  out = (
    jnp.zeros((size, free)),
    jnp.full(size, jnp.inf),
    jnp.full(size, max_steps),
    jnp.zeros((size, free, free)),
    jnp.zeros((size, free)),
  )
  unfinished = lambda state: (state[0].index < count).any()
  return jax.lax.while_loop(unfinished, body, (*load(first), jnp.asarray(lanes), out))[-1]


class Solution(NamedTuple):
  z: np.ndarray  # [problems, free]
  objective: np.ndarray  # [problems]; inf where the start itself could not be evaluated
  steps: np.ndarray  # [problems]; max_steps where it did not converge
  hessian: np.ndarray  # [problems, free, free]
  gradient: np.ndarray  # [problems, free]


def solve(problem, data, z0, y, w, *, rows=None, delta=1e-3, tau=0.5, max_steps=300) -> Solution:
  """Minimises every problem of a queue.

  z0 [problems, free] starts; y [targets, rows], w [weightings, rows]; `rows` [problems, 2] says which
  target and which weighting each problem uses (the first of each by default). jax's global precision
  setting is left as it was.
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
  pad = lambda a: np.concatenate([a, np.repeat(a[:1], size - len(a), axis=0)])
  with precise():
    out = _run(
      problem,
      data,
      pad(z0),
      len(z0),
      pad(rows),
      y,
      w,
      float(delta),
      float(tau),
      low,
      high,
      lanes=lanes,
      max_steps=max_steps,
    )
    out = jax.device_get(out)
  return Solution(*(a[: len(z0)] for a in out))


def _share_shapes(data, y, w, rows, problems):
  """Pads rows (with weight 0) and queues to a few sizes, so that most calls share one compiled program."""
  n = y.shape[1]
  size = 1024
  while size < problems:
    size *= 4
  if n > 2**14:
    return data, y, w, rows, size
  step = max(16, 1 << (max(n - 1, 1).bit_length() - 2))
  extra = -n % step
  more = lambda a: np.concatenate([a, np.repeat(a[:1], extra, axis=0)])
  data = {**data, 'x': {k: more(v) for k, v in data['x'].items()}, 'ones': more(data['ones'])}
  wide = lambda a, fill: np.concatenate([a, np.full((len(a), extra), fill)], axis=1)
  y, w = wide(y, y[0, 0]), wide(w, 0.0)
  if size * (n + extra) <= 2**24:
    # Every problem brings its own y and w, be it a start or a replicate.
    y, w = y[rows[:, 0]], w[rows[:, 1]]
    grow = lambda a: np.concatenate([a, np.broadcast_to(a[:1], (size - len(a), a.shape[1]))])
    y, w, rows = grow(y), grow(w), np.stack([np.arange(problems)] * 2, axis=1)
  return data, y, w, rows, size
