"""Losses of preferences equal TRL's, however the batch is cut; DPO finds the known optimum.

trl 1.16 itself gave the numbers of `TRL` (reference_trl.py). For gradients, and in float64, its formulas were
read in its sources and written again in torch: `DPOTrainer` ("sigmoid", and "ipo", whose means over tokens are
`per_token` here), `CPOTrainer.cpo_loss` ("sigmoid" with label smoothing is the form of cDPO; "simpo"),
`ORPOTrainer.odds_ratio_loss`, `KTOTrainer` with its KL given, and `RewardTrainer` with margin and centring.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from research.core.errors import Invalid
from research.model.embedder import Embedder
from research.model.heads import ScalarHead, UntiedHead
from research.parallel.axes import shard
from research.parallel.mesh import Mesh
from research.training.distillation import Distillation
from research.training.losses import CrossEntropy, Loss
from research.training.preferences import DPO, IPO, KTO, ORPO, SimPO
from research.training.rewards import BradleyTerry

# Quick to compile.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
ROWS, LENGTH, EMBED, VOCAB = 4, 24, 8, 12
# Prompt and answers, in tokens, of the pairs of each row.
PAIRS = [[(2, 3, 5)], [(3, 4, 2), (1, 1, 3)], [(4, 6, 5)], [(2, 2, 2), (2, 5, 4)]]


@pytest.fixture(autouse=True)
def one_device_in_use():
  with Mesh().use(jax.local_devices()[:1]):
    yield


def packed(pairs):
  """The batch of a layout of pairs."""
  random = np.random.default_rng(0)
  keys = ('target_tokens', 'loss_weights', 'segment_ids')
  batch = {f'decoder_{key}': np.zeros((len(pairs), LENGTH), np.int32) for key in keys}
  for row, layout in enumerate(pairs):
    at, segment = 0, 0
    for prompt, *answers in layout:
      for answer in answers:
        segment += 1
        whole = slice(at, at + prompt + answer)
        batch['decoder_target_tokens'][row, whole] = random.integers(1, VOCAB, prompt + answer)
        batch['decoder_loss_weights'][row, at + prompt : at + prompt + answer] = 1
        batch['decoder_segment_ids'][row, whole] = segment
        at += prompt + answer
  batch['decoder_reference_log_probs'] = -3 * random.random((len(pairs), LENGTH), np.float32)
  return batch


def one_pair_a_row(batch, x):
  """The same pairs, without packing."""
  rows, features = [], []
  for row in range(len(x)):
    ids = batch['decoder_segment_ids'][row]
    for first in range(1, ids.max(), 2):
      pair = (ids == first) | (ids == first + 1)
      fill = lambda a, pair=pair: np.concatenate([a[pair], np.zeros_like(a[~pair])])
      new = {key: fill(value[row]) for key, value in batch.items()}
      new['decoder_segment_ids'] = np.where(
        new['decoder_segment_ids'] > 0, new['decoder_segment_ids'] - first + 1, 0
      )
      rows.append(new)
      features.append(fill(x[row]))
  return {key: np.stack([row[key] for row in rows]) for key in batch}, np.stack(features)


def drawn():
  random = np.random.default_rng(1)
  x = random.normal(size=(ROWS, LENGTH, EMBED)).astype(np.float32)
  return packed(PAIRS), x


class Policy(nnx.Module):
  """A head on given features."""

  def __init__(self, head, rngs):
    self.embedder = Embedder(EMBED, VOCAB, rngs=rngs)
    self.head = head(EMBED, VOCAB, rngs=rngs)

  def readout(self):
    weights = self.head.weights(self.embedder, jnp.float32)
    return lambda x: self.head(x, weights)


def loss_and_gradients(loss, batch, x, head=UntiedHead, chunks=1, parts=1):
  """(mean loss, mean counts, gradients by features and by the head's kernel), on the mesh in use."""

  def make(key):
    return Policy(head, nnx.Rngs(params=key))

  graphdef = nnx.graphdef(jax.eval_shape(make, jax.random.key(0)))
  params = jit(lambda key: nnx.to_pure_dict(nnx.state(make(key))))(jax.random.key(0))
  if head is not UntiedHead:
    params['head']['kernel'] += np.linspace(-1, 1, EMBED, dtype=np.float32)[:, None]

  def total(params, x, batch):
    x = shard(x, 'batch', None, None)
    batch = {key: shard(value, 'batch', None) for key, value in batch.items()}
    terms, counts = loss(nnx.merge(graphdef, params), x, batch, chunks)
    return sum(terms.values()), counts

  gradient = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  sums, d_x = 0, np.zeros_like(x)
  for part in range(parts):
    rows = slice(part, None, parts)
    some = {key: jnp.asarray(value[rows]) for key, value in batch.items()}
    (value, counts), (d_params, d_part) = jax.device_get(
      gradient(params, jnp.asarray(x[rows]), some)
    )
    d_x[rows] = d_part
    new = {'loss': value, 'kernel': d_params['head']['kernel'], **counts}
    sums = new if part == 0 else jax.tree.map(np.add, sums, new)
  weight = sums.pop('weight')
  means = {name: value / weight for name, value in sums.items()}
  return jax.device_get(params['head']['kernel']), means, d_x / weight


def reference(formula, batch, x, kernel):
  """The same by torch in float64: a formula of (log p, reference's log p, lengths) of (chosen, rejected)."""
  torch = pytest.importorskip('torch')
  x = torch.tensor(x.astype(np.float64), requires_grad=True)
  kernel = torch.tensor(kernel.astype(np.float64), requires_grad=True)
  targets = torch.tensor(batch['decoder_target_tokens'], dtype=torch.long)
  targets = targets.clamp(max=kernel.shape[1] - 1)  # a head of scores has no vocabulary
  scores = (x @ kernel)[..., 0]
  log_probs = torch.log_softmax(x @ kernel, -1).gather(-1, targets[..., None])[..., 0]
  frozen = torch.tensor(batch['decoder_reference_log_probs'].astype(np.float64))
  losses = []
  for row in range(len(x)):
    ids = batch['decoder_segment_ids'][row]
    for first in range(1, ids.max(), 2):
      sides = []
      for segment in (first, first + 1):
        here = torch.tensor((ids == segment) & (batch['decoder_loss_weights'][row] > 0))
        last = int(np.flatnonzero(ids == segment)[-1])
        sides.append(
          (log_probs[row][here].sum(), frozen[row][here].sum(), here.sum(), scores[row, last])
        )
      losses.append(formula(*zip(*sides, strict=True)))
  loss = torch.stack(losses).mean()
  loss.backward()
  return loss.item(), x.grad.numpy(), kernel.grad.numpy()


def log_sigmoid(x):
  torch = pytest.importorskip('torch')
  return torch.nn.functional.logsigmoid(x)


def dpo(beta, smoothing):
  def formula(policy, frozen, lengths, scores):
    logits = (policy[0] - policy[1]) - (frozen[0] - frozen[1])
    return -log_sigmoid(beta * logits) * (1 - smoothing) - log_sigmoid(-beta * logits) * smoothing

  return formula


def ipo(beta, per_token):
  def formula(policy, frozen, lengths, scores):
    ratio = [
      (p - f) / (n if per_token else 1) for p, f, n in zip(policy, frozen, lengths, strict=True)
    ]
    return (ratio[0] - ratio[1] - 1 / (2 * beta)) ** 2

  return formula


def simpo(policy, frozen, lengths, scores):
  beta, gamma = 2.0, 1.0
  means = [p / n for p, n in zip(policy, lengths, strict=True)]
  return -log_sigmoid(beta * (means[0] - means[1] - gamma / beta))


def orpo(policy, frozen, lengths, scores):
  torch = pytest.importorskip('torch')
  chosen, rejected = (p / n for p, n in zip(policy, lengths, strict=True))
  log_odds = chosen - rejected
  log_odds = log_odds - (torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected)))
  return -chosen - 0.1 * log_sigmoid(log_odds)


