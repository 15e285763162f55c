"""The batched fit beside a plain scipy one: CPU seconds, and whether any optimum is worse.

The job is the replication's of Besiroglu et al. 2024: Chinchilla's law by L-BFGS-B from Hoffmann et al.'s 4500
starts, then 4000 bootstrap fits from the optimum, one thread, finite differences (`--gradient` gives scipy the
exact gradient, which the replication did not). Ours starts from the law's own 243 starts; `--hoffmann` gives
it the 4500 as well.

  python experiments/speed/fit.py --results=chinchilla_fig4.csv --drop_highest=5

Without --results the rows are made up, 240 of them with like noise. `cold` counts imports and compilation.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
START = time.process_time()

import numpy as np  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))


def rows(flags):
  from research.scaling import rows as table

  if flags.results:
    seen = table.observe(table.read_table(flags.results))
    keep = np.sort(np.argsort(seen.loss)[: len(seen) - flags.drop_highest])
    return seen.params[keep], seen.tokens[keep], seen.loss[keep]
  rng = np.random.default_rng(0)
  n = np.exp(rng.uniform(np.log(5e7), np.log(1.6e10), 240))
  d = np.exp(rng.uniform(np.log(6e18), np.log(3e21), 240)) / (6 * n)
  loss = (1.82 + 480 / n**0.347 + 2100 / d**0.367) * np.exp(rng.laplace(scale=4e-3, size=240))
  return n, d, loss


def scipy_fits(n, d, loss, starts, draws, gradient):
  """(best objective, best parameters, each replicate's objective)."""
  from scipy.optimize import minimize
  from scipy.special import logsumexp

  x = np.log(n)
  z = np.log(d)

  def objective(p, x, z, y):
    a, b, e, alpha, beta = p
    terms = np.stack([a - alpha * x, b - beta * z, np.full_like(x, e)])
    r = logsumexp(terms, axis=0) - y
    size = np.abs(r)
    value = np.where(size <= 1e-3, r * r / 2, 1e-3 * (size - 5e-4)).sum()
    if not gradient:
      return value
    share = np.exp(terms - (r + y)) * np.clip(r, -1e-3, 1e-3)
    slopes = [*share.sum(1), -(share[0] * x).sum(), -(share[1] * z).sum()]
    return value, np.array(slopes)

  def fit(start, *data):
    return minimize(objective, start, args=data, method='L-BFGS-B', jac=gradient or None)

  y = np.log(loss)
  ends = [fit(p, x, z, y) for p in starts]
  best = min(ends, key=lambda r: r.fun)
  success = np.mean([r.success for r in ends])
  reached = np.mean([r.fun < best.fun * (1 + 1e-4) for r in ends])
  print(
    f'  scipy: {success:.0%} of starts report success, {reached:.1%} are within 1e-4 of the best',
    flush=True,
  )
  replicates = [fit(best.x, x[i], z[i], y[i]).fun for i in draws]
  return best.fun, best.x, np.array(replicates)


def batched_fits(n, d, loss, starts, draws):
  from research.scaling import bootstrap, law_fit, laws

  """(the fit of Chinchilla's law, its bootstrap)."""
  data = {'params': n, 'tokens': d}
  fitted = law_fit.fit(laws.Chinchilla(), data, loss, starts=starts, check=False)
  return fitted, bootstrap.bootstrap(fitted, 'pairs', draws=draws)


def main():
  p = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  p.add_argument('--results', help='a table with N, C or D, and the loss')
  p.add_argument('--drop_highest', type=int, default=0)
  p.add_argument(
    '--starts', type=int, default=4500, help="how many of Hoffmann's starts scipy runs"
  )
  p.add_argument('--bootstraps', type=int, default=4000)
  p.add_argument('--gradient', action='store_true', help='give scipy the exact gradient')
  p.add_argument('--hoffmann', action='store_true', help='give ours the 4500 starts too')
  flags = p.parse_args()
  n, d, loss = rows(flags)
  from research.scaling import laws

  # The replication's generator and seed.
  random = np.random.RandomState(42)
  draws = np.array([random.choice(len(n), len(n)) for _ in range(flags.bootstraps)])
  grid = laws.hoffmann_starts()
  ours = grid if flags.hoffmann else 'grid'
  fitted, spread = batched_fits(n, d, loss, ours, draws)
  cold = time.process_time() - START
  seconds = []
  for _ in range(3):
    start = time.process_time()
    fitted, spread = batched_fits(n, d, loss, ours, draws)
    seconds.append(time.process_time() - start)
  warm = float(np.median(seconds))
  print(f'batched: {cold:.2f} s of CPU cold, {warm:.2f} s warm (median of 3)', flush=True)
  print(
    f'  objective {fitted.objective:.12g}, {len(fitted.minima)} distinct minima from {fitted.starts} starts'
  )
  errors = ', '.join(f'{k} {v:.4g}' for k, v in spread.standard_errors().items())
  print(f'  standard errors from {flags.bootstraps} bootstrap fits: {errors}', flush=True)

  order = np.random.default_rng(0).permutation(4500)[: flags.starts]
  stack = np.stack(
    [np.log(grid['A']), np.log(grid['B']), np.log(grid['E']), grid['alpha'], grid['beta']], axis=1
  )
  start = time.process_time()
  best, _, theirs = scipy_fits(n, d, loss, stack[order], draws, flags.gradient)
  plain = time.process_time() - start
  print(
    f'scipy:   {plain:.1f} s of CPU for {flags.starts} starts and {flags.bootstraps} bootstrap fits'
  )
  print(f'  objective {best:.12g}')
  worse = (spread.objective > theirs * (1 + 1e-9)).sum()
  print(f'ratio: {plain / warm:.0f}x warm, {plain / cold:.1f}x cold')
  print(
    f'ours is worse in {worse} of {len(theirs)} replicates, lower by more than 1e-6 in ', end=''
  )
  print((spread.objective < theirs * (1 - 1e-6)).sum())
  print(f'best objective, ours / scipy - 1: {fitted.objective / best - 1:.2e}')


if __name__ == '__main__':
  main()
