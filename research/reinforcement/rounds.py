"""The rounds of a run of reinforcement learning: completions are sampled and scored, and become rows."""

from collections.abc import Callable, Iterator

import numpy as np
from flax import nnx

from research.core.errors import Invalid, UserError
from research.data.encoding import make_encoding
from research.data.mixtures import streams_of
from research.inference.sampling import Sampling
from research.reinforcement import losses
from research.reinforcement.advantages import EQUAL, Round
from research.reinforcement.sampler import Reader, Rows, Sampler
from research.training.experience import Opened

TOKENS = ('input_tokens', 'target_tokens', 'loss_weights', 'segment_ids', 'positions')


class Rounds(Opened):
  """The rollouts of a run that trains; see `training.experience.Opened`.

  Attributes:
    rollouts: the settings, a `rollouts.Rollouts`.
    asked: how many prompts were used so far, which is the number of the next prompt.
    weight: the present weight of the KL penalty.
  """

  def __init__(self, rollouts, run):
    stream = streams_of(run.validation)[0]
    if stream.registered:
      why = 'a registered seqio task does not say its tokenizer: use a stream with a corpus.'
      raise Invalid(type(run), 'validation', why)
    self.rollouts = rollouts
    self.seed = run.seed
    self.groups = run.batch_size * rollouts.updates // rollouts.group
    self.asked = 0
    self.weight = rollouts.penalty.weight if rollouts.penalty else 0.0
    self.encoding = make_encoding(stream.vocabulary)
    self.stops = self._stops()
    self.settings = Sampling(
      temperature=run.loss.temperature,
      top_k=rollouts.top_k,
      top_p=rollouts.top_p,
      min_p=rollouts.min_p,
    )
    self.vocab_size = self.encoding.size
    self.manifest = {'vocabulary': f'offset={getattr(self.encoding, "offset", 0)}'}
    integers = {f'decoder_{key}': ((rollouts.length,), np.dtype(np.int32)) for key in TOKENS}
    self.features = integers | rollouts.shapes(rollouts.length)

  def _stops(self) -> list[int]:
    """The ids that end a completion: end-of-text, and that of `Rollouts.stop`."""
    stop = self.rollouts.stop
    if stop is None:
      return [self.encoding.end]
    ids = self.encoding.encode(stop)
    if len(ids) != 1:
      why = f'{stop!r} is {len(ids)} tokens of this vocabulary, and must be one.'
      raise Invalid(type(self.rollouts), 'stop', why)
    return [self.encoding.end, *ids]

  def epochs(self, examples: int) -> dict[str, float]:
    # Generated prompts are endless: they have no epochs.
    lines = getattr(self.rollouts.prompts, 'lines', None)
    return {self.rollouts.name: self.asked / len(lines) if lines else 0.0}

  def state(self) -> dict:
    return {'asked': self.asked, 'weight': self.weight}

  def restore(self, state: dict) -> None:
    self.asked = state['asked']
    self.weight = state['weight']

  def sampler(self, graphdef: nnx.GraphDef, settings: Sampling) -> Sampler:
    """A sampler of completions by a model of this graph."""
    rollouts = self.rollouts
    return Sampler(
      graphdef, self.encoding, settings, rollouts.length, rollouts.max_tokens, self.stops
    )

  def batches(
    self, program, start: int, params: Callable[[], dict]
  ) -> Iterator[tuple[dict, dict[str, float]]]:
    rollouts = self.rollouts
    sampler = self.sampler(program.graphdef, self.settings)
    read_policy = Reader(program.graphdef, self.settings.temperature, rollouts.reads_values)
    read_reference = None
    reference = None
    if rollouts.reference is not None:
      graphdef = nnx.graphdef(rollouts.reference.abstract)
      read_reference = Reader(graphdef, self.settings.temperature)
      reference = rollouts.reference.params()
    number = start // rollouts.round_steps
    while True:
      policy = params()  # the newest ones: a round is on-policy when it is sampled
      rows, scores, metrics = self.draw(sampler, policy)
      divergence = np.zeros(rows.mask.shape)
      if read_reference is not None:
        log_probs, _ = read_reference(reference, rows)
        rows.arrays[losses.REFERENCE] = log_probs * rows.mask
        divergence = (rows.log_probs - log_probs) * rows.mask
        metrics['kl'] = float(divergence.sum(1).mean())
      # Read by the policy that sampled: PPO clips its new values around them.
      values = read_policy(policy, rows)[1] if rollouts.reads_values else None
      self._add_advantages(rows, Round(scores, self.weight * divergence, rows.mask, values))
      # The weight changes after its round, so that a round has one weight.
      if rollouts.penalty is not None:
        metrics['kl_weight'] = self.weight
        self.weight = rollouts.penalty.adapted(self.weight, metrics['kl'], len(rows.mask))
      for batch in self._cut(rows.batch(), number):
        yield batch, metrics
      number += 1

  def _add_advantages(self, rows: Rows, batch: Round) -> None:
    """Adds the arrays that a loss reads: advantages, and values with their targets."""
    advantages, returns = self.rollouts.advantages(batch)
    rows.arrays[losses.ADVANTAGES] = advantages.astype(np.float32)
    if batch.values is not None:
      rows.arrays[losses.VALUES] = batch.values * rows.mask
      rows.arrays[losses.RETURNS] = returns.astype(np.float32)

  def _cut(self, rows: dict[str, np.ndarray], number: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches of round `number`. Every epoch has the rows in another order."""
    order = np.arange(len(rows['decoder_loss_weights']))
    # One batch and one epoch keep the groups in their order. Otherwise a batch mixes prompts.
    for epoch in range(self.rollouts.epochs):
      if self.rollouts.round_steps > 1:
        order = np.random.default_rng((self.seed, number, epoch)).permutation(len(order))
      for part in np.split(order, self.rollouts.updates):
        yield {key: value[part] for key, value in rows.items()}

  def draw(self, sampler: Sampler, params: dict) -> tuple[Rows, np.ndarray, dict[str, float]]:
    """(a round's rows, their scores [groups, size], the round's metrics)."""
    size = self.rollouts.group
    informative = []
    equal = []
    metrics = []
    for _ in range(self.rollouts.resample):
      numbers = self.asked + np.arange(self.groups)
      self.asked += self.groups
      prompts = [self.rollouts.prompts.draw(self.seed, int(number)) for number in numbers]
      seeds = seeds_of(self.seed, numbers, size)
      rows = self.rollouts.samplers(sampler, params, prompts, seeds)
      scores = self._score(rows).reshape(-1, size)
      metrics.append(_metrics(rows, scores))
      for i in range(self.groups):
        groups = informative if _spread(scores[i]) > EQUAL else equal
        groups.append((rows.group(i, size), scores[i]))
      if len(informative) >= self.groups:
        break
    # Where too few groups have different scores, others fill the batch. Their advantages are 0.
    chosen = (informative + equal)[: self.groups]
    means = {name: float(np.mean([each[name] for each in metrics])) for name in metrics[0]}
    rows = Rows.joined([rows for rows, _ in chosen])
    return rows, np.stack([scores for _, scores in chosen]), means

  def _score(self, rows: Rows) -> np.ndarray:
    """The scores [rows].

    Raises:
      UserError: there is no score for each row, one is infinite, or the reward abstained on all rows.
    """
    scores = np.asarray(self.rollouts.reward(rows.prompts, rows.completions), np.float64)
    name = type(self.rollouts.reward).__name__
    if scores.shape != (len(rows.completions),) or np.isinf(scores).any():
      raise UserError(
        f'the reward {name} gave {scores.shape} scores for {len(rows.completions)} completions, or an infinite '
        'one: it must give a finite number for each, or NaN where it abstains.'
      )
    # Such a round would teach nothing, in silence.
    if np.isnan(scores).all():
      raise UserError(
        f'the reward {name} abstained on every completion of a round: check its prompts.'
      )
    return scores


def _spread(scores: np.ndarray) -> float:
  """The range of the scores that are not NaN."""
  numbers = scores[~np.isnan(scores)]
  return float(np.ptp(numbers)) if len(numbers) else 0.0


def seeds_of(seed: int, numbers: np.ndarray, size: int) -> np.ndarray:
  """A seed for each completion, from the run's seed and the prompt's number: int32 [prompts, size]."""
  rows = [np.random.SeedSequence((seed, int(n))).generate_state(size, np.uint32) for n in numbers]
  return (np.stack(rows) >> 1).astype(np.int32)  # not negative


def _metrics(rows: Rows, scores: np.ndarray) -> dict[str, float]:
  """The metrics of a round's completions; docs/reinforcement.md says what each one means."""
  tokens = max(rows.mask.sum(), 1)
  return {
    'reward': float(np.nanmean(scores)),
    'abstained': float(np.isnan(scores).mean()),
    'equal_groups': float(np.mean([_spread(group) <= EQUAL for group in scores])),
    'completion_length': float(rows.mask.sum(1).mean()),
    'stopped': float(np.mean([c.finish == 'stop_token' for c in rows.completions])),
    'entropy': float(rows.entropy.sum() / tokens),
    'kept_probability': float(rows.kept.sum() / tokens),
  }