def bradley_terry(policy, frozen, lengths, scores):
  return -log_sigmoid(scores[0] - scores[1] - 0.3) + 0.05 * (scores[0] + scores[1]) ** 2


def kto(policy, frozen, lengths, scores):
  """A good answer and a bad one, where beta times the KL is 0.1; a mean over answers."""
  torch = pytest.importorskip('torch')
  good, bad = (0.2 * (p - f) for p, f in zip(policy, frozen, strict=True))
  cost = 1.5 * (1 - torch.sigmoid(good - 0.1)) + 0.5 * (1 - torch.sigmoid(0.1 - bad))
  return cost / 2


CASES = {
  'kto': (KTO(beta=0.2, zero=0.1, good=1.5, bad=0.5), kto),
  'dpo': (DPO(beta=0.3), dpo(0.3, 0.0)),
  'cdpo': (DPO(beta=0.3, label_smoothing=0.2), dpo(0.3, 0.2)),
  'ipo': (IPO(beta=0.1), ipo(0.1, False)),
  'ipo per token': (IPO(beta=0.1, per_token=True), ipo(0.1, True)),
  'simpo': (SimPO(), simpo),
  'orpo': (ORPO(), orpo),
  'bradley-terry': (BradleyTerry(margin=0.3, center=0.05), bradley_terry),
}


