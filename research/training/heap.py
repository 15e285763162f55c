"""Lets every step of a training run on a CPU use the memory that the one before it has freed.

XLA allocates the temporary arrays of a program at its start and frees them at its end. glibc gives so much
memory back to the system, which fills every page with zeros for the next step.
"""

import contextlib
import ctypes
import sys

# Parameters of mallopt (malloc.h): how much free memory at the end of the heap goes back to the system, how
# much stays there when some goes back, the least size that is mapped apart from the heap, and how many blocks
# may be.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
MMAP_MAX = -4
LARGEST = 2**31 - 1
# The size of a thread's heap in glibc. Whatever the threshold, a heap that is free goes back to the system
# unless this much is to stay (heap_trim in arena.c). A thread allocates what a product of Eigen packs.
HEAP_OF_A_THREAD = 2**26


def keep_freed_memory() -> None:
  """Gives the memory that is free now back to the system, and keeps from then on what is freed, with glibc.

  Call it when a program has been compiled: the compiler leaves more memory free than small programs need. On
  one device a program must run alone (`dispatch.run_one_program_at_once`): a step that is called while the one
  before it still runs allocates its temporary arrays beside those, in places that differ from step to step, and
  the heap grows to several times what a step needs (experiments/speed/README.md). Over several devices, as in a
  population, two steps may still be under way.
  """
  if sys.platform != 'linux':
    return
  with contextlib.suppress(OSError, AttributeError):  # another C library
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    if not libc.mallopt(MMAP_THRESHOLD, LARGEST):  # some versions accept 32 MB at the most
      libc.mallopt(MMAP_MAX, 0)
    libc.mallopt(TRIM_THRESHOLD, LARGEST)
    libc.mallopt(TOP_PAD, HEAP_OF_A_THREAD)
