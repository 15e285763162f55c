"""The text of an answer comes in pieces, and ends at a stop string wherever tokens cut it."""

import random

import pytest

from research.data.encoding import ByteEncoding
from research.inference.text import TextStream

SIGNS = ['a', 'b', 'é', '€', '👩\u200d🚀', '\n', ' ']


def read(tokens: list[int], stop: list[str]) -> tuple[str, bool, int]:
  """Returns the text in its pieces together, whether a stop string ended it, and after how many tokens."""
  stream = TextStream(ByteEncoding().decode, (), stop)
  text = ''
  for count, token in enumerate(tokens, 1):
    text += stream.add(token)
    if stream.stopped:
      return text + stream.finish(), True, count
  return text + stream.finish(), False, len(tokens)


@pytest.mark.parametrize('seed', range(4))
def test_pieces_are_the_text_before_the_first_stop_string(seed):
  """Every token is a byte here, so characters and stop strings span several tokens."""
  chance = random.Random(seed)
  encoding = ByteEncoding()
  stopped = 0
  for _ in range(250):
    text = ''.join(chance.choices(SIGNS, k=chance.randrange(1, 14)))
    stop = [
      ''.join(chance.choices(SIGNS, k=chance.randrange(1, 4))) for _ in range(chance.randrange(3))
    ]
    found, ended, count = read(encoding.encode(text), stop)
    whole = encoding.decode(encoding.encode(text)[:count])
    places = [whole.index(one) for one in stop if one in whole]
    assert (found, ended) == (whole[: min(places)] if places else text, bool(places)), (text, stop)
    assert ended == any(one in text for one in stop)
    stopped += ended
  assert 20 < stopped < 230


def test_the_beginning_of_a_stop_string_waits_for_the_rest_of_a_character():
  """After 'x' the first byte of the sign is a character that is not whole."""
  tokens = ByteEncoding().encode('ax€')
  stream = TextStream(ByteEncoding().decode, (), ['x€'])
  assert [stream.add(token) for token in tokens] == ['a', '', '', '', '']
  assert (stream.stopped, stream.finish()) == (True, '')
