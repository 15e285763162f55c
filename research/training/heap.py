"""Keeps the memory that XLA frees on a CPU, for the next step.

XLA allocates the temporary arrays of a program at its start and frees them at its end. glibc gives so much
memory back to the system, which fills every page with zeros for the next step.
"""

import contextlib
import ctypes
import sys

# Parameters of mallopt (malloc.h): how much free memory at the end of the heap goes back to the system, and the
# least size that is mapped apart from the heap.
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
# Larger blocks go back at once. Small blocks take places between them, and a process whose steps need 1.2 GB
# grew from 2.0 to 6.7 GB (experiments/speed/README.md).
LARGEST = 2**28


def keep_freed_memory() -> None:
  """Gives the memory that is free now back to the system, and keeps from then on what is freed, with glibc.

  Call it when a program has been compiled: the compiler leaves more memory free than small programs need. All
  threads must share one heap (`glibc.malloc.arena_max=1` in `core.cli`), or what one thread has freed is not
  what another needs, and nothing is gained.
  """
  if sys.platform != 'linux':
    return
  with contextlib.suppress(OSError, AttributeError):  # another C library
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    libc.mallopt(MMAP_THRESHOLD, LARGEST)
    libc.mallopt(TRIM_THRESHOLD, 4 * LARGEST)
