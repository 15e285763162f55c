"""The laws of Kaplan et al. 2020 (arXiv:2001.08361). N is without embeddings; losses are in nats per token."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, exponent

_SOURCE = 'Kaplan et al. 2020, arXiv:2001.08361, equation'
# Bounds for N_c / N and its like, which are astronomically large where the exponent is small.
_FAR = {'low': -80.0, 'high': 80.0}


class KaplanParams(Law):
  """L(N) = (N_c / N)^alpha_N, of models trained to convergence on enough data."""

  source = f'{_SOURCE} 1.1'
  form = '(N_c / N)^alpha_N'
  inputs = ('params',)
  N_c = Parameter('scale of N', {'params': 1}, (1e2, 1e6, 1e12), **_FAR)
  alpha_N = exponent('exponent of N', (0.05, 0.1, 0.3))

  def predict(self, p, x):
    return jnp.exp(p.alpha_N * (jnp.log(p.N_c) - x.ln_params))


class KaplanTokens(Law):
  """L(D) = (D_c / D)^alpha_D, of large models stopped early on a small data set."""

  source = f'{_SOURCE} 1.2'
  form = '(D_c / D)^alpha_D'
  inputs = ('tokens',)
  D_c = Parameter('scale of D', {'tokens': 1}, (1e2, 1e6, 1e12), **_FAR)
  alpha_D = exponent('exponent of D', (0.05, 0.1, 0.3))

  def predict(self, p, x):
    return jnp.exp(p.alpha_D * (jnp.log(p.D_c) - x.ln_tokens))


class KaplanCompute(Law):
  """L(C_min) = (C_c / C_min)^alpha_C; Kaplan et al. count C in PF-days (8.64e19 FLOPs)."""

  source = f'{_SOURCE} 1.3'
  form = '(C_c / C)^alpha_C'
  inputs = ('flops',)
  C_c = Parameter('scale of C', {'flops': 1}, (1e2, 1e6, 1e12), **_FAR)
  alpha_C = exponent('exponent of C', (0.03, 0.1, 0.3))

  def predict(self, p, x):
    return jnp.exp(p.alpha_C * (jnp.log(p.C_c) - x.ln_flops))


class Kaplan(Law):
  """L(N, D) = [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D."""

  source = f'{_SOURCE} 1.5'
  form = '[(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D'
  inputs = ('params', 'tokens')
  N_c = Parameter('scale of N', {'params': 1}, (1e2, 1e5, 1e10), **_FAR)
  D_c = Parameter('scale of D', {'tokens': 1}, (1e1, 1e4, 1e8), **_FAR)
  alpha_N = exponent('exponent of N', (0.05, 0.1, 0.3))
  alpha_D = exponent('exponent of D', (0.05, 0.1, 0.3), low=1e-3)

  def predict(self, p, x):
    by_n = p.alpha_N / p.alpha_D * (jnp.log(p.N_c) - x.ln_params)
    return jnp.exp(p.alpha_D * jnp.logaddexp(by_n, jnp.log(p.D_c) - x.ln_tokens))


class KaplanCriticalBatch(Law):
  """B_crit(L) = B_star / L^(1 / alpha_B), in tokens: above it a larger batch saves few steps."""

  source = f'{_SOURCE} 1.4'
  form = 'B_star / L^(1 / alpha_B)'
  output = 'critical_batch'
  inputs = ('loss',)
  B_star = Parameter('critical batch at a loss of one nat, tokens', {'output': 1, 'loss': 'power'})
  power = exponent('1 / alpha_B', (2.0, 5.0, 8.0), high=20.0)

  def predict(self, p, x):
    return p.B_star * jnp.exp(-p.power * x.ln_loss)
