"""Best-of-n: the completion with the highest reward out of n.

It is the simplest way to optimise a reward, and the baseline of all others. Its KL divergence from the policy
is `laws.kl_of_best_of_n(n)` nats (Stiennon et al. 2020, arXiv:2009.01325, appendix G.3).
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from research.core import configs
from research.core.errors import UserError
from research.inference.request import Completion
from research.reinforcement.prompts import Prompt
from research.reinforcement.reward import Reward


def choose(
  prompt: str | Prompt, completions: Sequence[Completion], *, reward: Reward
) -> tuple[Completion, list[float | None]]:
  """(the completion with the highest score, the scores of all).

  Of equal scores the first counts. A score is None where the reward abstains.

  Raises:
    UserError: the reward abstains on all of them.
  """
  prompt = Prompt(prompt) if isinstance(prompt, str) else prompt
  scores = np.asarray(reward([prompt] * len(completions), completions), np.float64)
  if np.isnan(scores).all():
    raise UserError(
      f'{type(reward).__name__} abstains on all {len(completions)} answers to {prompt.text[:60]!r}.'
    )
  best = int(np.nanargmax(scores))  # the first of equal ones
  return completions[best], [None if np.isnan(score) else float(score) for score in scores]


def by_reward(file: str) -> Callable:
  """`choose` with the REWARD of a gin file.

  Raises:
    UserError: there is no such file, or its REWARD is not a reward.
  """
  reward = configs.load(file, root='REWARD').build()
  if not isinstance(reward, Reward):
    raise UserError(f'{file}: REWARD is {reward!r}; bind a reward, such as @reward.Format.')
  return functools.partial(choose, reward=reward)
