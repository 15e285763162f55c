"""Laws of fine-tuning and distillation: the value of tuning data, of pre-training and of a teacher."""

import jax.numpy as jnp

from research.scaling.laws.base import Law, Parameter, coefficient, exponent


class DataTransferred(Law):
  """Effective data transferred: the data that pre-training is worth, D_T = k D_F^a N^b (Hernandez et al. 2021).

  D_T is the data that training from scratch would need beyond the D_F of the fine-tuning, in the unit of D_F
  (characters in the paper).
  """

  source = 'Hernandez et al. 2021, arXiv:2102.01293, equation 1.1'
  form = 'k D_F^a N^b'
  output = 'data_transferred'
  inputs = ('tuning_data', 'params')
  k = Parameter(
    'size', {'output': 1, 'tuning_data': '-a', 'params': '-b'}, low=-40.0, high=40.0, linear=True
  )
  a = exponent('exponent of D_F: how close the two distributions are', (0.1, 0.4))
  b = exponent('exponent of N', (0.2, 0.5))

  def predict(self, p, x):
    return p.k * jnp.exp(p.a * x.ln_tuning_data + p.b * x.ln_params)


class MultiplicativeTuning(Law):
  """The loss after fine-tuning: A / (X^a D_F^b) + E (Zhang et al. 2024).

  X is what varies beside the tuning data: parameters, pre-training tokens, or the parameters that learn (the
    rank
  of LoRA, the length of a prompt). The factors multiply, so that more of one helps more with more of the other.
  """

  source = 'Zhang et al. 2024, arXiv:2402.17193, equation 1'
  form = 'A / (X^a D_F^b) + E'
  inputs = ('scale', 'tuning_data')
  A = coefficient('size of the reducible loss', scale='a', tuning_data='b')
  E = coefficient('irreducible loss', (0.1, 0.5, 0.9))
  a = exponent('exponent of X', (0.05, 0.3))
  b = exponent('exponent of D_F', (0.05, 0.3))

  def predict(self, p, x):
    return p.A * jnp.exp(-p.a * x.ln_scale - p.b * x.ln_tuning_data) + p.E


class RectifiedTuning(Law):
  """The loss after fine-tuning on D examples: E + drop / (1 + (D / D_0)^beta) (Lin et al. 2024).

  It is their B / (D_l + D^beta) + E with D_l = D_0^beta and B = drop D_l. D may be 0: E + drop is the loss
  before tuning. Below D_0, the data that pre-training is worth, the curve is flat. Above it is a power law.
  """

  source = 'Lin et al. 2024, arXiv:2402.02314, equation 5'
  form = 'E + drop / (1 + (D / D_0)^beta)'
  inputs = ('tuning_data',)
  zeros = ('tuning_data',)
  E = coefficient('irreducible loss', (0.1, 0.5, 0.9))
  # Without a flat part in the data, D_0 goes to zero and only drop D_0^beta is determined: both have wide
  # bounds.
  drop = Parameter(
    'how far tuning can bring the loss down', {'output': 1}, (0.1, 0.5, 5.0), high=40.0
  )
  D_0 = Parameter(
    'data at which half the drop is done',
    {'tuning_data': 1},
    (1e-20, 1e-6, 1e-2, 1.0, 1e2),
    low=-60.0,
  )
  beta = exponent('exponent of D', (0.06, 0.2, 0.5, 1.0))

  def predict(self, p, x):
    return p.E + p.drop / (1 + jnp.exp(p.beta * (x.ln_tuning_data - jnp.log(p.D_0))))


class Distillation(Law):
  """The loss of a distilled student of N parameters on D tokens (Busbridge et al. 2025, equation 8).

  L_T is the teacher's loss, and L_S that of the same student without a teacher (from a supervised law). The
  middle factor is the capacity gap: as L_T falls below d_1 L_S, a better teacher helps less and then harms.
  """

  source = 'Busbridge et al. 2025, arXiv:2502.08606, equation 8'
  form = (
    'L_T + L_T^-c_0 (1 + (L_T / (L_S d_1))^(1 / f_1))^(-c_1 f_1) (A / N^alpha + B / D^beta)^gamma'
  )
  inputs = ('params', 'tokens', 'teacher_loss', 'supervised_loss')
  c_0 = Parameter('power of the teacher', start=(0.5, 2.0), low=-4.0, high=4.0)
  c_1 = Parameter('added power of a strong teacher', start=(0.5, 2.0), low=-5.0, high=5.0)
  d_1 = Parameter(
    'ratio of losses at which a teacher is strong', start=(0.7, 1.3), low=-3.0, high=3.0
  )
  f_1 = Parameter('width of that change', start=(0.15,), low=-5.0, high=2.0)
  A = Parameter('size of the finite-model term', {'params': 'alpha'}, (0.1, 0.5))
  B = Parameter('size of the finite-data term', {'tokens': 'beta'}, (0.1, 0.5))
  alpha = exponent('exponent of N')
  beta = exponent('exponent of D')
  gamma = Parameter('outer exponent', start=(0.7, 1.5), low=-3.0, high=2.5)

  def predict(self, p, x):
    ln_ratio = x.ln_teacher_loss - x.ln_supervised_loss - jnp.log(p.d_1)
    bend = -p.c_1 * p.f_1 * jnp.logaddexp(0.0, ln_ratio / p.f_1)
    student = p.A * jnp.exp(-p.alpha * x.ln_params) + p.B * jnp.exp(-p.beta * x.ln_tokens)
    return x.teacher_loss + jnp.exp(bend - p.c_0 * x.ln_teacher_loss) * student**p.gamma
