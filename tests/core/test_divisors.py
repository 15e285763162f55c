"""The largest divisor against a search of all."""

import pytest

from research.core.divisors import largest_divisor


@pytest.mark.parametrize('size', [1, 7, 12, 64, 360])
def test_it_is_the_largest_that_fits(size):
  for most in range(1, size + 3):
    fitting = [n for n in range(1, size + 1) if size % n == 0 and n <= most]
    assert largest_divisor(size, most) == max(fitting)
