"""Evaluates a policy on held-out prompts: its mean reward and its pass@k."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from research.core.errors import Invalid
from research.evaluation import loading
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from research.reinforcement.prompts import Prompts
from research.reinforcement.rollouts import Rollouts
from research.reinforcement.rounds import Rounds, seeds_of
from research.scaling.repeated_sampling import coverage_at


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
  """Samples completions without filters, and scores them by the run's reward.

  Attributes:
    prompts: such as `prompts.Problems` of the split 'validation'.
    examples: the number of prompts.
    samples: completions of each prompt.
    ks: the k of each pass@k.
    passing: a completion passes if its score is above this; 0.5 suits a verifier.
    temperature: of the sampling; 1 is the policy itself.
    name: of its columns, eval/<name>/reward and eval/<name>/pass@k.
    during: whether it runs at each evaluation of the run, and not only at the end.
    seed: of the prompts and of the sampling.
  """

  prompts: Prompts
  examples: int = 256
  samples: int = 4
  ks: tuple[int, ...] = (1, 4)
  passing: float = 0.5
  temperature: float = 1.0
  name: str = 'held_out'
  during: bool = True
  seed: int = 0

  def __post_init__(self):
    object.__setattr__(self, 'ks', tuple(self.ks))
    if not self.ks or not all(1 <= k <= self.samples for k in self.ks):
      why = f'{self.ks} must be numbers from 1 to the {self.samples} samples.'
      raise Invalid(HeldOut, 'ks', why)

  @property
  def labels(self) -> tuple[str, ...]:
    return (self.name,)

  def columns(self, run, params: dict, step: int, folder, log) -> dict:
    """See `training.evaluations.Evaluation`."""
    if not isinstance(run.train, Rollouts):
      raise Invalid(
        HeldOut, 'prompts', 'only a run of reinforcement learning has a reward to judge by.'
      )
    rounds = Rounds(run.train, run)
    # One device, because these prompts need not be a multiple of the run's devices.
    with Mesh().use(jax.local_devices()[:1]):
      graphdef = nnx.graphdef(loading.abstract_model(run.model))
      sampler = rounds.sampler(graphdef, Sampling(temperature=self.temperature))
      prompts = [self.prompts.draw(self.seed, number) for number in range(self.examples)]
      seeds = seeds_of(self.seed, np.arange(self.examples), self.samples)
      rows = sampler(loading.on_devices(run.model, params), prompts, seeds)
    scores = np.asarray(run.train.reward(rows.prompts, rows.completions), np.float64)
    scores = scores.reshape(self.examples, self.samples)
    # A prompt with an abstention is in no mean; the column `prompts` counts the others.
    judged = ~np.isnan(scores).any(axis=1)
    scores = scores[judged]
    columns = {'prompts': int(judged.sum())}
    if len(scores):
      columns['reward'] = float(scores.mean())
      passed = np.sum(scores > self.passing, axis=1)
      shares = coverage_at(np.full(len(scores), self.samples), passed, self.ks)
      columns |= {f'pass@{k}': float(share) for k, share in zip(self.ks, shares, strict=True)}
    log(f'step {step:,}: {self.name} ' + ', '.join(f'{k} {v:.4g}' for k, v in columns.items()))
    return {f'eval/{self.name}/{name}': value for name, value in columns.items()}
