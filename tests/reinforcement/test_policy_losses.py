"""Losses and advantages equal the papers' formulas in float64 and Tunix', however a batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import Invalid
from research.reinforcement import losses
from research.reinforcement.advantages import GAE, Group, LeaveOneOut, Round
from research.reinforcement.losses import PPO, PolicyGradient
from research.reinforcement.penalty import KL

# Without optimisation XLA compiles faster.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
BATCH, LENGTH, EMBED, VOCAB = 4, 6, 5, 7


class Heads:
  """A model without a body: a head of logits and one of values on given features."""

  vocab = VOCAB

  def __init__(self, kernel, value_kernel):
    self.kernel = kernel
    self.value_kernel = value_kernel

  def readout(self):
    return lambda x: x @ self.kernel

  def values(self, x):
    return x @ self.value_kernel


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def of_targets(logits, targets):
  return np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]


@functools.cache
def random_batch():
  """(features, kernel, kernel of values, batch): completions of 4, 2, 6 and 1 tokens."""
  random = np.random.default_rng(0)

  def normal(*shape):
    return random.normal(size=shape).astype(np.float32)

  features = normal(BATCH, LENGTH, EMBED)
  kernel = normal(EMBED, VOCAB)
  value_kernel = normal(EMBED)
  targets = random.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)
  positions = np.arange(LENGTH)
  starts = np.array([[1], [2], [0], [3]])
  ends = np.array([[5], [4], [6], [4]])
  mask = ((positions >= starts) & (positions < ends)).astype(np.int32)
  log_probs = of_targets(features @ kernel, targets)
  batch = {
    'decoder_target_tokens': targets,
    'decoder_loss_weights': mask,
    losses.OLD: log_probs + 0.6 * normal(BATCH, LENGTH),
    losses.REFERENCE: log_probs + 0.6 * normal(BATCH, LENGTH),
    losses.ADVANTAGES: -normal(BATCH)[:, None] * mask,
    losses.VALUES: normal(BATCH, LENGTH),
    losses.RETURNS: normal(BATCH, LENGTH),
  }
  return features, kernel, value_kernel, batch


def reference(loss, features, kernel, value_kernel, batch) -> float:
  """The loss of a batch in float64, token by token as the papers write it."""
  batch = {key: np.asarray(value, np.float64) for key, value in batch.items()}
  targets = batch['decoder_target_tokens'].astype(int)
  logits = np.asarray(features, np.float64) @ np.asarray(kernel, np.float64)
  new = of_targets(logits / loss.temperature, targets)
  values = np.asarray(features, np.float64) @ np.asarray(value_kernel, np.float64)
  costs_of_rows = []
  for row in range(BATCH):
    inside = np.flatnonzero(batch['decoder_loss_weights'][row])
    ratios = np.exp(new[row] - batch[losses.OLD][row])
    if loss.ratio == 'sequence':
      mean = np.mean(new[row, inside] - batch[losses.OLD][row, inside])
      ratios = np.full(LENGTH, np.exp(mean))
    costs = []
    for t in inside:
      advantage = batch[losses.ADVANTAGES][row, t]
      clipped = min(max(ratios[t], 1 - loss.clip_low), 1 + loss.clip_high)
      cost = -min(ratios[t] * advantage, clipped * advantage)
      log_r = batch[losses.REFERENCE][row, t] - new[row, t]
      cost += loss.kl * (np.exp(log_r) - log_r - 1)
      if isinstance(loss, PPO):
        value = values[row, t]
        old = batch[losses.VALUES][row, t]
        target = batch[losses.RETURNS][row, t]
        near = min(max(value, old - loss.value_clip), old + loss.value_clip)
        cost += loss.value * 0.5 * max((value - target) ** 2, (near - target) ** 2)
      costs.append(cost)
    costs_of_rows.append(costs)
  if loss.per == 'token':
    return np.mean(np.concatenate(costs_of_rows))
  if loss.per == 'sequence':
    return np.mean([np.mean(costs) for costs in costs_of_rows])
  return np.mean([np.sum(costs) / loss.per for costs in costs_of_rows])


def numeric_gradient(f, x, step=1e-5):
  """The gradient by central differences, in float64."""
  x = np.asarray(x, np.float64)
  gradient = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    above = x.copy()
    below = x.copy()
    above[index] += step
    below[index] -= step
    gradient[index] = (f(above) - f(below)) / (2 * step)
  return gradient


def ours(loss, batch=None, chunks=1):
  """(mean loss, counts, gradients by the two kernels)."""
  features, kernel, value_kernel, default = random_batch()
  batch = {key: jnp.asarray(value) for key, value in (batch or default).items()}

  def total(kernel, value_kernel):
    terms, counts = loss(Heads(kernel, value_kernel), jnp.asarray(features), batch, chunks)
    return sum(terms.values()) / counts['weight'], counts

  gradient = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (value, counts), gradients = gradient(kernel, value_kernel)
  return float(value), {k: float(v / counts['weight']) for k, v in counts.items()}, gradients


LOSSES = {
  'grpo': PolicyGradient(),
  'kl': PolicyGradient(kl=0.1, temperature=0.7),
  'dapo': PolicyGradient(per='token', clip_high=0.5),
  'dr_grpo': PolicyGradient(per=LENGTH),
  'gspo': PolicyGradient(ratio='sequence'),
  'ppo': PPO(value=0.5, kl=0.05),
}


@pytest.mark.parametrize('name', LOSSES)
def test_a_loss_and_its_gradient_are_the_papers(name):
  loss = LOSSES[name]
  features, kernel, value_kernel, batch = random_batch()
  value, _, gradients = ours(loss, chunks=2 if name == 'kl' else 1)
  np.testing.assert_allclose(value, reference(loss, *random_batch()), rtol=1e-5)

  def by_kernel(kernel):
    return reference(loss, features, kernel, value_kernel, batch)

  def by_value_kernel(value_kernel):
    return reference(loss, features, kernel, value_kernel, batch)

  expected = numeric_gradient(by_kernel, kernel)
  np.testing.assert_allclose(gradients[0], expected, rtol=1e-4, atol=1e-5)
  expected = numeric_gradient(by_value_kernel, value_kernel)
  np.testing.assert_allclose(gradients[1], expected, rtol=1e-4, atol=1e-5)


# Tunix 0.1.7 on `random_batch` (rl/algo_core.py: grpo_loss_fn, ppo_policy_loss_fn, ppo_value_loss_fn). The last
# one is the sum of two of its numbers.
TUNIX = {
  'grpo': (PolicyGradient(), -0.58177596),
  'kl': (PolicyGradient(kl=0.1), -0.56737858),
  'dapo': (PolicyGradient(per='token', clip_high=0.5), -0.67481452),
  'dr_grpo': (PolicyGradient(per=LENGTH), -0.32962224),
  'gspo': (PolicyGradient(ratio='sequence'), -0.60015565),
  'ppo': (PPO(value=0.5), -0.60853326 + 0.5 * 7.07144070),
}


@pytest.mark.parametrize('name', TUNIX)
def test_a_loss_is_that_of_tunix(name):
  loss, expected = TUNIX[name]
  assert ours(loss)[0] == pytest.approx(expected, rel=1e-5)


def test_shares_are_means_over_tokens():
  _, counts, _ = ours(PolicyGradient(per='token', clip_high=0.5, kl=0.1))
  assert counts['clip_fraction'] == pytest.approx(0.15384616, rel=1e-5)  # of Tunix
  assert counts['kl_per_token'] == pytest.approx(0.21034172, rel=1e-5)
  # Divided by another number, they are still means.
  for per in ('sequence', LENGTH):
    assert ours(PolicyGradient(per=per))[1]['ratio'] == pytest.approx(1.0, abs=0.4)


@pytest.mark.parametrize('name', ['kl', 'dapo', 'dr_grpo', 'ppo'])
def test_parts_of_a_batch_add_up(name):
  """The sums of the parts, divided by the sum of their weights, do not depend on the cut."""
  features, kernel, value_kernel, batch = random_batch()
  model = Heads(kernel, value_kernel)

  @jit
  def terms_and_weight(features, part):
    terms, counts = LOSSES[name](model, features, part, 1)
    return sum(terms.values()), counts['weight']

  def sums(rows):
    return np.array(
      terms_and_weight(features[rows], {key: value[rows] for key, value in batch.items()})
    )

  parts = sums(slice(0, 2)) + sums(slice(2, 4))
  np.testing.assert_allclose(parts, sums(slice(None)), rtol=1e-5)


def test_certain_and_impossible_tokens_give_numbers():
  """Value and gradient with log-probabilities of 0, and of less than float32's exp can show."""
  features, kernel, value_kernel, batch = random_batch()
  certain = 1e4 * features
  for old in (0.0, -1e4):
    rows = {**batch, losses.OLD: np.full((BATCH, LENGTH), old, np.float32)}

    def total(kernel, rows=rows):
      terms, _ = PPO(kl=0.1)(Heads(kernel, value_kernel), jnp.asarray(certain), rows, 1)
      return sum(terms.values())

    value, gradient = jit(jax.value_and_grad(total))(kernel)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_on_policy_the_ratio_is_one_and_its_gradient_that_of_reinforce():
  """exp(new - old) is not a constant: its gradient at 1 is that of the log-probability."""
  features, kernel, _, batch = random_batch()
  on_policy = {**batch, losses.OLD: of_targets(features @ kernel, batch['decoder_target_tokens'])}
  _, counts, gradients = ours(PolicyGradient(per='token'), on_policy)
  assert counts['ratio'] == pytest.approx(1.0, abs=1e-6)
  weights = batch['decoder_loss_weights'] * batch[losses.ADVANTAGES]

  def reinforce(kernel):
    log_probs = of_targets(
      np.asarray(features, np.float64) @ kernel, batch['decoder_target_tokens']
    )
    return -np.sum(weights * log_probs) / batch['decoder_loss_weights'].sum()

  np.testing.assert_allclose(
    gradients[0], numeric_gradient(reinforce, kernel), rtol=1e-4, atol=1e-5
  )


