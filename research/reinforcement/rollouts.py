"""Rollouts: completions that the policy draws, what they are worth, and the rows that it learns from.

A round is drawn by the newest parameters, scored, and gone through in `updates` batches, `epochs` times. It is
a function of the run's seed, of the parameters, and of the little that `state` tells, so a run that is started
again from a checkpoint draws the same round to the bit.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid, UserError
from research.data.encoding import make_encoding
from research.data.mixtures import streams_of
from research.inference.sampling import Sampling
from research.parallel.axes import axis_size
from research.reinforcement import losses
from research.reinforcement.advantages import Advantages, Group, Round
from research.reinforcement.losses import PolicyGradient
from research.reinforcement.penalty import KL
from research.reinforcement.prompts import Prompts
from research.reinforcement.reward import Reward
from research.reinforcement.sampler import Reader, Rows, Sampler
from research.training.experience import Experience, Opened

TOKENS = ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids', 'positions')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts(Experience):
  """What a run of reinforcement trains on: `Run.train = @rollouts.Rollouts()`.

  The tokenizer is that of `Run.validation`, the temperature that of the run's loss, and a batch has
  `Run.batch_size` completions.

  Attributes:
    prompts: what the policy is asked.
    reward: what a completion is worth.
    group: completions of each prompt.
    length: tokens of a row, which holds a prompt and its completion.
    max_tokens: the most tokens of a completion.
    stop: a text of one token that ends a completion, beside the end-of-text token; None for no other.
    top_k, top_p, min_p: filters of the draw, as of `Sampling`. The policy that learns is the one before them.
    advantages: how scores become advantages.
    reference: a model that the policy is compared with; None for none.
    penalty: takes the divergence from the reference off the reward.
    updates: batches of a round.
    epochs: how often a round is gone through.
    resample: draws at most so many times as many prompts as a round needs, and leaves out those whose
      completions all have one score (DAPO's dynamic sampling, arXiv:2503.14476, section 3.2).
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

  def __post_init__(self):
    for field in ('group', 'length', 'max_tokens', 'updates', 'epochs', 'resample'):
      value = getattr(self, field)
      if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise Invalid(Rollouts, field, f'{value!r} must be a positive whole number.')
    kinds = {'prompts': Prompts, 'reward': Reward, 'advantages': Advantages}
    for field, kind in kinds.items():
      if not isinstance(getattr(self, field), kind):
        why = f'{getattr(self, field)!r} is none: bind one with @ and its parentheses.'
        raise Invalid(Rollouts, field, why)
    if self.max_tokens >= self.length:
      why = f'{self.max_tokens} leave no room for a prompt in rows of {self.length} tokens.'
      raise Invalid(Rollouts, 'max_tokens', why)
    if self.penalty is not None and self.reference is None:
      raise Invalid(Rollouts, 'penalty', 'is of a reference: set Rollouts.reference.')
    if self.group < 2 and not self.advantages.reads_values:
      why = f'{self.group} completion has no others to be compared with: 2 or more, or use GAE.'
      raise Invalid(Rollouts, 'group', why)

  @property
  def name(self) -> str:
    return f'rollouts-{self.prompts.name}'

  @property
  def lengths(self) -> dict[str, int]:
    return {'targets': self.length}

  @property
  def round_steps(self) -> int:
    return self.updates * self.epochs

  @property
  def reads_values(self) -> bool:
    return self.advantages.reads_values

  def shapes(self, length: int) -> dict[str, tuple]:
    keys = [losses.ADVANTAGES, losses.OLD]
    if self.reference is not None:
      keys.append(losses.REFERENCE)
    if self.reads_values:
      keys += [losses.VALUES, losses.RETURNS]
    return {key: ((length,), np.dtype(np.float32)) for key in keys}

  def open(self, run) -> 'OpenedRollouts':
    self._check(run)
    return OpenedRollouts(self, run)

  def _check(self, run) -> None:
    if jax.process_count() > 1:
      why = 'rollouts are drawn by one process, and this run has several.'
      raise Invalid(type(run), 'train', why)
    if not isinstance(run.loss, PolicyGradient):
      why = (
        f'{type(run.loss).__name__} learns from no rollouts: set @losses.PolicyGradient() or PPO().'
      )
      raise Invalid(type(run), 'loss', why)
    if self.reads_values != (losses.VALUES in run.loss.reads):
      wanted = 'PPO and GAE go together'
      raise Invalid(Rollouts, 'advantages', f'does not suit {type(run.loss).__name__}: {wanted}.')
    if run.curriculum:
      raise Invalid(type(run), 'curriculum', 'rollouts have rows of one kind; leave it empty.')
    rows = run.batch_size * self.updates
    if rows % self.group:
      why = f'{self.group} does not divide the {rows} completions of a round.'
      raise Invalid(Rollouts, 'group', why)
    if (rows // self.group) % axis_size('batch'):
      devices = axis_size('batch')
      why = (
        f'the {rows // self.group} prompts of a round cannot be divided by the {devices} devices.'
      )
      raise Invalid(type(run), 'batch_size', why)
    for field in ('steps', 'checkpoint_every', 'eval_every'):
      value = getattr(run, field)
      if value is not None and value % self.round_steps:
        why = f'{value} is no multiple of the {self.round_steps} updates of a round.'
        raise Invalid(type(run), field, why)


class OpenedRollouts(Opened):
  """The rollouts of a run."""

  def __init__(self, rollouts: Rollouts, run):
    self.rollouts = rollouts
    self.seed = run.seed
    self.batch_size = run.batch_size
    stream = streams_of(run.validation)[0]
    if stream.registered:
      why = 'a registered task does not say its tokenizer; use a stream of the project.'
      raise Invalid(type(run), 'validation', why)
    self.encoding = make_encoding(stream.vocabulary)
    self.vocab_size = self.encoding.size
    self.manifest = {'vocabulary': f'offset={getattr(self.encoding, "offset", 0)}'}
    length = (rollouts.length,)
    integers = {f'decoder_{key}': (length, np.dtype(np.int32)) for key in TOKENS}
    self.features = integers | rollouts.shapes(rollouts.length)
    self.sampling = Sampling(
      temperature=run.loss.temperature,
      top_k=rollouts.top_k,
      top_p=rollouts.top_p,
      min_p=rollouts.min_p,
    )
    self.groups = run.batch_size * rollouts.updates // rollouts.group
    self.asked = 0  # prompts
    self.weight = rollouts.penalty.weight if rollouts.penalty else 0.0

  def epochs(self, examples: int) -> dict[str, float]:
    total = getattr(self.rollouts.prompts, 'lines', None)
    return {self.rollouts.name: self.asked / len(total) if total else 0.0}

  def state(self) -> dict:
    return {'asked': self.asked, 'weight': self.weight}

  def restore(self, state: dict) -> None:
    self.asked = state['asked']
    self.weight = state['weight']

  def batches(
    self, program, start: int, params: Callable[[], dict]
  ) -> Iterator[tuple[dict, dict[str, float]]]:
    rollouts = self.rollouts
    sampler = Sampler(
      program.graphdef,
      self.encoding,
      self.sampling,
      rollouts.length,
      rollouts.max_tokens,
      rollouts.stop,
    )
    policy = Reader(program.graphdef, self.sampling.temperature, rollouts.reads_values)
    reference = reference_params = None
    if rollouts.reference is not None:
      reference = Reader.of(rollouts.reference.abstract, self.sampling.temperature)
      reference_params = rollouts.reference.params()
    number = start // rollouts.round_steps
    while True:
      now = params()
      rows, scores, told = self._draw(sampler, now)
      divergence = rows.mask * 0.0
      if reference is not None:
        log_probs, _ = reference(reference_params, rows)
        rows.arrays[losses.REFERENCE] = log_probs * rows.mask
        divergence = (rows.log_probs - log_probs) * rows.mask
        told['kl'] = float(divergence.sum(1).mean())
      values = policy(now, rows)[1] if rollouts.reads_values else None
      advantages, returns = rollouts.advantages(
        Round(scores, self.weight * divergence, rows.mask, values)
      )
      rows.arrays[losses.ADVANTAGES] = advantages.astype(np.float32)
      if values is not None:
        rows.arrays[losses.VALUES] = values * rows.mask
        rows.arrays[losses.RETURNS] = returns.astype(np.float32)
      if rollouts.penalty is not None:
        told['kl_weight'] = self.weight
        self.weight = rollouts.penalty.adapted(self.weight, told['kl'], len(rows.mask))
      yield from self._cut(rows, told, number)
      number += 1

  def _cut(self, rows: Rows, told: dict, number: int) -> Iterator[tuple[dict, dict]]:
    """The batches of a round: in every epoch its rows in another order."""
    batch = rows.batch()
    for epoch in range(self.rollouts.epochs):
      order = np.arange(len(rows.mask))
      if self.rollouts.round_steps > 1:
        np.random.default_rng((self.seed, number, epoch)).shuffle(order)
      for part in np.split(order, self.rollouts.updates):
        yield {key: value[part] for key, value in batch.items()}, told

  def _draw(self, sampler: Sampler, params: dict) -> tuple[Rows, np.ndarray, dict[str, float]]:
    """A round's rows, their scores [groups, size], and what a row of metrics says of them."""
    size = self.rollouts.group
    kept, left = [], []
    told = []
    for _ in range(self.rollouts.resample):
      numbers = self.asked + np.arange(self.groups)
      self.asked += self.groups
      prompts = [self.rollouts.prompts.at(self.seed, int(number)) for number in numbers]
      rows = sampler(params, prompts, seeds_of(self.seed, numbers, size))
      scores = self._score(rows).reshape(-1, size)
      told.append(_told(rows, scores))
      for i in range(self.groups):
        informative = _spread(scores[i]) > 1e-6
        (kept if informative else left).append((rows.group(i, size), scores[i]))
      if len(kept) >= self.groups:
        break
    chosen = (kept + left)[: self.groups]
    told = {name: float(np.mean([each[name] for each in told])) for name in told[0]}
    return Rows.joined([rows for rows, _ in chosen]), np.stack([s for _, s in chosen]), told

  def _score(self, rows: Rows) -> np.ndarray:
    scores = np.asarray(self.rollouts.reward(rows.prompts, rows.completions), np.float64)
    name = type(self.rollouts.reward).__name__
    if scores.shape != (len(rows.completions),) or np.isinf(scores).any():
      raise UserError(
        f'the reward {name} gave {scores.shape} scores for {len(rows.completions)} completions, or an infinite '
        'one: a finite number for each is wanted, or NaN where it abstains.'
      )
    if np.isnan(scores).all():
      raise UserError(
        f'the reward {name} abstained on every completion of a round: look at its prompts.'
      )
    return scores


def _spread(scores: np.ndarray) -> float:
  """The largest difference of the scores that are there."""
  there = scores[~np.isnan(scores)]
  return float(there.max() - there.min()) if len(there) else 0.0


def seeds_of(seed: int, numbers: np.ndarray, size: int) -> np.ndarray:
  """A seed [prompts, size] for each completion, by the run's seed and the prompt's number."""
  rows = [np.random.SeedSequence((seed, int(n))).generate_state(size, np.uint32) for n in numbers]
  return (np.stack(rows) >> 1).astype(np.int32)


def _told(rows: Rows, scores: np.ndarray) -> dict[str, float]:
  tokens = max(rows.mask.sum(), 1)
  return {
    'reward': float(np.nanmean(scores)),
    'abstained': float(np.isnan(scores).mean()),
    'equal_groups': float(np.mean([_spread(group) <= 1e-6 for group in scores])),
    'completion_length': float(rows.mask.sum(1).mean()),
    'stopped': float(np.mean([c.finish == 'stop_token' for c in rows.completions])),
    'entropy': float(rows.entropy.sum() / tokens),
    'kept_probability': float(rows.kept.sum() / tokens),
  }
