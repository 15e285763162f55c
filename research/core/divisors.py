"""How a size is cut into equal parts."""


def largest_divisor(size: int, most: int) -> int:
  """Returns the largest divisor of `size` that is at most `most`, which is 1 or more."""
  return next(n for n in range(min(size, most), 0, -1) if size % n == 0)
