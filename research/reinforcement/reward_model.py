"""The reward of a trained reward model, a model with `heads.ScalarHead` (`training.rewards`)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid
from research.data.encoding import Encoding, make_encoding
from research.evaluation import loading
from research.inference.graph import Graph, graph_of, merge
from research.inference.padding import padded_length
from research.parallel.mesh import Mesh
from research.reinforcement.reward import Reward


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(Reward):
  """The score of a prompt and its completion, read where the last token is predicted, as in training.

  The reward model's own tokenizer encodes the text. A completion that stopped by itself gets an end-of-text
  token. Prompts must have the form of its training data, with the chat template if those had one.

  Attributes:
    model: the reward model's run.
    longest: the most tokens of a prompt and its completion.
  """

  model: Pretrained
  longest: int = 1024

  @functools.cached_property
  def _encoding(self) -> Encoding:
    return make_encoding(loading.vocabulary_of(loading.open_folder(self.model.folder).run))

  @functools.cached_property
  def _opened(self) -> tuple[Graph, dict]:
    """(the model, its parameters) under the mesh in use, which has one device."""
    if self.model.abstract.head.gives != 'scores':
      why = f'{self.model.folder} gives logits, not scores: train it with @rewards.BradleyTerry().'
      raise Invalid(RewardModel, 'model', why)
    return graph_of(nnx.graphdef(self.model.abstract)), self.model.params()

  def __call__(self, prompts, completions):
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
      ids = self._encoding.encode(prompt.text + completion.text)
      rows.append(ids + [self._encoding.end] * (completion.finish == 'stop_token'))
    longest = max(map(len, rows))
    if longest > self.longest:
      why = (
        f'a prompt and its completion have {longest} tokens, more than {self.longest}: raise it.'
      )
      raise Invalid(RewardModel, 'longest', why)
    tokens, real = np.zeros((2, len(rows), padded_length(longest, self.longest)), np.int32)
    for i, ids in enumerate(rows):
      # Shifted by one: the model reads the token before each one, and only predicts the last.
      tokens[i, 1 : len(ids)] = ids[:-1]
      real[i, : len(ids)] = 1
    batch = {'decoder_input_tokens': tokens, 'decoder_segment_ids': real}
    with Mesh().use(jax.devices()[:1]):
      scores = _scores(*self._opened, batch)
      return np.asarray(jax.device_get(scores), np.float64)


@functools.partial(jax.jit, static_argnames='graph')
def _scores(graph, params: dict, batch: dict) -> jax.Array:
  """The score [rows] at the last token of each row."""
  model = merge(graph, params)
  features, _ = model.features(batch)
  scores = model.readout()(features)[..., 0]
  last = jnp.sum(batch['decoder_segment_ids'], axis=1) - 1
  return jnp.take_along_axis(scores, last[:, None], axis=1)[:, 0]
