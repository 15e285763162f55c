"""How programs are sent to the CPU."""

import jax


def run_one_program_at_once() -> None:
  """Makes calls on a CPU return when their results are there, so that two steps never need memory at once.

  The thread that calls is then the one that allocates, and finds what it has freed (`training.heap`). Call it
  before jax starts its client; later it changes nothing.
  """
  jax.config.update('jax_cpu_enable_async_dispatch', False)
