"""Requests share slots and depend on nothing but themselves; what is wrong is refused in a sentence."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from research.core.errors import Invalid, UserError
from research.inference import answers, beams, tokenizer
from research.inference import decode as decoding
from research.inference.engine import Engine
from research.inference.generator import Generator, make_generator
from research.inference.request import Request
from research.inference.sampling import Sampling
from research.inference.text import TextStream
from research.model import counts
from research.parallel.mesh import Mesh
from tests.families import tiny
from tests.model.test_model import make

ROOM, CHUNK = 40, 8
LETTERS = 'abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+-'


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
def make_engine(model):
  """Engines over one model and so over one set of compiled programs."""
  graphdef, params = model

  def engine(params=params, **knobs):
    return Engine(
      graphdef, params, **{'decode': decode, 'slots': 3, 'room': ROOM, 'chunk': CHUNK, **knobs}
    )

  return engine


def prompt(length, seed=0) -> tuple[int, ...]:
  return tuple(int(t) for t in np.random.default_rng(seed).integers(1, 64, length))


DRAWN = Sampling(temperature=1.0, seed=3)


def test_a_request_does_not_depend_on_its_company(make_engine):
  asked = [
    Request(prompt=prompt(n, n), max_tokens=5 + n % 3, sampling=dataclasses.replace(DRAWN, seed=n))
    for n in (3, 20, 7, 1, 9)
  ]
  together = make_engine().run(asked)
  alone = [make_engine().run([request])[0] for request in asked]
  assert [c.tokens for c in together] == [c.tokens for c in alone]
  assert [len(c.tokens) for c in together] == [r.max_tokens for r in asked]
  assert {c.finish for c in together} == {'length'}


def test_samples_of_one_prompt_differ_and_come_again(make_engine):
  own = tokenizer.Tokenizer(lambda text: [LETTERS.index(c) for c in text], decode, 64, ())
  generator = Generator(make_engine(), own)
  first = generator(['abc'], samples=3, sampling=DRAWN, max_tokens=8)
  again = generator(['abc'], samples=3, sampling=DRAWN, max_tokens=8)
  assert [c.tokens for c in first] == [c.tokens for c in again]
  assert len({tuple(c.tokens) for c in first}) == 3
  assert ''.join(generator.stream('abc', sampling=DRAWN, max_tokens=8)) == first[0].text


def test_stop_tokens_and_strings_that_lie_across_tokens(make_engine):
  engine = make_engine()
  (whole,) = engine.run([Request(prompt=prompt(4), max_tokens=8, sampling=DRAWN)])
  end = whole.tokens[3]
  first = whole.tokens.index(end)
  (by_token,) = engine.run(
    [Request(prompt=prompt(4), max_tokens=8, sampling=DRAWN, stop_tokens=(end,))]
  )
  assert by_token.finish == 'stop_token'
  assert by_token.tokens == whole.tokens[: first + 1]
  assert by_token.text == whole.text[:first]
  string = whole.text[2:4]
  (by_string,) = engine.run(
    [Request(prompt=prompt(4), max_tokens=8, sampling=DRAWN, stop=(string,))]
  )
  assert by_string.finish == 'stop'
  assert by_string.text == whole.text[: whole.text.index(string)]


def test_log_probabilities_are_those_of_the_model(make_engine):
  request = Request(prompt=prompt(4), max_tokens=6, top=3, sampling=DRAWN)
  (completion,) = make_engine().run([request])
  for token, logprob, top in zip(
    completion.tokens, completion.logprobs, completion.top, strict=True
  ):
    assert [p for _, p in top] == sorted((p for _, p in top), reverse=True)
    assert all(p == pytest.approx(logprob, abs=1e-6) for t, p in top if t == token)
    assert logprob <= top[0][1] + 1e-6
  (greedy,) = make_engine().run([dataclasses.replace(request, sampling=Sampling())])
  assert [top[0][0] for top in greedy.top] == greedy.tokens


def test_a_mask_and_a_bias_decide_what_may_come(make_engine):
  def even_then_odd(tokens):
    return np.arange(64) % 2 == len(tokens) % 2

  masked = Request(prompt=prompt(4), max_tokens=6, sampling=DRAWN, mask=even_then_odd)
  biased = Request(prompt=prompt(4), max_tokens=3, sampling=Sampling(logit_bias={9: 100.0}))
  got = make_engine().run([masked, biased])
  assert [t % 2 for t in got[0].tokens] == [0, 1, 0, 1, 0, 1]
  assert got[1].tokens == [9, 9, 9]


def test_a_penalised_row_repeats_nothing_and_its_neighbour_is_as_before(make_engine):
  plain = Request(prompt=prompt(4), max_tokens=8)
  penalised = dataclasses.replace(plain, sampling=Sampling(presence_penalty=1e4))
  (alone,) = make_engine().run([plain])
  got = make_engine().run([penalised, plain])
  assert len(set(got[0].tokens)) == 8
  assert got[1].tokens == alone.tokens


def test_a_request_that_is_forgotten_frees_its_slot(make_engine):
  engine = make_engine(slots=1)
  first = engine.submit(Request(prompt=prompt(4), max_tokens=30))
  engine.step()
  engine.cancel(first)
  (completion,) = engine.run([Request(prompt=prompt(5), max_tokens=3)])
  (alone,) = make_engine(slots=1).run([Request(prompt=prompt(5), max_tokens=3)])
  assert completion.tokens == alone.tokens


@pytest.mark.parametrize('rows', [1, 8])
def test_the_step_has_no_copy_of_the_cache(model, rows):
  """What the compiled step needs beside its arguments is small, however large the cache (donated)."""
  from research.inference import programs

  graphdef, params = decoding.for_backend(*model)
  slots = jax.eval_shape(lambda: Engine(graphdef, params, slots=rows, room=4096, chunk=CHUNK).slots)
  tokens = jax.ShapeDtypeStruct((rows,), np.int32)
  active = jax.ShapeDtypeStruct((rows,), bool)
  lowered = programs.advance.lower(graphdef, params, slots, tokens, active, penalises=False)
  compiled = lowered.compile()
  memory = compiled.memory_analysis()
  entries = jax.tree.leaves(slots.cache)
  cache = sum(x.size * x.dtype.itemsize for x in entries)
  assert memory.alias_size_in_bytes > 0.99 * cache
  # One layer's keys and values are read out; there is one layer here, so at most those.
  assert memory.temp_size_in_bytes < 1.1 * cache
  shape = ','.join(map(str, max(entries, key=lambda x: x.size).shape))
  assert not re.search(rf'\[{shape}\]\S* copy\(', compiled.as_text())


WRONG = {
  'empty prompt': ({'prompt': ()}, r'Request\.prompt: it is empty'),
  'long prompt': ({'prompt': prompt(38)}, r'38 tokens and up to 6 more do not fit into a room of 40'),
  'unknown token': ({'prompt': (3, 64)}, r'the model has no token 64: its ids are 0 to 63'),
  'unknown bias': ({'prompt': (3,), 'sampling': Sampling(logit_bias={99: 1.0})}, r'no token 99'),
  'no encoder': ({'prompt': (3,), 'encoder': (4,)}, r'Request\.encoder: 1 tokens do not fit'),
}  # fmt: skip


@pytest.mark.parametrize('case', WRONG)
def test_bad_requests_are_refused_in_a_sentence(case, make_engine):
  knobs, message = WRONG[case]
  with pytest.raises(Invalid, match=message):
    make_engine().submit(Request(max_tokens=6, **knobs))


def test_logits_that_are_not_numbers_end_a_request_with_an_error(make_engine, model):
  broken = jax.tree.map(lambda x: x * np.nan, model[1])
  (completion,) = make_engine(broken).run([Request(prompt=(3,), max_tokens=6)])
  assert completion.finish == 'error'
  assert 'the logits are not numbers' in completion.error


def test_a_text_without_an_answer_is_an_error_and_no_row(make_engine, model, tmp_path):
  broken = jax.tree.map(lambda x: x * np.nan, model[1])
  own = tokenizer.Tokenizer(lambda text: [LETTERS.index(c) for c in text], decode, 64, ())
  generator, out = Generator(make_engine(broken), own), tmp_path / 'answers.jsonl'
  rows = answers.answer_all(generator, ['abc', 'x'], out, 'one', samples=1, max_tokens=3)
  with pytest.raises(UserError, match=r'2 of 2 prompts have no answer; number 0 .*not numbers'):
    list(rows)
  assert out.read_text() == ''


def test_an_answer_has_at_most_what_the_room_leaves(make_engine):
  own = tokenizer.Tokenizer(lambda text: [LETTERS.index(c) for c in text], decode, 64, ())
  generator = Generator(make_engine(), own)
  assert generator.request('abc').max_tokens == ROOM - 3
  assert generator.request('abc', max_tokens=5).max_tokens == 5


def test_a_tokenizer_of_another_model_is_refused(model):
  other = tokenizer.Tokenizer(list, decode, 50_257, ())
  abstract = counts.abstract(tiny('llama', ['LAYERS=1']))
  with pytest.raises(UserError, match='the tokenizer has 50257 ids and the model 64 logits'):
    make_generator(abstract, model[1], other, 'decoder', room=ROOM)


def test_a_room_beyond_the_learned_positions_is_refused():
  graphdef, params = make(tiny('gpt2', ['LAYERS=1']))
  with pytest.raises(Invalid, match=r'Engine\.room: 65 is more than the 64 positions'):
    Engine(graphdef, params, room=65)


def test_too_many_beams_are_refused(model):
  with pytest.raises(UserError, match='33 beams: choose from 1 to 32'):
    beams.search(*model, {'decoder_input_tokens': np.ones((1, 2), np.int32)}, 3, beams=33, ends=())


def test_answers_go_on_where_they_were_interrupted(make_engine, tmp_path):
  own = tokenizer.Tokenizer(lambda text: [LETTERS.index(c) for c in text], decode, 64, ())
  generator, out = Generator(make_engine(), own), tmp_path / 'answers.jsonl'
  prompts = ['abc', 'x', 'hello']
  settings = {'sampling': DRAWN, 'max_tokens': 5}

  def answer():
    return list(answers.answer_all(generator, prompts, out, 'one', samples=2, **settings))

  want = answer()
  assert [len(row['texts']) for row in want] == [2, 2, 2]
  lines = out.read_text().splitlines(keepends=True)
  out.write_text(lines[0] + lines[1][:20])  # the process ended within a line
  got = answer()
  assert len(got) == 2
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert sorted(rows, key=lambda row: row['number']) == sorted(want, key=lambda row: row['number'])


def test_text_is_held_back_until_it_is_sure():
  stream = TextStream(lambda ids: bytes(ids).decode(errors='replace'), stop=('stop',))
  said = [stream.add(byte) for byte in 'aé st!sto'.encode()]
  assert said == ['a', '', 'é', ' ', '', '', 'st!', '', '', '']
  assert stream.finish() == 'sto'
  assert stream.text == 'aé st!sto'
