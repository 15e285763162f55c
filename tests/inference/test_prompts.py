"""Prompts read in pieces, beside others and from what was kept, give the answers of those read alone."""

import dataclasses

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.inference.engine import Engine
from research.inference.prompts import PromptReader
from research.inference.request import Request
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from tests.families import tiny
from tests.model.test_model import make

ROOM, CHUNK = 64, 8


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with Mesh().use(jax.local_devices()[:1]) as mesh:
    yield mesh


def prompt(length, seed=0) -> tuple[int, ...]:
  return tuple(int(t) for t in np.random.default_rng(seed).integers(1, 64, length))


class Recorded:
  """Stands for a model: its result is what it has read, and it says how long its pieces were."""

  def __init__(self, kept):
    self.lengths = []
    self.reader = PromptReader(self.first, self.more, CHUNK, kept)

  def first(self, prompts, requests):
    (tokens,) = prompts
    self.lengths.append(len(tokens))
    return 'logits', {'read': np.array(tokens)}

  def more(self, tokens, cache):
    self.lengths.append(tokens.shape[1])
    return 'logits', {'read': np.concatenate([cache['read'], tokens[0]])}

  def read(self, tokens, encoder=()) -> list[int]:
    """The lengths of the pieces in which a prompt was read."""
    request = Request(prompt=tokens, encoder=encoder)
    before, reading = len(self.lengths), self.reader.begin([request])
    while not reading.done:
      reading.step()
    (result,) = reading.results
    assert tuple(np.asarray(result[1]['read'])) == tokens
    self.reader.keep(request, result)
    return self.lengths[before:]


def test_a_prompt_goes_on_from_the_longest_that_it_begins_with():
  model = Recorded(kept=2)
  assert model.read(prompt(19)) == [3, 8, 8]
  assert model.read(prompt(19)) == []
  longer = prompt(19) + prompt(14, 1)
  assert model.read(longer) == [8, 4, 1, 1]
  assert model.read((*longer, 1, 2)) == [1, 1]
  assert model.read(longer, encoder=(7,)) == [1, 8, 8, 8, 8]  # another text for the encoder
  assert model.read((*prompt(19), 5)) == [4, 8, 8]  # the first was forgotten
  assert model.read(prompt(9, 3)) == [1, 8]


def test_without_kept_prompts_only_equal_ones_are_not_read_again():
  model = Recorded(kept=0)
  assert model.read(prompt(5)) == [5]
  assert model.read(prompt(5)) == []
  assert model.read((*prompt(5), 1)) == [6]
  model.reader.forget()
  assert model.read((*prompt(5), 1)) == [6]


@pytest.mark.parametrize('family', ['llama', pytest.param('mamba', marks=pytest.mark.slow)])
def test_answers_are_those_of_prompts_read_whole(family):
  """Turns of conversations, beside each other, with a piece a step."""
  graphdef, params = make(tiny(family, ['LAYERS=1']))
  turns = [prompt(20, seed)[:length] for seed in (1, 2) for length in (5, 11, 20)]
  requests = [Request(prompt=turn, max_tokens=6) for turn in turns]

  def engine(**knobs):
    return Engine(graphdef, params, slots=2, room=ROOM, chunk=CHUNK, **knobs)

  plain = engine()
  expected = [plain.run([request])[0].tokens for request in requests]
  shared = engine(pieces=1, kept=3)
  assert [c.tokens for c in shared.run(requests)] == expected
  assert [c.tokens for c in shared.run(requests[::-1])] == expected[::-1]


def test_a_long_prompt_does_not_hold_up_a_text_under_way():
  graphdef, params = make(tiny('llama', ['LAYERS=1']))
  engine = Engine(graphdef, params, slots=2, room=ROOM, chunk=CHUNK, pieces=1)
  first = engine.submit(Request(prompt=(3,), max_tokens=30))
  engine.step()
  second = engine.submit(Request(prompt=prompt(40), max_tokens=2))  # of five pieces
  said = [[event.number for event in engine.step()] for _ in range(6)]
  assert said == [[first]] * 4 + [[first, second]] * 2
  # A request that is forgotten while it is read leaves the reader free.
  third = engine.submit(Request(prompt=prompt(40, 1), max_tokens=2))
  engine.step()
  engine.cancel(third)
  alone = dataclasses.replace(Request(prompt=prompt(9, 2)), max_tokens=3)
  (completion,) = engine.run([alone])
  assert completion.tokens == Engine(graphdef, params, slots=2, room=ROOM).run([alone])[0].tokens


