"""What is told of an exception of other code."""

from research.core.errors import first_line, in_a_line


def test_the_first_line_of_an_exception():
  long = ValueError('\n a bad shape. \n and its traceback')
  assert first_line(long) == 'a bad shape'
  assert in_a_line(long) == 'ValueError: a bad shape'
  # An exception without a message: `assert False` in a library.
  assert first_line(AssertionError()) == in_a_line(AssertionError()) == 'AssertionError'
  assert first_line(AssertionError(), 'no plugin') == 'no plugin'
