"""Laws of the loss in other regimes: repeated data, over-training, routed models, broken power laws."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, coefficient, exponent


class DataConstrained(Law):
  """Chinchilla in effective N' and D', where D tokens repeat U unique ones (Muennighoff et al. 2023, eq. 5).

  X' = U_X + U_X R_X (1 - exp(-(X / U_X - 1) / R_X)): the first repeats count almost as new, later ones less.
  U_D = min(U, D); U_N = min(N, the N that is compute-optimal for U_D tokens).
  """

  source = 'Muennighoff et al. 2023, arXiv:2305.16264, equations 5 and 6'
  form = "E + A / N'^alpha + B / D'^beta"
  inputs = ('params', 'tokens', 'unique_tokens')
  E = coefficient('irreducible loss, nats per token', (0.2, 0.7))
  A = coefficient('size of the finite-model term', (0.05, 0.3), params='alpha')
  B = coefficient('size of the finite-data term', (0.05, 0.3), tokens='beta')
  alpha = exponent('exponent of N', (0.2, 0.4, 0.7), low=1e-3)
  beta = exponent('exponent of D', (0.2, 0.4, 0.7))
  R_D = Parameter(
    'repeats after which a token has lost most of its worth', start=(3.0, 15.0), low=-7.0
  )
  R_N = Parameter('the same for excess parameters', start=(3.0, 15.0), low=-7.0)

  def predict(self, p, x):
    ln_unique = jnp.minimum(x.ln_unique_tokens, x.ln_tokens)
    # The N that is compute-optimal for U_D tokens: alpha A / N^alpha = beta B / D^beta.
    ln_best = (jnp.log(p.alpha * p.A / (p.beta * p.B)) + p.beta * ln_unique) / p.alpha
    ln_d = _effective(x.ln_tokens, ln_unique, p.R_D)
    ln_n = _effective(x.ln_params, jnp.minimum(x.ln_params, ln_best), p.R_N)
    return p.E + p.A * jnp.exp(-p.alpha * ln_n) + p.B * jnp.exp(-p.beta * ln_d)


def _effective(ln_x, ln_unique, r):
  """ln of U + U R (1 - exp(-(X / U - 1) / R))."""
  # The bound keeps exp finite; so far beyond R the value does not change any more.
  excess = jnp.expm1(jnp.minimum(ln_x - ln_unique, 50.0))
  return ln_unique + jnp.log1p(-r * jnp.expm1(-excess / r))


class OverTraining(Law):
  """L(C, M) = E + (a M^eta + b M^-eta) C^-eta at M = D / N tokens per parameter (Gadre et al. 2024, eq. 4).

  It is Chinchilla with alpha = beta = 2 eta: over-training shifts the curve without a change of its slope.
  """

  source = 'Gadre et al. 2024, arXiv:2403.08540, equation 4'
  form = 'E + (a M^eta + b M^-eta) C^-eta'
  inputs = ('flops', 'tokens_per_param')
  E = coefficient('irreducible loss, nats per token', (0.1, 0.5, 0.9))
  a = coefficient('size of the finite-model term', flops='eta', tokens_per_param='-eta')
  b = coefficient('size of the finite-data term', flops='eta', tokens_per_param='eta')
  eta = exponent('exponent of C', (0.05, 0.1, 0.2, 0.4))

  def predict(self, p, x):
    grow = jnp.exp(-p.eta * (x.ln_flops - x.ln_tokens_per_param))
    shrink = jnp.exp(-p.eta * (x.ln_flops + x.ln_tokens_per_param))
    return p.E + p.a * grow + p.b * shrink


class Routed(Law):
  """log10 L = a log10 N + b log10 X + c log10 N log10 X + d, X the saturating count of experts (Clark 2022).

  1 / X = 1 / (experts - 1 + 1 / (1 / X_start - 1 / X_max)) + 1 / X_max. N is the size of the dense model, which
  has 1 expert. Logarithms are to base 10, as in the paper, whose N is without embeddings.
  """

  source = 'Clark et al. 2022, arXiv:2202.01169, equations 7 and 8'
  form = '10^(a log N + b log X + c log N log X + d)'
  inputs = ('params', 'experts')
  a = Parameter('slope in N', start=(-0.15, -0.08), positive=False, low=-2.0, high=2.0)
  b = Parameter('slope in experts', start=(-0.2, -0.05), positive=False, low=-2.0, high=2.0)
  c = Parameter(
    'how N dulls the gain from experts', start=(0.0, 0.02), positive=False, low=-1.0, high=1.0
  )
  d = Parameter('offset', start=(0.8, 1.5), positive=False, low=-20.0, high=20.0)
  X_start = Parameter('experts that count for one', start=(1.5, 4.0), low=0.0, high=5.0)
  X_max = Parameter('experts beyond which none counts', start=(100.0, 1000.0), low=2.0, high=20.0)

  def predict(self, p, x):
    first = 1 / (1 / p.X_start - 1 / p.X_max)
    ln_x = -jnp.log(1 / (x.experts - 1 + first) + 1 / p.X_max)
    base = jnp.log(10.0)
    log_n, log_x = x.ln_params / base, ln_x / base
    return jnp.exp(base * (p.a * log_n + p.b * log_x + p.c * log_n * log_x + p.d))


class BrokenPower(Law):
  """A power law that bends once: y = E + b C^-c0 (1 + (C / d)^(1 / f))^(-c1 f).

  It is equation 1 of Caballero et al. 2022 with one break.
  """

  source = 'Caballero et al. 2022, arXiv:2210.14891, equation 1 with one break'
  form = 'E + b C^-c0 (1 + (C / d)^(1 / f))^(-c1 f)'
  inputs = ('flops',)
  E = coefficient('limit', (0.1, 0.6))
  b = coefficient('size', (0.3, 1.0), flops='c0')
  c0 = exponent('slope before the break', (0.05, 0.3), low=-2.0)
  c1 = exponent('added slope after the break', (-0.1, 0.2, 0.6), low=-2.0)
  d = Parameter('where it breaks', {'flops': 1}, (0.1, 1.0, 10.0), low=-8.0, high=8.0)
  f = Parameter('width of the break, e-folds', start=(0.2, 1.0), low=-4.0, high=2.0)

  def predict(self, p, x):
    bend = jnp.logaddexp(0.0, (x.ln_flops - jnp.log(p.d)) / p.f)
    return p.E + p.b * jnp.exp(-p.c0 * x.ln_flops - p.c1 * p.f * bend)


class ComputeOptimal(Law):
  """L*(C) = E + K / C^gamma, the loss along the compute-optimal frontier.

  It follows from the law of Hoffmann et al. 2022.
  """

  source = 'follows from Hoffmann et al. 2022, equations 2 and 4'
  form = 'E + K / C^gamma'
  inputs = ('flops',)
  E = coefficient('irreducible loss, nats per token', (0.1, 0.5, 0.9))
  K = coefficient('size of the reducible loss', flops='gamma')
  gamma = exponent('exponent of C', (0.05, 0.15, 0.3))

  def predict(self, p, x):
    return p.E + p.K * jnp.exp(-p.gamma * x.ln_flops)