def test_a_group_has_prompts_of_one_length_that_are_not_known():
  reader = PromptReader(None, None, 64, kept=2, together=3)
  short, medium = [[Request(prompt=prompt(n, seed)) for seed in range(5)] for n in (20, 40)]
  long = Request(prompt=prompt(65))
  assert reader.group([long, *short], 8) == [0]
  assert reader.group([short[0], long, medium[0], *short[1:]], 8) == [0, 3, 4]
  assert reader.group([short[0], medium[0], *short[1:]], 2) == [0, 2]
  # Samples of one prompt need one row; those that are left over come with the next group.
  samples = [request for request in short for _ in range(3)]
  assert reader.group(samples, 64) == list(range(9))
  assert reader.group(samples, 8) == list(range(8))
  reader.keep(short[1], 'its result')
  assert reader.group(short, 8) == [0, 2, 3]
  assert reader.group(short[1:], 8) == [0]
  assert PromptReader(None, None, 64).group(short, 8) == [0]


@pytest.mark.parametrize(
  ('family', 'knobs'),
  [
    ('llama', {}),
    ('llama', {'prefix': True}),
    pytest.param('mixtral', {}, marks=pytest.mark.slow),
    pytest.param('mamba', {}, marks=pytest.mark.slow),
    pytest.param('t5', {'encoder_room': 16}, marks=pytest.mark.slow),
  ],
)
def test_an_answer_does_not_depend_on_the_group_of_its_prompt(family, knobs):
  graphdef, params = make(tiny(family, []))
  drawn = Sampling(temperature=1.0, seed=3)
  requests = []
  for seed, length in enumerate([3, 7, 3, 20, 5, 1, 8, 2]):
    text = prompt(9, seed) if family == 't5' else ()
    requests.append(
      Request(prompt=prompt(length, seed), encoder=text, max_tokens=4 + length % 3, sampling=drawn)
    )
  requests.insert(2, requests[1])

  def engine(**more):
    return Engine(graphdef, params, slots=4, room=ROOM, chunk=CHUNK, **knobs, **more)

  grouped = engine(together=4)
  among_others = grouped.run(requests)
  reversed_order = grouped.run(requests[::-1])[::-1]
  for request, one, other in zip(requests, among_others, reversed_order, strict=True):
    (alone,) = engine(together=4).run([request])
    assert one.tokens == other.tokens == alone.tokens
    assert one.logprobs == other.logprobs == alone.logprobs
  for one, want in zip(among_others, engine().run(requests), strict=True):
    assert one.tokens == want.tokens
    np.testing.assert_allclose(one.logprobs, want.logprobs, atol=1e-5)


def test_prompts_wait_until_a_group_has_slots():
  graphdef, params = make(tiny('llama', ['LAYERS=1']))
  engine = Engine(graphdef, params, slots=4, room=ROOM, chunk=CHUNK, together=2)
  # The first of the second group has to wait for the slot of a request of three tokens.
  lengths = [1, 3, 3, 3, 2, 2]
  for seed, length in enumerate(lengths):
    engine.submit(Request(prompt=prompt(5, seed), max_tokens=length))
  said = []
  while engine.busy:
    said.append([event.number for event in engine.step()])
  assert said == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3], [4, 5], [4, 5]]
  # Prompts that are not read in groups take the first slot that is free.
  for seed, length in enumerate([1, 3, 3, 3, 2]):
    engine.submit(Request(prompt=prompt(CHUNK + 1, seed), max_tokens=length))
  said = [[event.number for event in engine.step()] for _ in range(3)]
  assert said == [[6, 7, 8, 9], [10, 7, 8, 9], [10, 7, 8, 9]]
  # A single one does not wait for company.
  number = engine.submit(Request(prompt=prompt(5, 9), max_tokens=1))
  assert [event.number for event in engine.step()] == [number]


def test_a_group_larger_than_the_slots_is_refused():
  graphdef, params = make(tiny('llama', ['LAYERS=1']))
  with pytest.raises(UserError, match=r'Engine\.together.*at most the 2 slots'):
    Engine(graphdef, params, slots=2, room=ROOM, chunk=CHUNK, together=4)
