"""The true reward of the study, its texts, and an evaluation that keeps both rewards and the KL divergence.

A text is 4 letters of a prompt and 24 of a completion, out of 8 letters, drawn by a Markov chain. The gold
reward of a completion is the sum of a value for each two letters in a row, in standard deviations of the
chain's texts, less half a unit for each distinct pair of letters under 17. So the chain's texts say little of
what repetition costs, and a proxy that saw few pairs does not know it.
"""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from research.evaluation import loading
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from research.reinforcement.prompts import Prompts
from research.reinforcement.rounds import Rounds, seeds_of
from research.reinforcement.sampler import Reader

LETTERS = 'abcdefgh'
PROMPT = 4
COMPLETION = 24
DISTINCT = 17  # the median of the chain's texts
REPETITION = 0.5
CERTAINTY = 2.0  # log-odds of a label for each unit of gold: about a fifth of all labels are wrong


@functools.cache
def tables() -> tuple[np.ndarray, np.ndarray, float, float]:
  """(transitions [8, 8], values [8, 8], mean and standard deviation of the summed values)."""
  rng = np.random.default_rng(0)
  size = len(LETTERS)
  transitions = rng.dirichlet(np.ones(size), size=size)
  values = rng.normal(size=(size, size))
  sums = summed(draw(transitions, 20_000, rng)[:, PROMPT:], values)
  return transitions, values, float(sums.mean()), float(sums.std())


def draw(transitions: np.ndarray, count: int, rng) -> np.ndarray:
  """Texts of the chain, numbers of letters [count, PROMPT + COMPLETION]."""
  size = len(LETTERS)
  texts = np.zeros((count, PROMPT + COMPLETION), int)
  texts[:, 0] = rng.integers(size, size=count)
  cumulated = transitions.cumsum(1)
  for i in range(1, texts.shape[1]):
    above = rng.random((count, 1)) > cumulated[texts[:, i - 1]]
    texts[:, i] = np.minimum(above.sum(1), size - 1)
  return texts


def summed(texts: np.ndarray, values: np.ndarray) -> np.ndarray:
  """The sum of the values of two letters in a row, [texts]."""
  return values[texts[:, :-1], texts[:, 1:]].sum(1)


def gold(completion: str) -> float:
  """The gold reward. Characters that are no letters of the chain are left out."""
  _, values, mean, deviation = tables()
  numbers = np.array([LETTERS.index(letter) for letter in completion if letter in LETTERS], int)
  total = summed(numbers[None], values)[0] if len(numbers) > 1 else 0.0
  distinct = len(set(zip(numbers[:-1].tolist(), numbers[1:].tolist(), strict=True)))
  return (total - mean) / deviation - REPETITION * max(0, DISTINCT - distinct)


def texts(count: int, seed: int) -> list[str]:
  """`count` texts of the chain."""
  drawn = draw(tables()[0], count, np.random.default_rng((1, seed)))
  return [''.join(LETTERS[number] for number in text) for text in drawn]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """Samples completions, and gives the mean gold and proxy reward and KL from the reference, in nats, of them.

  Attributes:
    prompts: where the prompts come from.
    examples, samples: prompts, and completions of each.
  """

  prompts: Prompts
  examples: int = 64
  samples: int = 4
  name: str = 'judged'
  during: bool = True

  @property
  def labels(self) -> tuple[str, ...]:
    return ('judged',)

  def columns(self, run, params: dict, step: int, folder, log) -> dict:
    """See `training.evaluations.Evaluation`."""
    rounds = Rounds(run.train, run)
    reference = run.train.reference
    with Mesh().use(jax.local_devices()[:1]):
      graphdef = nnx.graphdef(loading.abstract_model(run.model))
      prompts = [self.prompts.draw(1, number) for number in range(self.examples)]
      seeds = seeds_of(1, np.arange(self.examples), self.samples)
      sampler = rounds.sampler(graphdef, Sampling(temperature=1.0))
      rows = sampler(loading.on_devices(run.model, params), prompts, seeds)
      read = Reader(nnx.graphdef(reference.abstract), 1.0)
      expected, _ = read(reference.params(), rows)
    kl = ((rows.log_probs - expected) * rows.mask).sum(1)
    values = {
      'gold': float(np.mean([gold(completion.text) for completion in rows.completions])),
      'proxy': float(np.mean(run.train.reward(rows.prompts, rows.completions))),
      'kl': float(kl.mean()),
    }
    log(f'step {step:,}: ' + ', '.join(f'{name} {value:.4g}' for name, value in values.items()))
    return {f'eval/judged/{name}': value for name, value in values.items()}
