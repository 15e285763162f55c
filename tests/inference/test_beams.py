"""Beams against the scores of all texts, in float64, by the length penalties of transformers and T5X."""

import functools
import itertools

import jax
import numpy as np
import pytest
from flax import nnx

from research.inference import beams
from research.parallel.mesh import Mesh
from tests.families import tiny
from tests.model.test_model import make

VOCAB, END, MOST = 8, 7, 3
PROMPT = (3, 1, 4)
# transformers' default; T5X's `brevity_penalty`, with its default alpha; and one that prefers long texts.
PENALTIES = {
  'length': (beams.by_length, lambda n: n),
  'wu': (beams.wu, lambda n: ((5 + n) / 6) ** 0.6),
  'strong': (functools.partial(beams.wu, power=4.0), lambda n: ((5 + n) / 6) ** 4),
}


@pytest.fixture(scope='module')
def model():
  with Mesh().use(jax.local_devices()[:1]):
    yield make(tiny('llama', ['LAYERS=1', f'VOCAB={VOCAB}']))


@pytest.fixture(scope='module')
def log_likelihoods(model) -> dict[tuple, float]:
  """Those of all texts of up to `MOST` tokens; a shorter text ends with the end."""
  graphdef, params = model
  texts = np.array(list(itertools.product(range(VOCAB), repeat=MOST)), np.int32)
  rows = np.concatenate([np.tile(np.array(PROMPT, np.int32), (len(texts), 1)), texts], axis=1)
  whole = jax.jit(
    lambda params, rows: nnx.merge(graphdef, params)({'decoder_input_tokens': rows})[0]
  )
  logits = np.asarray(whole(params, rows), np.float64)[:, len(PROMPT) - 1 : -1]
  log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
  log_p = np.take_along_axis(log_p, texts[..., None], axis=-1)[..., 0]
  likelihoods = {}
  for text, each in zip(texts.tolist(), log_p, strict=True):
    length = text.index(END) + 1 if END in text else MOST
    likelihoods[tuple(text[:length])] = each[:length].sum()
  return likelihoods


@pytest.mark.slow
@pytest.mark.parametrize('name', PENALTIES)
def test_the_best_beam_is_the_best_of_all_texts(name, model, log_likelihoods):
  penalty, divisor = PENALTIES[name]
  batch = {'decoder_input_tokens': np.array([PROMPT], np.int32)}
  tokens, scores = beams.search(
    *model, batch, MOST, beams=VOCAB // 2, ends=(END,), penalty=penalty, patient=True
  )
  texts = []
  for row in np.asarray(tokens)[0].tolist():
    length = row.index(END) + 1 if END in row else MOST
    texts.append(tuple(row[:length]))
  wanted = {text: p / divisor(len(text)) for text, p in log_likelihoods.items()}
  assert texts[0] == max(wanted, key=wanted.get)
  np.testing.assert_allclose(scores[0], [wanted[text] for text in texts], rtol=1e-5)
  assert len(set(texts)) == VOCAB // 2
