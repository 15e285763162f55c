"""Memory that a step on a CPU frees is there for the next step."""

import os
import subprocess
import sys

import pytest

from research.core import cli

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from research.parallel import dispatch
from research.training import background_jit

def step(x):
  # The state of a loop, 64 MB, is a temporary array. What an operation's threads allocate would not be kept.
  wave = jax.lax.fori_loop(0, 2, lambda _, y: jnp.sin(y), jnp.tile(x, (1, 32)))
  return jnp.sum(wave)

if sys.argv[1] == 'kept':
  dispatch.run_one_program_at_once()
x = jnp.ones((4096, 128))
step = background_jit.jit(step, x) if sys.argv[1] == 'kept' else jax.jit(step)
for _ in range(10):
  step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
  step(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
  environment = os.environ | cli.CPU_ENVIRONMENT | {'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-c', PROGRAM, how]
  return int(
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
  )


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_a_step_finds_the_memory_of_the_step_before():
  # 64 MB are at least 32 pages in every step.
  assert page_faults('kept') < 200 < 320 <= page_faults('not kept')
