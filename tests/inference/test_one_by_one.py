"""Beams and drafts answer requests as the engine does: the same greedy tokens, text, ends and errors."""

import jax
import numpy as np
import pytest

from research.core.errors import Invalid, UserError
from research.inference import beams, speculate
from research.inference.engine import Engine
from research.inference.ngrams import Ngram
from research.inference.one_by_one import Beams, OneByOne, Speculation
from research.inference.request import Request
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from tests.families import tiny
from tests.model.test_model import make

LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-'
PROMPT, ROOM, MORE = (5, 9, 2, 5, 9), 48, 10


def decode(ids) -> str:
  return ''.join(LETTERS[i] for i in ids)


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with Mesh().use(jax.local_devices()[:1]) as mesh:
    yield mesh


@pytest.fixture(scope='module')
def model():
  return make(tiny('llama', ['LAYERS=1']))


@pytest.fixture(scope='module')
def guesses_well(model):
  """Answers with a draft that is the model itself."""
  return OneByOne(Speculation(*model, *model, guesses=3), decode=decode, room=ROOM)


def test_a_draft_changes_no_greedy_token(model, guesses_well):
  request = Request(prompt=PROMPT, max_tokens=MORE)
  (want,) = Engine(*model, slots=1, room=ROOM, decode=decode).run([request])
  (got,) = guesses_well.run([request])
  assert (got.tokens, got.text, got.finish) == (want.tokens, want.text, 'length')


@pytest.mark.slow
def test_look_up_changes_no_greedy_token(model, guesses_well):
  request = Request(prompt=PROMPT, max_tokens=MORE)
  ngrams = OneByOne(Speculation(*model, Ngram(1), guesses=3), decode=decode, room=ROOM)
  assert ngrams.run([request])[0].tokens == guesses_well.run([request])[0].tokens


@pytest.mark.slow
def test_samples_with_seeds_of_their_own_share_a_program(guesses_well):
  def ask(seed):
    sampling = Sampling(temperature=1.0, seed=seed)
    return guesses_well.run([Request(prompt=PROMPT, max_tokens=MORE, sampling=sampling)])[0].tokens

  first = ask(1)
  programs = speculate.compiled._cache_size()
  assert len({tuple(tokens) for tokens in (first, ask(2), ask(3))}) == 3
  assert ask(1) == first
  assert speculate.compiled._cache_size() == programs


@pytest.mark.slow
def test_a_stop_token_ends_a_text(guesses_well):
  free = guesses_well.run([Request(prompt=PROMPT, max_tokens=MORE)])[0]
  end = free.tokens[3]
  got = guesses_well.run([Request(prompt=PROMPT, max_tokens=MORE, stop_tokens=(end,))])[0]
  assert got.tokens == free.tokens[: free.tokens.index(end) + 1]
  assert got.finish == 'stop_token'


def test_a_stop_string_ends_a_text(guesses_well):
  free = guesses_well.run([Request(prompt=PROMPT, max_tokens=MORE)])[0]
  stop = free.text[2:4]
  got = guesses_well.run([Request(prompt=PROMPT, max_tokens=MORE, stop=(stop,))])[0]
  assert (got.text, got.finish) == (free.text[: free.text.index(stop)], 'stop')


def test_logits_that_are_not_numbers_are_an_error(model, guesses_well):
  graphdef, params = model
  broken = jax.tree.map(lambda x: x * np.nan, params)
  method = Speculation(graphdef, broken, graphdef, params, guesses=3)
  (completion,) = OneByOne(method, room=ROOM).run([Request(prompt=PROMPT, max_tokens=MORE)])
  assert completion.finish == 'error'
  assert 'the logits are not numbers' in completion.error


def test_a_draft_that_is_broken_changes_no_greedy_token(model, guesses_well):
  graphdef, params = model
  broken = jax.tree.map(lambda x: x * np.nan, params)
  method = Speculation(graphdef, params, graphdef, broken, guesses=3)
  request = Request(prompt=PROMPT, max_tokens=MORE)
  got, want = (engine.run([request])[0] for engine in (OneByOne(method, room=ROOM), guesses_well))
  assert got.tokens == want.tokens


@pytest.mark.slow
def test_beams_of_logits_that_are_not_numbers_are_an_error(model):
  broken = jax.tree.map(lambda x: x * np.nan, model[1])
  engine = OneByOne(Beams(model[0], broken, 3, beams.wu), room=ROOM)
  (completion,) = engine.run([Request(prompt=PROMPT, max_tokens=MORE, stop_tokens=(7,))])
  assert 'the logits are not numbers' in completion.error


@pytest.mark.slow
def test_the_best_beam_answers(model):
  graphdef, params = model
  engine = OneByOne(Beams(graphdef, params, 3, beams.wu), decode=decode, room=ROOM)
  (got,) = engine.run([Request(prompt=PROMPT, max_tokens=MORE, stop_tokens=(7,))])
  batch = {'decoder_input_tokens': np.array([PROMPT], np.int32)}
  want, _ = beams.search(graphdef, params, batch, MORE, beams=3, ends=(7,), penalty=beams.wu)
  assert got.tokens == np.asarray(want)[0, 0].tolist()[: len(got.tokens)]
  assert len(got.tokens) == MORE or got.tokens[-1] == 7


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'top': 2}, r'Request\.top: it works with neither beams nor a draft'),
    ({'sampling': Sampling(presence_penalty=1.0)}, 'no penalty and no logit_bias'),
    ({'max_tokens': 200}, 'do not fit into a room of 48'),
  ],
)
def test_what_a_draft_does_not_go_with_is_refused(settings, message, guesses_well):
  with pytest.raises((Invalid, UserError), match=message):
    guesses_well.submit(Request(prompt=PROMPT, **{'max_tokens': 4, **settings}))


def test_beams_draw_nothing(model):
  engine = OneByOne(Beams(*model, 2), room=ROOM)
  with pytest.raises(UserError, match='beam search finds the likeliest text'):
    engine.submit(Request(prompt=PROMPT, max_tokens=4, sampling=Sampling(temperature=1.0)))
