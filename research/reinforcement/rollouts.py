"""Rollouts: the policy's completions, their scores, and the rows that the policy learns from.

The newest parameters sample a round of completions; the policy then learns from it in `updates` batches,
`epochs` times. A round follows from the run's seed, the parameters and `Rounds.state`, so a run that resumes
from a checkpoint samples the same round to the bit.
"""

import dataclasses

import jax
import numpy as np

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid
from research.parallel.axes import axis_size
from research.reinforcement import losses
from research.reinforcement.advantages import Advantages, Group
from research.reinforcement.losses import PolicyGradient
from research.reinforcement.penalty import KL
from research.reinforcement.prompts import Prompts
from research.reinforcement.reward import Reward
from research.reinforcement.rounds import Rounds
from research.reinforcement.samplers import Samplers
from research.training.experience import Experience


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(Experience):
  """The training data of a run of reinforcement learning: `Run.train = @rollouts.Rollouts()`.

  The tokenizer is that of `Run.validation`, the temperature that of `Run.loss`. A batch has `Run.batch_size`
  completions.

  Attributes:
    prompts: the source of prompts.
    reward: scores the completions.
    group: completions of each prompt.
    length: tokens of a row, which holds a prompt and its completion.
    max_tokens: the most tokens of a completion.
    stop: a text of one token that ends a completion, as the end-of-text token does; None for no other stop.
    top_k, top_p, min_p: filters of the sampling, as in `Sampling`. The policy that learns is unfiltered.
    advantages: turns scores into advantages.
    reference: a model that the policy is compared with; None for none.
    penalty: subtracts the divergence from the reference from the reward.
    updates: batches of a round.
    epochs: how often the policy learns from a round.
    resample: samples at most so many times the prompts of a round, to leave out those whose completions all
      have the same score (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2).
    samplers: where the completions are sampled, and in how many parts: `samplers.OnRay` for a cluster.
  """

  prompts: Prompts
  reward: Reward
  group: int = 8
  length: int = 256
  max_tokens: int = 64
  stop: str | None = None
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  advantages: Advantages = dataclasses.field(default_factory=Group)
  reference: Pretrained | None = None
  penalty: KL | None = None
  updates: int = 1
  epochs: int = 1
  resample: int = 1
  samplers: Samplers = dataclasses.field(default_factory=Samplers)

  def __post_init__(self):
    for field in ('group', 'length', 'max_tokens', 'updates', 'epochs', 'resample'):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Invalid(Rollouts, field, f'{value!r} must be a positive whole number.')
    kinds = {'prompts': Prompts, 'reward': Reward, 'advantages': Advantages, 'samplers': Samplers}
    for field, kind in kinds.items():
      if not isinstance(getattr(self, field), kind):
        why = f'{getattr(self, field)!r} is not of {kind.__name__}: bind one with @ and its parentheses.'
        raise Invalid(Rollouts, field, why)
    if self.max_tokens >= self.length:
      why = f'{self.max_tokens} leave no room for a prompt in rows of {self.length} tokens.'
      raise Invalid(Rollouts, 'max_tokens', why)
    if self.penalty is not None and self.reference is None:
      raise Invalid(Rollouts, 'penalty', 'it needs a reference: set Rollouts.reference.')
    if self.group < 2 and not self.advantages.reads_values:
      why = f'{self.group} completion has no others to compare with: set 2 or more, or use GAE.'
      raise Invalid(Rollouts, 'group', why)

  @property
  def name(self) -> str:
    return f'rollouts-{self.prompts.name}'

  @property
  def lengths(self) -> dict[str, int]:
    return {'targets': self.length}

  @property
  def round_steps(self) -> int:
    """Optimizer steps of a round."""
    return self.updates * self.epochs

  @property
  def reads_values(self) -> bool:
    return self.advantages.reads_values

  def shapes(self, length: int) -> dict[str, tuple]:
    """(shape, type) of each array of a row that a loss reads besides the tokens."""
    keys = [losses.ADVANTAGES, losses.OLD]
    if self.reference is not None:
      keys.append(losses.REFERENCE)
    if self.reads_values:
      keys += [losses.VALUES, losses.RETURNS]
    return {key: ((length,), np.dtype(np.float32)) for key in keys}

  def described(self) -> dict:
    """Fields by name for the identity of a run, which may go on with other samplers of as many parts."""
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    parts = fields.pop('samplers').parts
    return fields | ({'parts': parts} if parts > 1 else {})

  def open(self, run) -> Rounds:
    self._check(run)
    return Rounds(self, run)

  def _check(self, run) -> None:
    if jax.process_count() > 1:
      why = 'only one process samples rollouts, and this run has several.'
      raise Invalid(type(run), 'train', why)
    if not isinstance(run.loss, PolicyGradient):
      name = type(run.loss).__name__
      why = f'{name} does not learn from rollouts: set @losses.PolicyGradient() or PPO().'
      raise Invalid(type(run), 'loss', why)
    if self.reads_values != (losses.VALUES in run.loss.reads):
      why = f'they do not suit {type(run.loss).__name__}: use PPO with GAE, and neither without the other.'
      raise Invalid(Rollouts, 'advantages', why)
    if run.curriculum:
      raise Invalid(type(run), 'curriculum', 'rollouts are one kind of rows: leave it empty.')
    rows = run.batch_size * self.updates
    if rows % self.group:
      why = f'{self.group} does not divide the {rows} completions of a round.'
      raise Invalid(Rollouts, 'group', why)
    prompts = rows // self.group
    if prompts % self.samplers.parts:
      why = f'the {prompts} prompts of a round cannot be divided by {self.samplers.parts}.'
      raise Invalid(type(self.samplers), 'parts', why)
    devices = axis_size('batch')
    if prompts // self.samplers.parts % devices:
      what = 'round' if self.samplers.parts == 1 else 'part'
      count = prompts // self.samplers.parts
      why = f'the {count} prompts of a {what} cannot be divided by the {devices} devices.'
      raise Invalid(type(run), 'batch_size', why)
    # A checkpoint within a round would have to hold its rows.
    for field in ('steps', 'checkpoint_every', 'eval_every'):
      value = getattr(run, field)
      if value is not None and value % self.round_steps:
        why = f'{value} is not a multiple of the {self.round_steps} updates of a round.'
        raise Invalid(type(run), field, why)
