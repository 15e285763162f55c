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
  # The state of a loop, 64 MB, is a temporary array.
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

# As the products of Eigen do. Two blocks are more than one heap of a thread in glibc has.
OF_A_THREAD = """
import ctypes, resource, sys, threading
from research.training import heap

size = ctypes.c_size_t(40 * 2**20)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def use_two_blocks():
  blocks = [ctypes.c_void_p(libc.malloc(size)) for _ in range(2)]
  for block in blocks:
    libc.memset(block, 1, size)
  for block in blocks:
    libc.free(block)

def work():
  use_two_blocks()
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(10):
    use_two_blocks()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == 'kept':
  heap.keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def page_faults(program: str, how: str) -> int:
  environment = os.environ | cli.CPU_ENVIRONMENT | {'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-c', program, how]
  return int(
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
  )


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_a_step_finds_the_memory_of_the_step_before():
  # 64 MB are at least 32 pages in every step.
  assert page_faults(PROGRAM, 'kept') < 200 < 320 <= page_faults(PROGRAM, 'not kept')


@pytest.mark.skipif(sys.platform != 'linux', reason='glibc')
def test_a_thread_finds_the_memory_that_it_has_freed():
  # 40 MB are at least 20 pages in every round.
  assert page_faults(OF_A_THREAD, 'kept') < 20 < 200 <= page_faults(OF_A_THREAD, 'not kept')
