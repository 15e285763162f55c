"""Compiles programs in the background.

A run has three programs (init, step, evaluate), and XLA compiles each on a few cores only.
"""

import concurrent.futures
import os

import jax

from research.training import heap

# Programs are compiled in the order of their requests, at most one per core at once.
_compilers = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8), 'compiler')

# Options of XLA (experiments/speed/README.md). Level 3 makes compilation a sixth slower and the step no faster.
# Sums alone go to YNNPACK, so that products go to Eigen: they compile faster, and most are faster.
ON_A_CPU = {
  'xla_backend_optimization_level': 2,
  'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_REDUCE',
}


def jit(f, *arguments, **options):
  """Returns `jax.jit(f, **options)` and starts to compile it for `arguments`, under the mesh in use.

  A call waits for that compilation. A call with other shapes compiles then, as with `jax.jit`.

  Args:
    f: the function. It is traced before this returns, since tracing needs Python's only interpreter lock.
    *arguments: arguments of the first call: arrays, or shapes from `hosts.on_mesh`. Without any, nothing is
      compiled before the first call.
    **options: options of `jax.jit`.
  """
  if jax.default_backend() == 'cpu':
    options['compiler_options'] = ON_A_CPU
  jitted = jax.jit(f, **options)
  if not arguments:
    return jitted
  # jax caches the lowered program together with its executable, so the call below finds both.
  compiled = _compilers.submit(jitted.lower(*arguments).compile)
  called = False

  def call(*arguments):
    nonlocal called
    compiled.result()
    if not called and jax.default_backend() == 'cpu':
      heap.keep_freed_memory()
    called = True
    return jitted(*arguments)

  return call
