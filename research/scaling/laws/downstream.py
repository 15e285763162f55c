"""From loss to what a benchmark measures."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, exponent

_SHARE = {'positive': False, 'low': 0.0, 'high': 1.0}


class AccuracyOfLoss(Law):
  """A sigmoid from chance to ceiling as the loss falls (Llama 3: Dubey et al. 2024, section 3.2.1).

  Fit it with residuals='linear'; hold `floor` at the benchmark's chance level where that is known.
  """

  source = 'Dubey et al. 2024, arXiv:2407.21783, section 3.2.1'
  form = 'floor + (ceiling - floor) / (1 + exp(k (L - L_half)))'
  output = 'accuracy'
  inputs = ('loss',)
  floor = Parameter('accuracy of chance', start=(0.05, 0.3), **_SHARE)
  ceiling = Parameter('highest accuracy', start=(0.7, 0.95), **_SHARE)
  k = Parameter('steepness, per nat', {'loss': -1}, (3.0, 10.0, 30.0))
  L_half = Parameter('loss half-way', {'loss': 1}, (0.8, 1.0, 1.2), low=-2.0, high=2.0)

  def predict(self, p, x):
    return p.floor + (p.ceiling - p.floor) / (1 + jnp.exp(p.k * (x.loss - p.L_half)))


class ErrorOfLoss(Law):
  """Top-1 error = epsilon - k exp(-gamma L), averaged over tasks (Gadre et al. 2024, equation 5)."""

  source = 'Gadre et al. 2024, arXiv:2403.08540, equation 5'
  form = 'epsilon - k exp(-gamma L)'
  output = 'error'
  inputs = ('loss',)
  epsilon = Parameter('error of chance', {'output': 1}, (1.0, 1.2), low=-1.0, high=2.0)
  k = Parameter('size', {'output': 1}, (0.3, 1.0, 5.0), low=-8.0, high=20.0)
  gamma = exponent('decay per nat', (0.3, 1.0, 3.0), high=20.0)

  def predict(self, p, x):
    return p.epsilon - p.k * jnp.exp(-p.gamma * x.loss)


class LossOfCompute(Law):
  """A benchmark's loss as a line in log C: a - b ln C, the first half of Llama 3's two-step forecast.

  Written around C_0 = 1e21 so that `a` is the loss there.
  """

  source = 'Dubey et al. 2024, arXiv:2407.21783, section 3.2.1'
  form = 'a - b ln(C / 1e21)'
  inputs = ('flops',)
  a = Parameter('loss at 1e21 FLOPs', {'output': 1}, (0.5, 1.0, 2.0))
  b = Parameter(
    'fall per e-fold of C', {'output': 1}, (0.01, 0.1), positive=False, low=-5.0, high=5.0
  )

  def predict(self, p, x):
    return p.a - p.b * (x.ln_flops - jnp.log(1e21))