def head_of(name):
  return ScalarHead if name == 'bradley-terry' else UntiedHead


@pytest.mark.parametrize('name', CASES)
def test_loss_and_gradient_are_the_references(name):
  loss, formula = CASES[name]
  batch, x = drawn()
  kernel, means, d_x = loss_and_gradients(loss, batch, x, head_of(name), chunks=3)
  expected, expected_x, expected_kernel = reference(formula, batch, x, kernel)
  np.testing.assert_allclose(means['loss'], expected, rtol=1e-5)
  np.testing.assert_allclose(d_x, expected_x, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(means['kernel'], expected_kernel, rtol=1e-4, atol=1e-4)


# What `reference_trl.py` prints, in float32, for the pairs of `drawn`. Some are no trainer's loss as it stands.
# 'cdpo' and 'ipo' are `CPOTrainer.cpo_loss` of log-ratios: `DPOTrainer` has no "sigmoid" with smoothing, and no
# IPO over sums. Of 'orpo' the odds' part is TRL's. KTO's estimate of the KL is replaced by 0.5; beta times that
# is our zero.
TRL = {
  'kto': 0.6312267,
  'dpo': 0.8593781,
  'cdpo': 0.8076388,
  'ipo': 36.99105,
  'ipo per token': 30.97509,
  'simpo': 1.798868,
  'orpo': 3.139491,
  'bradley-terry': 1.685782,
}


@pytest.mark.parametrize('name', TRL)
def test_a_loss_is_that_of_trl(name):
  means = loss_and_gradients(CASES[name][0], *drawn(), head_of(name))[1]
  assert means['loss'] == pytest.approx(TRL[name], rel=1e-5)


@pytest.mark.parametrize('name', ['dpo', 'bradley-terry'])
def test_a_loss_does_not_depend_on_microbatches_packing_or_the_mesh(name):
  loss, _ = CASES[name]
  batch, x = drawn()
  _, whole, d_x = loss_and_gradients(loss, batch, x, head_of(name))
  apart = one_pair_a_row(batch, x)
  results = [loss_and_gradients(loss, batch, x, head_of(name), parts=2)[1]]
  results.append(loss_and_gradients(loss, *apart, head_of(name))[1])
  with Mesh(data=2, tensor=2).use(jax.local_devices()[:4]):
    _, spread, spread_x = loss_and_gradients(loss, batch, x, head_of(name), chunks=2)
  np.testing.assert_allclose(spread_x, d_x, rtol=1e-4, atol=1e-6)
  for means in (*results, spread):
    for key, value in whole.items():
      np.testing.assert_allclose(means[key], value, rtol=2e-5, atol=2e-6, err_msg=key)


def test_dpo_finds_the_closed_form_policy():
  """Rafailov et al. (2023), equation 4: the optimum is reference x exp(reward / beta), normalised.

  A tabular policy of one token, pairs in the proportions that Bradley-Terry's model gives for the rewards.
  """
  beta, rewards = 0.5, np.log([1.0, 2.0, 4.0])
  log_reference = np.log([0.5, 0.3, 0.2])
  pairs = []  # (chosen, rejected), in the proportions w_i : w_j
  for i, j in ((0, 1), (0, 2), (1, 2)):
    weights = np.exp(rewards[[i, j]]).round().astype(int)
    pairs += [(i, j)] * weights[0] + [(j, i)] * weights[1]
  answers = np.array(pairs)
  batch = {
    'decoder_target_tokens': answers,
    'decoder_loss_weights': np.ones_like(answers),
    'decoder_segment_ids': np.broadcast_to([1, 2], answers.shape),
    'decoder_reference_log_probs': log_reference[answers].astype(np.float32),
  }
  batch = {key: jnp.asarray(value) for key, value in batch.items()}

  class Table:
    def __init__(self, logits):
      self.logits = logits

    def readout(self):
      return lambda x: x + self.logits

  features = jnp.zeros((*answers.shape, 3))
  optimizer = optax.adam(0.05)

  def total(logits):
    terms, counts = DPO(beta=beta)(Table(logits), features, batch, 1)
    return terms['loss'] / counts['weight']

  @jax.jit
  def fit(logits):
    def step(carry, _):
      logits, state = carry
      updates, state = optimizer.update(jax.grad(total)(logits), state)
      return (logits + updates, state), None

    return jax.lax.scan(step, (logits, optimizer.init(logits)), length=1500)[0][0]

  policy = jax.nn.softmax(fit(jnp.asarray(log_reference, jnp.float32)))
  optimum = np.exp(log_reference + rewards / beta)
  np.testing.assert_allclose(policy, optimum / optimum.sum(), atol=1e-4)


def test_numbers_that_mean_nothing_are_refused():
  with pytest.raises(Invalid, match=r'DPO\.beta: 0\.0 must be above 0'):
    DPO(beta=0.0)
  with pytest.raises(Invalid, match=r'DPO\.label_smoothing: 0\.5 must be from 0 to under 0\.5'):
    DPO(label_smoothing=0.5)
  assert dataclasses.replace(DPO(), beta=jnp.asarray(0.1)).beta == np.float32(0.1)  # a population's


@pytest.mark.parametrize(
  ('loss', 'head', 'why'),
  [
    (BradleyTerry(), UntiedHead, r'BradleyTerry needs a model of scores.*@heads\.ScalarHead'),
    (DPO(), ScalarHead, 'DPO needs a model of logits, and its head gives scores'),
  ],
)
def test_a_loss_refuses_a_head_of_the_other_kind(loss, head, why):
  run = types.SimpleNamespace(model=functools.partial(Policy, head=functools.partial(head)))
  with pytest.raises(Invalid, match=why):
    Loss.check(loss, run, VOCAB)


@pytest.mark.parametrize(
  'loss', [*(loss for loss, _ in CASES.values()), CrossEntropy(), Distillation()]
)
def test_members_of_a_population_may_differ_in_every_number(loss):
  """Their shapes are compared without these numbers, and then arrays stand for them."""
  assert loss.numbers
  dataclasses.replace(loss, **dict.fromkeys(loss.numbers))
  dataclasses.replace(loss, **dict.fromkeys(loss.numbers, jnp.asarray(0.1)))