SCORES = [[1, 0, 0, 1], [1, 1, 1, 1], [0.5, 0.25, 0, 0]]


def advantages_of(advantages, scores):
  """The advantages of completions of one token each, [groups, size]."""
  scores = np.asarray(scores, np.float64)
  mask = np.ones((scores.size, 1))
  result, _ = advantages(Round(scores, np.zeros_like(mask), mask))
  return result.reshape(scores.shape)


def test_advantages_of_groups_are_tunix():
  """Tunix 0.1.7: compute_advantages, compute_rloo_advantages, compute_drgrpo_advantages."""
  scaled = [
    [0.866024, -0.866024, -0.866024, 0.866024],
    [0] * 4,
    [1.305577, 0.261115, -0.783346, -0.783346],
  ]
  leave_one_out = [[2 / 3, -2 / 3, -2 / 3, 2 / 3], [0] * 4, [5 / 12, 1 / 12, -0.25, -0.25]]
  plain = [[0.5, -0.5, -0.5, 0.5], [0] * 4, [0.3125, 0.0625, -0.1875, -0.1875]]
  np.testing.assert_allclose(advantages_of(Group(), SCORES), scaled, atol=2e-6)
  np.testing.assert_allclose(advantages_of(LeaveOneOut(), SCORES), leave_one_out, atol=1e-12)
  np.testing.assert_allclose(advantages_of(Group(scale=False), SCORES), plain, atol=1e-12)


