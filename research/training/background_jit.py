"""Programs that are compiled in the background: a run has three, and XLA compiles each on few cores."""

import concurrent.futures
import os

import jax

# Those that were asked for first are first: as many at once as there are cores to compile on.
_compilers = concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 8), 'compiler')


def jit(f, *arguments, **options):
  """`jax.jit(f, **options)`, which is being compiled for `arguments` from now on, under the mesh in use.

  Calls wait for that. Those with other shapes are compiled when they come, as ever.

  Args:
    f: a function. It is traced at once: Python does one thing at a time.
    *arguments: as it will be called first: arrays, or shapes `on_mesh`. Without any it is compiled when called.
    **options: of `jax.jit`.
  """
  if jax.default_backend() == 'cpu':
    # At the third level compiling takes a sixth longer, and the step is no faster (experiments/speed).
    options['compiler_options'] = {'xla_backend_optimization_level': 2}
  jitted = jax.jit(f, **options)
  if not arguments:
    return jitted
  # jax keeps the lowered program, and with it what it is compiled to, for the call.
  compiled = _compilers.submit(jitted.lower(*arguments).compile)

  def call(*arguments):
    compiled.result()
    return jitted(*arguments)

  return call
