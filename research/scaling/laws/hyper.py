"""Laws of hyper-parameters: critical batch size, batch size and learning rate."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, exponent


class CriticalBatch(Law):
  """B_crit = c N^a, in sequences (Zhang et al. 2024).

  They find 93.2 (N / 1e6)^.47, and no growth with N at fixed D.
  """

  source = 'Zhang et al. 2024, arXiv:2410.21676'
  form = 'c N^a'
  output = 'critical_batch'
  inputs = ('params',)
  c = Parameter(
    'critical batch at N = 1', {'output': 1, 'params': '-a'}, low=-40.0, high=40.0, linear=True
  )
  a = exponent('exponent of N', (0.2, 0.5, 1.0), low=-4.0)

  def predict(self, p, x):
    return p.c * jnp.exp(p.a * x.ln_params)


class StepsToLoss(Law):
  """Steps to a given loss at batch size B: S = S_min (1 + B_crit / B) (McCandlish et al. 2018, eq. 2.11).

  Fit it to (batch, steps) pairs of one model. At B_crit a run needs twice the fewest steps.
  """

  source = 'McCandlish et al. 2018, arXiv:1812.06162; Kaplan et al. 2020, equation 5.1'
  form = 'S_min (1 + B_crit / B)'
  output = 'steps'
  inputs = ('batch',)
  S_min = Parameter('fewest steps', {'output': 1}, (0.1, 0.5, 1.0), linear=True)
  B_crit = Parameter('critical batch, in the unit of B', {'batch': 1}, (0.1, 1.0, 10.0))

  def predict(self, p, x):
    return p.S_min * (1 + p.B_crit * jnp.exp(-x.ln_batch))


class LearningRateOfCompute(Law):
  """lr = c C^-a (DeepSeek-AI 2024: .3118 C^-.125)."""

  source = 'DeepSeek-AI 2024, arXiv:2401.02954, equation 1'
  form = 'c C^-a'
  output = 'learning_rate'
  inputs = ('flops',)
  c = Parameter('learning rate at C = 1', {'output': 1, 'flops': 'a'}, linear=True)
  a = exponent('exponent of 1 / C', (0.0, 0.125, 0.5), low=-4.0)

  def predict(self, p, x):
    return p.c * jnp.exp(-p.a * x.ln_flops)


class BatchOfCompute(Law):
  """B = c C^a, in tokens (DeepSeek-AI 2024: .292 C^.3271)."""

  source = 'DeepSeek-AI 2024, arXiv:2401.02954, equation 1'
  form = 'c C^a'
  output = 'batch'
  inputs = ('flops',)
  c = Parameter('batch at C = 1', {'output': 1, 'flops': '-a'}, linear=True)
  a = exponent('exponent of C', (0.0, 0.3, 0.7), low=-4.0)

  def predict(self, p, x):
    return p.c * jnp.exp(p.a * x.ln_flops)


class StepLawLearningRate(Law):
  """lr = c N^-a D^b (Li et al. 2025: 1.79 N^-.713 D^.307)."""

  source = 'Li et al. 2025 (Step law), arXiv:2503.04715, equation 1'
  form = 'c N^-a D^b'
  output = 'learning_rate'
  inputs = ('params', 'tokens')
  c = Parameter('size', {'output': 1, 'params': 'a', 'tokens': '-b'}, linear=True)
  a = exponent('exponent of 1 / N', (0.0, 0.7), low=-4.0)
  b = exponent('exponent of D', (0.0, 0.3), low=-4.0)

  def predict(self, p, x):
    return p.c * jnp.exp(p.b * x.ln_tokens - p.a * x.ln_params)


class StepLawBatch(Law):
  """B = c D^b, in tokens (Li et al. 2025: .58 D^.571)."""

  source = 'Li et al. 2025 (Step law), arXiv:2503.04715, equation 1'
  form = 'c D^b'
  output = 'batch'
  inputs = ('tokens',)
  c = Parameter('batch at D = 1', {'output': 1, 'tokens': '-b'}, linear=True)
  b = exponent('exponent of D', (0.0, 0.5), low=-4.0)

  def predict(self, p, x):
    return p.c * jnp.exp(p.b * x.ln_tokens)
