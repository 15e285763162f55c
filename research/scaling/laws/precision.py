"""Laws of low precision: in training, after training, and in quantization-aware training."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, coefficient, exponent


class Precision(Law):
  """Training in low precision: Chinchilla with N_eff = N (1 - exp(-bits / g)) (Kumar et al. 2024).

  N_eff is N times one such factor each for the weights, the activations and the KV cache.
  """

  source = 'Kumar et al. 2024, arXiv:2411.04330, equations 3 and 4'
  form = 'E + A / N_eff^alpha + B / D^beta'
  inputs = ('params', 'tokens', 'weight_bits', 'activation_bits', 'kv_bits')
  E = coefficient('irreducible loss, nats per token', (0.2, 0.7))
  A = coefficient('size of the finite-model term', (0.1, 0.4), params='alpha')
  B = coefficient('size of the finite-data term', (0.1, 0.4), tokens='beta')
  alpha = exponent('exponent of N_eff', (0.2, 0.5))
  beta = exponent('exponent of D', (0.2, 0.5))
  g_weight = Parameter(
    'bits over which weights lose their worth', start=(1.0, 3.0), low=-4.0, high=4.0
  )
  g_activation = Parameter('the same for activations', start=(1.0, 3.0), low=-4.0, high=4.0)
  g_kv = Parameter('the same for the KV cache', start=(1.0,), low=-4.0, high=4.0)

  def predict(self, p, x):
    bits = ((x.weight_bits, p.g_weight), (x.activation_bits, p.g_activation), (x.kv_bits, p.g_kv))
    ln_n = x.ln_params + sum(jnp.log(-jnp.expm1(-b / g)) for b, g in bits)
    return p.E + p.A * jnp.exp(-p.alpha * ln_n) + p.B * jnp.exp(-p.beta * x.ln_tokens)


class PostTrainingQuantization(Law):
  """The loss added by rounding trained weights: C D^g_D / N^g_N exp(-bits / g) (Kumar et al. 2024, equation 2).

  It grows with D: the same rounding harms a model more that was trained on more tokens.
  """

  source = 'Kumar et al. 2024, arXiv:2411.04330, equation 2'
  form = 'C D^g_D / N^g_N exp(-bits / g)'
  output = 'loss_increase'
  inputs = ('params', 'tokens', 'bits')
  C = Parameter('size', {'output': 1, 'params': 'g_N', 'tokens': '-g_D'}, (1.0, 100.0), linear=True)
  g_D = exponent('exponent of D', (0.3, 0.7))
  g_N = exponent('exponent of N', (0.3, 0.7))
  g = Parameter('bits over which the harm falls e-fold', start=(0.5, 2.0), low=-4.0, high=4.0)

  def predict(self, p, x):
    return p.C * jnp.exp(p.g_D * x.ln_tokens - p.g_N * x.ln_params - x.bits / p.g)


class QuantizationAwareTraining(Law):
  """The loss added by training with rounded numbers: k D^g_D (log2 G)^g_G / N^g_N (Chen et al. 2025).

  G is how many numbers share a scale. At G = 1 nothing is lost, so that G must be 2 or more. A fit is of one
  choice of bits: the published constants are those of 4 bits for weights (W4), activations (A4) or both.
  """

  source = 'Chen et al. 2025, arXiv:2505.14302, the unified law of quantization error'
  form = 'k D^g_D (log2 G)^g_G / N^g_N'
  output = 'loss_increase'
  inputs = ('params', 'tokens', 'group')
  k = Parameter('size', {'output': 1, 'params': 'g_N', 'tokens': '-g_D'}, (0.1, 1.0), linear=True)
  g_D = exponent('exponent of D', (0.05, 0.3))
  g_N = exponent('exponent of N', (0.2, 0.5))
  g_G = exponent('exponent of log2 G', (0.3, 1.0))

  def predict(self, p, x):
    ln_log_group = jnp.log(x.ln_group / jnp.log(2.0))
    return p.k * jnp.exp(p.g_D * x.ln_tokens - p.g_N * x.ln_params + p.g_G * ln_log_group)
