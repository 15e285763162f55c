"""Guesses change how many steps there are, and nothing about what is said."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from research.core.errors import UserError
from research.inference.engine import Engine
from research.inference.ngrams import Ngram
from research.inference.request import Request
from research.inference.sampling import Sampling
from research.inference.speculate import speculate
from research.parallel.mesh import Mesh
from tests.families import tiny
from tests.model.test_model import COMPILE, make

GUESSES, VOCAB = 3, 64


@pytest.fixture(scope='module', autouse=True)
def mesh():
  with Mesh().use(jax.local_devices()[:1]) as mesh:
    yield mesh


@functools.cache
def models():
  """A model and a draft that is like it: the same parameters, a little off."""
  graphdef, params = make(tiny('llama', ['LAYERS=1']))
  draft = jax.tree.map(lambda x: x + 0.002 * np.sin(np.arange(x.size).reshape(x.shape)), params)
  return graphdef, params, draft


def run(batch, max_tokens, draft=None, **knobs):
  graphdef, params, own = models()

  def program(params, own, batch):
    model = functools.partial(nnx.merge, graphdef)
    guesser = draft or model(own)
    return speculate(model(params), guesser, batch, max_tokens, guesses=GUESSES, **knobs)

  return jax.jit(program, compiler_options=COMPILE)(params, own, batch)


def ragged(lengths, width=8):
  rng = np.random.default_rng(0)
  real = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
  tokens = rng.integers(1, VOCAB, real.shape).astype(np.int32) * real
  return {'decoder_input_tokens': tokens, 'decoder_segment_ids': real}


@pytest.mark.parametrize('draft', [pytest.param(None, marks=pytest.mark.slow), Ngram(1)])
def test_greedy_tokens_are_those_without_guesses(draft):
  lengths, more = (8, 3, 5), 16
  batch = ragged(lengths)
  got = run(batch, more, draft, settings=Sampling())
  graphdef, params, _ = models()
  engine = Engine(graphdef, params, slots=3, room=40, chunk=8)
  tokens = batch['decoder_input_tokens']
  requests = [
    Request(prompt=tuple(map(int, row[:n])), max_tokens=more)
    for row, n in zip(tokens, lengths, strict=True)
  ]
  assert np.asarray(got.tokens).tolist() == [c.tokens for c in engine.run(requests)]
  # Each step says at least one token for every row, and with a good draft more.
  assert got.steps < (more - 1 if draft is None else more)


@pytest.mark.slow
@pytest.mark.parametrize('draft', [None, Ngram(1)])
def test_draws_have_the_distribution_of_the_model(draft):
  """The second token, the first that a guess can change, over many rows of one prompt, by chi-square."""
  rows = 1500
  settings = Sampling(temperature=0.7, top_k=6)
  batch = {k: np.repeat(x, rows, 0) for k, x in ragged((4,), 4).items()}
  got = np.asarray(run(batch, 2, draft, settings=settings).tokens)
  graphdef, params, _ = models()
  whole = jax.jit(lambda p, b: nnx.merge(graphdef, p)(b)[0], compiler_options=COMPILE)

  def exact(tokens):
    logits = np.asarray(whole(params, {'decoder_input_tokens': tokens}))[:, -1].astype(np.float64)
    logits /= settings.temperature
    logits[logits < np.sort(logits, axis=-1)[:, -settings.top_k, None]] = -np.inf
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)

  prompt = batch['decoder_input_tokens'][:1]
  first = exact(prompt)[0]
  firsts = np.flatnonzero(first)
  second = exact(np.concatenate([np.repeat(prompt, len(firsts), 0), firsts[:, None]], 1))
  pairs = {(a, b): first[a] * second[i, b] for i, a in enumerate(firsts) for b in range(VOCAB)}
  pairs = {pair: p for pair, p in pairs.items() if p > 0}
  counts = dict.fromkeys(pairs, 0)
  for row in got:
    counts[tuple(int(t) for t in row)] += 1  # a KeyError: a token that cannot be drawn
  often = [pair for pair, p in pairs.items() if rows * p >= 5]
  rare = rows - sum(counts[pair] for pair in often)
  observed = [counts[pair] for pair in often] + [rare]
  expected = [rows * pairs[pair] for pair in often]
  expected.append(rows - sum(expected))
  assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_an_end_ends_a_row():
  batch = ragged((8, 3))
  free = np.asarray(run(batch, 12, settings=Sampling()).tokens)
  end = int(free[0, 4])
  got = run(batch, 12, settings=Sampling(), ends=(end,))
  for row, n, want in zip(np.asarray(got.tokens), np.asarray(got.length), free, strict=True):
    stop = want.tolist().index(end) + 1 if end in want else 12
    assert n == stop
    assert row[:n].tolist() == want[:n].tolist()


def test_a_recurrence_cannot_forget_and_is_refused():
  graphdef, params = make(tiny('mamba', ['LAYERS=1']))
  with pytest.raises(UserError, match='has a recurrence, which cannot forget'):
    speculate(
      nnx.merge(graphdef, params), Ngram(), ragged((4,), 4), 4, settings=Sampling(), guesses=2
    )


def test_a_draft_of_another_vocabulary_is_refused():
  graphdef, params, _ = models()
  other = make(tiny('llama', ['LAYERS=1', 'VOCAB=32']))
  with pytest.raises(UserError, match='the draft has 32 logits and the model 64'):
    speculate(
      nnx.merge(graphdef, params), nnx.merge(*other), ragged((4,), 4), 4, settings=Sampling()
    )