def test_scores_that_differ_by_rounding_are_equal():
  """Their standard deviation is almost 0, and a division by it would blow them up."""
  assert not advantages_of(Group(), [[0.1 + 0.2, 0.3]]).any()
  assert abs(advantages_of(Group(), [[1.0, 0.0]])).max() < 1


def test_an_abstention_has_no_advantage_and_is_in_no_mean():
  nan = float('nan')
  for advantages in (Group(), Group(scale=False), LeaveOneOut()):
    result = advantages_of(advantages, [[1, nan, 0, 1], [nan] * 4, [nan, nan, nan, 1]])
    np.testing.assert_allclose(result[0, [0, 2, 3]], advantages_of(advantages, [[1, 0, 1]])[0])
    assert result[0, 1] == 0
    assert not result[1:].any()


def test_generalised_advantages_are_the_sums_of_the_paper():
  """Equation 16 of arXiv:1506.02438: the sum of (gamma lambda)^l delta_(t+l), whitened over the round."""
  random = np.random.default_rng(1)
  *_, batch = random_batch()
  mask = batch['decoder_loss_weights']
  values, penalties = random.normal(size=(2, BATCH, LENGTH))
  penalties = penalties * mask
  scores = np.array([[1.0, 0.0], [0.5, 2.0]])
  discount, trace = 0.9, 0.8
  batch = Round(scores, penalties, mask, values)
  expected, returns = np.zeros((2, BATCH, LENGTH))
  for row in range(BATCH):
    inside = np.flatnonzero(mask[row])
    rewards = -penalties[row, inside]
    rewards[-1] += scores.reshape(-1)[row]
    next_values = [*values[row, inside][1:], 0.0]
    deltas = rewards + discount * np.array(next_values) - values[row, inside]
    for i, t in enumerate(inside):
      decay = (discount * trace) ** np.arange(len(inside) - i)
      expected[row, t] = np.sum(decay * deltas[i:])
      returns[row, t] = expected[row, t] + values[row, t]
  plain = GAE(discount=discount, trace=trace, whiten=False)(batch)
  np.testing.assert_allclose(plain[0], expected, atol=1e-12)
  np.testing.assert_allclose(plain[1], returns, atol=1e-12)
  whitened, same = GAE(discount=discount, trace=trace)(batch)
  inside = mask > 0
  assert abs(whitened[inside].mean()) < 1e-12
  assert whitened[inside].std(ddof=1) == pytest.approx(1)
  assert np.corrcoef(whitened[inside], expected[inside])[0, 1] == pytest.approx(1)
  np.testing.assert_allclose(same, returns, atol=1e-12)


