"""All laws, and how to find one by its name."""

from research.core.errors import did_you_mean
from research.scaling.laws.alignment import (
  BestOfNReward,
  ReinforcementReward,
  RewardOfCompute,
  kl_of_best_of_n,
)
from research.scaling.laws.base import Law, LawError, Parameter, coefficient, exponent, share
from research.scaling.laws.downstream import (
  AccuracyOfCompute,
  AccuracyOfLoss,
  CoverageOfSamples,
  ErrorOfLoss,
  LossOfCompute,
)
from research.scaling.laws.hyper import (
  BatchOfCompute,
  CriticalBatch,
  LearningRateOfCompute,
  StepLawBatch,
  StepLawLearningRate,
  StepsToLoss,
)
from research.scaling.laws.kaplan import (
  Kaplan,
  KaplanCompute,
  KaplanCriticalBatch,
  KaplanParams,
  KaplanTokens,
)
from research.scaling.laws.loss import Chinchilla, GammaChinchilla, TiedChinchilla, hoffmann_starts
from research.scaling.laws.precision import (
  PostTrainingQuantization,
  Precision,
  QuantizationAwareTraining,
)
from research.scaling.laws.published import PUBLISHED, published
from research.scaling.laws.regimes import (
  BrokenPower,
  ComputeOptimal,
  DataConstrained,
  OverTraining,
  Routed,
)
from research.scaling.laws.schedule import MultiPower
from research.scaling.laws.tuning import (
  DataTransferred,
  Distillation,
  MultiplicativeTuning,
  RectifiedTuning,
)

__all__ = [
  'PUBLISHED',
  'AccuracyOfCompute',
  'AccuracyOfLoss',
  'BatchOfCompute',
  'BestOfNReward',
  'BrokenPower',
  'Chinchilla',
  'ComputeOptimal',
  'CoverageOfSamples',
  'CriticalBatch',
  'DataConstrained',
  'DataTransferred',
  'Distillation',
  'ErrorOfLoss',
  'GammaChinchilla',
  'Kaplan',
  'KaplanCompute',
  'KaplanCriticalBatch',
  'KaplanParams',
  'KaplanTokens',
  'Law',
  'LawError',
  'LearningRateOfCompute',
  'LossOfCompute',
  'MultiPower',
  'MultiplicativeTuning',
  'OverTraining',
  'Parameter',
  'PostTrainingQuantization',
  'Precision',
  'QuantizationAwareTraining',
  'RectifiedTuning',
  'ReinforcementReward',
  'RewardOfCompute',
  'Routed',
  'StepLawBatch',
  'StepLawLearningRate',
  'StepsToLoss',
  'TiedChinchilla',
  'by_name',
  'coefficient',
  'exponent',
  'hoffmann_starts',
  'kl_of_best_of_n',
  'published',
  'share',
  'standard',
]


def standard() -> list[Law]:
  """An instance of each law of this package that needs no arguments."""
  kinds = (value for value in globals().values() if isinstance(value, type))
  return [kind() for kind in kinds if issubclass(kind, Law) and kind not in (Law, MultiPower)]


def by_name(name: str) -> Law:
  """The law of that name, in any case.

  Raises:
    LawError: there is none; the message suggests the nearest name.
  """
  known = {law.name.lower(): law for law in standard()}
  if name.lower() not in known:
    raise LawError(
      f'There is no law {name!r}.{did_you_mean(name, [law.name for law in standard()])}'
    )
  return known[name.lower()]
