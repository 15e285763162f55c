"""Laws from loss to a benchmark's metric, and from one attempt to many."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, exponent, share


class AccuracyOfLoss(Law):
  """A sigmoid from chance to ceiling as the task's loss falls (Llama 3; the second step of the OLMo ladder).

  Fix `floor` at the guessing rate where that is known. The ladder writes a / (1 + exp(-k (L - x_0))) + b: a is
  floor - ceiling, b is ceiling and x_0 is L_half. The loss may be 0, that of a perfect model.
  """

  source = (
    'Dubey et al. 2024, arXiv:2407.21783, section 3.2.1; Bhagia et al. 2024, arXiv:2412.04403'
  )
  form = 'floor + (ceiling - floor) / (1 + exp(k (L - L_half)))'
  output = 'accuracy'
  inputs = ('loss',)
  zeros = ('loss',)
  plain = ('accuracy',)
  robust = 'l2'
  residuals = 'linear'
  floor = share('accuracy of chance', (0.05, 0.3))
  ceiling = share('highest accuracy', (0.7, 0.95))
  k = Parameter('steepness, per unit of the loss', {'loss': -1}, (3.0, 10.0, 30.0))
  L_half = Parameter('loss half-way', {'loss': 1}, (0.8, 1.0, 1.2), low=-2.0, high=2.0)

  def predict(self, p, x):
    return p.floor + (p.ceiling - p.floor) / (1 + jnp.exp(p.k * (x.loss - p.L_half)))


class AccuracyOfCompute(Law):
  """A sigmoid in ln C from chance to ceiling, in one step (Owen 2024; Ruan et al. 2024).

  It needs no loss of the task. Two steps say more where most accuracies are still at chance.
  """

  source = 'Owen 2024, arXiv:2401.04757'
  form = 'floor + (ceiling - floor) / (1 + (C_half / C)^k)'
  output = 'accuracy'
  inputs = ('flops',)
  plain = ('accuracy',)
  robust = 'l2'
  residuals = 'linear'
  floor = share('accuracy of chance', (0.05, 0.3))
  ceiling = share('highest accuracy', (0.7, 0.95))
  k = exponent('steepness in ln C', (0.3, 1.0, 3.0), high=20.0)
  C_half = Parameter('compute half-way', {'flops': 1}, (0.1, 1.0, 10.0, 100.0))

  def predict(self, p, x):
    rise = 1 / (1 + jnp.exp(p.k * (jnp.log(p.C_half) - x.ln_flops)))
    return p.floor + (p.ceiling - p.floor) * rise


class ErrorOfLoss(Law):
  """Top-1 error = epsilon - k exp(-gamma L), averaged over tasks (Gadre et al. 2024, equation 5)."""

  source = 'Gadre et al. 2024, arXiv:2403.08540, equation 5'
  form = 'epsilon - k exp(-gamma L)'
  output = 'error'
  inputs = ('loss',)
  robust = 'l2'
  residuals = 'linear'
  epsilon = Parameter('error of chance', {'output': 1}, (1.0, 1.2), low=-1.0, high=2.0)
  k = Parameter('size', {'output': 1}, (0.3, 1.0, 5.0), low=-8.0, high=20.0)
  gamma = exponent('decay per nat', (0.3, 1.0, 3.0), high=20.0)

  def predict(self, p, x):
    return p.epsilon - p.k * jnp.exp(-p.gamma * x.loss)


class CoverageOfSamples(Law):
  """Coverage, the share of problems that one of k attempts solves: exp(-a k^-b) (Brown et al. 2024).

  Their log C = a k^b with the signs turned. -ln coverage is then a power law of k.
  """

  source = 'Brown et al. 2024, arXiv:2407.21787, section 3'
  form = 'exp(-a k^-b)'
  output = 'coverage'
  inputs = ('k',)
  a = Parameter('-ln of the coverage of one attempt', {'k': 'b'}, (0.3, 1.0, 3.0))
  b = exponent('exponent of k', (0.2, 0.5, 1.0))

  def predict(self, p, x):
    return jnp.exp(-p.a * jnp.exp(-p.b * x.ln_k))


class LossOfCompute(Law):
  """A benchmark's loss as a line in ln C, the first step of Llama 3's two-step forecast.

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
