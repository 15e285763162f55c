"""Made-up rows of the laws of later stages: law name -> (true parameters, inputs, options of the fit)."""

import numpy as np

from research.scaling import laws

_RNG = np.random.default_rng(1)
_ROWS = 60
_N = np.exp(_RNG.uniform(np.log(1e7), np.log(1e10), _ROWS))
_D = _N * np.exp(_RNG.uniform(np.log(5), np.log(500), _ROWS))
_TUNING = np.exp(_RNG.uniform(np.log(1e3), np.log(1e7), _ROWS))
_KL = np.linspace(0.0, 150.0, _ROWS)
_SUPERVISED = 1.8 + 400 / _N**0.34 + 410 / _D**0.28

LATER_CASES = {
  'AccuracyOfCompute': (
    {'floor': 0.25, 'ceiling': 0.9, 'k': 0.9, 'C_half': 1e21},
    {'flops': np.geomspace(1e18, 1e24, _ROWS)},
    {},
  ),
  'CoverageOfSamples': (
    {'a': 4.0, 'b': 0.35},
    {'k': np.geomspace(1, 1e4, _ROWS)},
    {},
  ),
  'BestOfNReward': ({'a': 0.9, 'b': 0.08}, {'kl': _KL}, {}),
  'ReinforcementReward': ({'a': 0.8, 'b': 0.3}, {'kl': _KL}, {}),
  'RewardOfCompute': (
    {'R_0': 0.35, 'A': 0.61, 'B': 1.92, 'C_mid': 2542.0},
    {'flops': np.geomspace(100, 50_000, _ROWS)},
    {},
  ),
  'DataTransferred': (
    laws.published('hernandez 2021, text to python')[1],
    {'tuning_data': _TUNING, 'params': _N},
    {},
  ),
  'MultiplicativeTuning': (
    {'A': 6.0, 'E': 1.1, 'a': 0.12, 'b': 0.09},
    {'scale': _N, 'tuning_data': _TUNING},
    {},
  ),
  'RectifiedTuning': (
    {'E': 1.5, 'drop': 2.0, 'D_0': 3000.0, 'beta': 0.6},
    {'tuning_data': np.append(np.geomspace(200, 1.6e6, _ROWS - 1), 0.0)},
    {},
  ),
  'Distillation': (
    {'c_0': 2.5, 'c_1': 1.5, 'd_1': 0.8, 'f_1': 0.3, 'A': 3000.0, 'B': 30000.0, 'alpha': 0.48,
     'beta': 0.48, 'gamma': 0.75},
    {
      'params': _N, 'tokens': _D, 'supervised_loss': _SUPERVISED,
      'teacher_loss': _SUPERVISED * _RNG.uniform(0.4, 1.3, _ROWS),
    },
    {},
  ),
  'QuantizationAwareTraining': (
    laws.published('chen 2025, W4A4')[1],
    {'params': _N, 'tokens': _D, 'group': np.exp2(_RNG.integers(5, 12, _ROWS)).astype(float)},
    {},
  ),
}  # fmt: skip
