"""How programs are sent to the CPU."""

import jax


def run_one_program_at_once() -> None:
  """Makes calls on a CPU that is one device return when their results are there.

  So two steps never need memory at once. The thread that calls is then also the one that allocates, and finds
  what it has freed (`training.heap`). Call it before jax starts its client; later it changes nothing. Programs
  for several devices, such as those of a population, return at once as before.
  """
  jax.config.update('jax_cpu_enable_async_dispatch', False)
