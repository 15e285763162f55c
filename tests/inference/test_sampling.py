"""What is drawn has the distribution that the settings say: exact probabilities in float64, by chi-square."""

import functools

import jax
import numpy as np
import pytest
from scipy import stats

from research.core.errors import Invalid
from research.inference import sampling
from research.inference.sampling import Sampling

VOCAB, DRAWS = 12, 4000
LOGITS = np.random.default_rng(0).normal(size=VOCAB) * 1.5


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def probabilities(settings: Sampling) -> np.ndarray:
  """By the definitions, a token at a time, in float64."""
  p = softmax(LOGITS / settings.temperature)
  order = np.argsort(-p)
  if settings.top_k:
    p[order[settings.top_k :]] = 0
  if settings.top_p < 1:
    p = p / p.sum()
    total = 0.0
    for token in np.argsort(-p):
      if total >= settings.top_p:
        p[token] = 0
      total += p[token]
  if settings.min_p:
    p[p < settings.min_p * p.max()] = 0
  if settings.typical < 1:
    p = p / p.sum()
    some = p > 0
    surprise = np.where(some, -np.log(np.where(some, p, 1)), np.inf)
    entropy = (p * np.where(some, surprise, 0)).sum()
    total = 0.0
    for token in np.argsort(np.abs(surprise - entropy)):
      if total >= settings.typical:
        p[token] = 0
      total += p[token]
  return p / p.sum()


CASES = {
  'temperature': {'temperature': 0.7},
  'top_k': {'temperature': 1.0, 'top_k': 4},
  'top_p': {'temperature': 1.3, 'top_p': 0.8},
  'min_p': {'temperature': 1.0, 'min_p': 0.1},
  'typical': {'temperature': 1.0, 'typical': 0.6},
  'all': {'temperature': 1.5, 'top_k': 9, 'top_p': 0.95, 'min_p': 0.02, 'typical': 0.9},
}


@functools.cache
def drawn() -> dict[str, np.ndarray]:
  """Tokens of every case, all in one batch of rows, as requests in one engine are."""
  settings = [Sampling(**knobs, seed=i) for i, knobs in enumerate(CASES.values())]
  rows = sampling.as_rows(settings)
  logits = np.tile(LOGITS.astype(np.float32), (len(settings), 1))
  draw = jax.jit(
    lambda numbers: jax.lax.map(
      lambda n: sampling.choose(
        logits, rows, jax.numpy.full(len(settings), n), draws=True, filters=True
      ),
      numbers,
    )
  )
  tokens = np.asarray(draw(np.arange(DRAWS)))
  return dict(zip(CASES, tokens.T, strict=True))


@pytest.mark.parametrize('case', CASES)
def test_draws_have_the_distribution_of_the_settings(case):
  p = probabilities(Sampling(**CASES[case]))
  counts = np.bincount(drawn()[case], minlength=VOCAB)
  assert counts[p == 0].sum() == 0
  some = p > 0
  assert stats.chisquare(counts[some], DRAWS * p[some]).pvalue > 1e-3


def test_the_test_of_distributions_can_fail():
  p = probabilities(Sampling(temperature=1.0))
  counts = np.bincount(drawn()['temperature'], minlength=VOCAB)  # of another temperature
  assert stats.chisquare(counts, DRAWS * p).pvalue < 1e-6


def test_a_greedy_row_beside_one_that_draws_is_greedy():
  rows = sampling.as_rows([Sampling(), Sampling(temperature=1.0)])
  logits = np.tile(LOGITS.astype(np.float32), (2, 1))
  tokens = {
    int(sampling.choose(logits, rows, np.full(2, n), draws=True, filters=True)[0])
    for n in range(20)
  }
  assert tokens == {int(LOGITS.argmax())}


def test_a_row_does_not_depend_on_its_place():
  one, other = Sampling(temperature=1.0, seed=5), Sampling(temperature=1.0, seed=6)
  logits = np.tile(LOGITS.astype(np.float32), (2, 1))

  def tokens(settings, place):
    rows = sampling.as_rows(settings)
    choose = functools.partial(sampling.choose, draws=True, filters=False)
    return [int(choose(logits, rows, np.full(2, n))[place]) for n in range(20)]

  assert tokens([one, other], 0) == tokens([other, one], 1)
  assert tokens([one, other], 0) != tokens([one, other], 1)


def test_penalties_are_those_of_transformers():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  prompt = [3, 5, 5]
  penalty = transformers.RepetitionPenaltyLogitsProcessor(1.7)
  want = penalty(torch.tensor([prompt]), torch.tensor(LOGITS, dtype=torch.float32)[None]).numpy()
  seen = np.isin(np.arange(VOCAB), prompt)[None]
  rows = sampling.as_rows([Sampling(repetition_penalty=1.7)])
  none = np.zeros((1, VOCAB), np.int32)
  got = sampling.penalise(LOGITS.astype(np.float32)[None], rows, seen, none)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_presence_and_frequency_are_subtracted():
  rows = sampling.as_rows([Sampling(presence_penalty=0.5, frequency_penalty=0.25)])
  generated = np.zeros((1, VOCAB), np.int32)
  generated[0, 2], generated[0, 7] = 3, 1
  got = sampling.penalise(LOGITS.astype(np.float32)[None], rows, generated > 0, generated)
  want = LOGITS.copy()
  want[2] -= 0.5 + 3 * 0.25
  want[7] -= 0.5 + 0.25
  np.testing.assert_allclose(got[0], want, rtol=1e-5)


@pytest.mark.parametrize(
  'knobs',
  [
    *({'temperature': -1.0}, {'top_p': 0.0}, {'top_k': -1}, {'min_p': 2.0}, {'seed': -3}),
    *({'top_p': 1e-300}, {'typical': 1e-300}, {'repetition_penalty': 5e-324}),  # 0 in float32
    *({'temperature': float('nan')}, {'temperature': float('inf')}, {'temperature': 1e-38}),
  ],
)
def test_settings_that_make_no_sense_are_refused(knobs):
  with pytest.raises(Invalid, match=rf'Sampling\.{next(iter(knobs))}: '):
    Sampling(**knobs)
