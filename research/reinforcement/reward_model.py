"""The reward of a trained reward model: a model with `heads.ScalarHead` (`training.rewards`)."""

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
  """The score of prompt and completion, read where the last token is predicted, as it was trained.

  It reads the text with its own tokenizer, and end-of-text where the completion has ended. Prompts must be
  written as its training data were: with their chat template, if they had one.

  Attributes:
    model: the folder of its run.
    longest: tokens of prompt and completion.
  """

  model: Pretrained
  longest: int = 1024

  @functools.cached_property
  def _encoding(self) -> Encoding:
    return make_encoding(loading.vocabulary_of(loading.open_folder(self.model.folder).run))

  @functools.cached_property
  def _opened(self) -> tuple[Graph, dict]:
    """(the model, its parameters), under the mesh of one device in use."""
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
      why = f'a prompt and its completion have {longest} tokens, and {self.longest} are allowed.'
      raise Invalid(RewardModel, 'longest', why)
    tokens, real = np.zeros((2, len(rows), padded_length(longest, self.longest)), np.int32)
    for i, ids in enumerate(rows):
      # What is read before each token: the last one is only predicted.
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