def test_the_weight_of_the_divergence_follows_its_target():
  """Ziegler et al. (2019), section 2.2, with the error clipped at a fifth."""
  penalty = KL(weight=0.1, target=6.0, horizon=10_000)
  assert penalty.adapted(0.1, 6.6, 512) == pytest.approx(0.1 * (1 + 0.1 * 512 / 10_000))
  assert penalty.adapted(0.1, 60.0, 512) == pytest.approx(0.1 * (1 + 0.2 * 512 / 10_000))
  assert penalty.adapted(0.1, 0.0, 512) == pytest.approx(0.1 * (1 - 0.2 * 512 / 10_000))
  assert KL(weight=0.1).adapted(0.1, 60.0, 512) == 0.1


@pytest.mark.parametrize(
  ('kind', 'field', 'value'),
  [
    (PolicyGradient, 'clip_low', 0.0),
    (PolicyGradient, 'per', 'batch'),
    (PolicyGradient, 'per', 0),
    (PolicyGradient, 'ratio', 'mean'),
    (PolicyGradient, 'kl', -0.1),
    (PolicyGradient, 'temperature', 0.0),
    (PPO, 'value', 0.0),
    (PPO, 'value_clip', 0.0),
    (GAE, 'trace', 1.5),
    (KL, 'target', 0.0),
    (KL, 'weight', -1.0),
  ],
)
def test_a_wrong_knob_is_named(kind, field, value):
  with pytest.raises(Invalid) as error:
    kind(**{field: value})
  assert error.value.field == field
