"""Published parameters, as (law, values). N and D are counts unless a name says otherwise."""

from research.core.errors import did_you_mean
from research.scaling.laws.base import Law, LawError
from research.scaling.laws.hyper import (
  BatchOfCompute,
  CriticalBatch,
  LearningRateOfCompute,
  StepLawBatch,
  StepLawLearningRate,
)
from research.scaling.laws.kaplan import (
  Kaplan,
  KaplanCompute,
  KaplanCriticalBatch,
  KaplanParams,
  KaplanTokens,
)
from research.scaling.laws.loss import Chinchilla
from research.scaling.laws.precision import QuantizationAwareTraining
from research.scaling.laws.regimes import DataConstrained, Routed
from research.scaling.laws.tuning import DataTransferred

PUBLISHED: dict[str, tuple[type[Law], dict[str, float]]] = {
  'hoffmann 2022': (Chinchilla, {'E': 1.69, 'A': 406.4, 'B': 410.7, 'alpha': 0.34, 'beta': 0.28}),
  'besiroglu 2024': (
    Chinchilla,
    {'E': 1.8169, 'A': 482.01, 'B': 2085.43, 'alpha': 0.3478, 'beta': 0.3658},
  ),
  'kaplan 2020, N': (KaplanParams, {'N_c': 8.8e13, 'alpha_N': 0.076}),
  'kaplan 2020, D': (KaplanTokens, {'D_c': 5.4e13, 'alpha_D': 0.095}),
  'kaplan 2020, C in PF-days': (KaplanCompute, {'C_c': 3.1e8, 'alpha_C': 0.050}),
  'kaplan 2020': (Kaplan, {'N_c': 6.4e13, 'D_c': 1.8e13, 'alpha_N': 0.076, 'alpha_D': 0.103}),
  'kaplan 2020, B_crit': (KaplanCriticalBatch, {'B_star': 2.1e8, 'power': 1 / 0.21}),
  'muennighoff 2023': (
    DataConstrained,
    # ln A = 6.255414, ln B = 7.3049974, ln E = 0.6254804 in the paper's code and appendix.
    {
      'E': 1.869144,
      'A': 520.8264,
      'B': 1487.688,
      'alpha': 0.3526596,
      'beta': 0.3526596,
      'R_D': 15.387756,
      'R_N': 5.309743,
    },
  ),
  'clark 2022, s-base': (
    Routed,
    {'a': -0.082, 'b': -0.108, 'c': 0.009, 'd': 1.104, 'X_start': 1.847, 'X_max': 314.478},
  ),
  'zhang 2024, N in millions': (CriticalBatch, {'c': 93.20, 'a': 0.468}),
  'deepseek 2024, learning rate': (LearningRateOfCompute, {'c': 0.3118, 'a': 0.1250}),
  'deepseek 2024, batch': (BatchOfCompute, {'c': 0.2920, 'a': 0.3271}),
  'step law 2025, learning rate': (StepLawLearningRate, {'c': 1.79, 'a': 0.713, 'b': 0.307}),
  'step law 2025, batch': (StepLawBatch, {'c': 0.58, 'b': 0.571}),
  'hernandez 2021, text to python': (DataTransferred, {'k': 1.9e4, 'a': 0.18, 'b': 0.38}),
  'hernandez 2021, text and code to python': (DataTransferred, {'k': 2.1e5, 'a': 0.096, 'b': 0.38}),
  'chen 2025, W4A4': (
    QuantizationAwareTraining,
    {'k': 0.1582, 'g_N': 0.2186, 'g_D': 0.0745, 'g_G': 0.7779},
  ),
  'chen 2025, W4A16': (
    QuantizationAwareTraining,
    {'k': 0.2522, 'g_N': 0.3589, 'g_D': 0.1610, 'g_G': 0.3533},
  ),
  'chen 2025, W16A4': (
    QuantizationAwareTraining,
    {'k': 0.1004, 'g_N': 0.1816, 'g_D': 0.0331, 'g_G': 0.9812},
  ),
}


def published(name: str) -> tuple[Law, dict[str, float]]:
  """(law, parameters) by name, such as 'hoffmann 2022'. Raises LawError for an unknown name."""
  if name not in PUBLISHED:
    raise LawError(f'No published parameters named {name!r}.{did_you_mean(name, PUBLISHED)}')
  law, values = PUBLISHED[name]
  return law(), dict(values)
