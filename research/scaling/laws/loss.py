"""Laws of the loss in parameters N, tokens D and compute C."""

import itertools

import jax.numpy as jnp
import numpy as np

from research.scaling.laws.base import Law, Parameter, coefficient, exponent


class Chinchilla(Law):
  """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, equation 2)."""

  source = 'Hoffmann et al. 2022, arXiv:2203.15556, equation 2'
  form = 'E + A / N^alpha + B / D^beta'
  inputs = ('params', 'tokens')
  E = coefficient('irreducible loss, nats per token', (0.1, 0.5, 0.9))
  A = coefficient('size of the finite-model term', params='alpha')
  B = coefficient('size of the finite-data term', tokens='beta')
  alpha = exponent('exponent of N')
  beta = exponent('exponent of D')

  def predict(self, p, x):
    return p.E + p.A * jnp.exp(-p.alpha * x.ln_params) + p.B * jnp.exp(-p.beta * x.ln_tokens)


def hoffmann_starts() -> dict[str, np.ndarray]:
  """The 4500 starts of Hoffmann et al. 2022, appendix D.3, as natural values of `Chinchilla`.

  alpha, beta in {0, .5, ..., 2}, ln E in {-1, -.5, ..., 1}, ln A and ln B in {0, 5, ..., 25}.
  """
  exponents = np.arange(0, 2.01, 0.5)
  floors = np.arange(-1, 1.01, 0.5)
  sizes = np.arange(0, 25.1, 5.0)
  grid = np.array(list(itertools.product(exponents, exponents, floors, sizes, sizes)))
  alpha, beta, e, a, b = grid.T
  return {'E': np.exp(e), 'A': np.exp(a), 'B': np.exp(b), 'alpha': alpha, 'beta': beta}


class TiedChinchilla(Law):
  """Chinchilla with alpha = beta: one parameter fewer, for sweeps too small to tell them apart.

  Muennighoff et al. 2023 (arXiv:2305.16264, appendix A) fit this form. N* and D* both grow as C^.5.
  """

  source = 'Muennighoff et al. 2023, arXiv:2305.16264, appendix A'
  form = 'E + A / N^alpha + B / D^alpha'
  inputs = ('params', 'tokens')
  E = coefficient('irreducible loss, nats per token', (0.1, 0.5, 0.9))
  A = coefficient('size of the finite-model term', params='alpha')
  B = coefficient('size of the finite-data term', tokens='alpha')
  alpha = exponent('exponent of N and of D', (0.1, 0.2, 0.35, 0.5, 0.8))

  def predict(self, p, x):
    return p.E + p.A * jnp.exp(-p.alpha * x.ln_params) + p.B * jnp.exp(-p.alpha * x.ln_tokens)


class GammaChinchilla(Law):
  """L(N, D) = E + (A / N^alpha + B / D^beta)^gamma; gamma = 1 is Chinchilla.

  With E = 0 and gamma = beta it is the form of Kaplan et al. 2020 (equation 1.5).
  """

  source = 'Chinchilla with an outer exponent; Kaplan et al. 2020, equation 1.5, is its E = 0 case'
  form = 'E + (A / N^alpha + B / D^beta)^gamma'
  inputs = ('params', 'tokens')
  E = coefficient('irreducible loss, nats per token', (0.1, 0.5, 0.9))
  A = Parameter('size of the finite-model term', {'params': 'alpha'}, (0.1, 0.5, 1.5))
  B = Parameter('size of the finite-data term', {'tokens': 'beta'}, (0.1, 0.5, 1.5))
  alpha = exponent('exponent of N')
  beta = exponent('exponent of D')
  gamma = Parameter('outer exponent', start=(0.5, 1.0, 2.0), low=-3.0, high=2.5)

  def predict(self, p, x):
    inner = p.A * jnp.exp(-p.alpha * x.ln_params) + p.B * jnp.exp(-p.beta * x.ln_tokens)
    return p.E + inner**p.gamma
