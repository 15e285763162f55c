"""The loss of reward models, which learn a score for answers from which of two answers people chose."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from research.training.preferences import Pairs, of_segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class BradleyTerry(Pairs):
  """-log sigma(score of the chosen answer - score of the rejected answer - margin).

  Ouyang et al. (2022), arXiv:2203.02155, equation 1. The margin is that of Touvron et al. (2023),
  arXiv:2307.09288, equation 2, here one number for all pairs. The model's head is `heads.ScalarHead`. The score
  of an answer is the output at the position that predicts its last token: there the model has read all of the
  answer but EOS.

  Attributes:
    margin: the least difference of scores at which a pair counts as learned.
    center: weight of (sum of the two scores)^2, which keeps scores around 0 (Eisenstein et al. 2023,
      arXiv:2312.09244, section 2).
  """

  margin: float = 0.0
  center: float = 0.0

  wants: ClassVar[str] = 'scores'

  def __call__(self, model, features, batch, chunks):
    segments = batch['decoder_segment_ids']
    weights = batch['decoder_loss_weights'].astype(jnp.float32)
    # The last target of a segment is the one before another segment begins.
    after = jnp.pad(segments[:, 1:], ((0, 0), (0, 1)))
    last = weights * (segments != after)
    scores = model.readout()(features)[..., 0]
    chosen, rejected = of_segments(scores * last, segments)
    # 1 for a pair whose two answers are in the row, and 0 for the entries beyond the row's last pair.
    both = of_segments(last, segments)
    present = both[0] * both[1]
    difference = chosen - rejected
    cost = self.center * (chosen + rejected) ** 2 - jax.nn.log_sigmoid(difference - self.margin)
    counts = {
      'weight': present,
      'accuracy': present * (difference > 0),
      'margin': present * difference,
      'chosen': present * chosen,
      'rejected': present * rejected,
    }
    return {'loss': jnp.sum(present * cost)}, {k: jnp.sum(v) for k, v in counts.items()}
