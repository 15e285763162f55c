"""Samples completions of prompts into rows, and reads the log-probabilities of rows by a model."""

import dataclasses
import functools

import jax
import numpy as np
from flax import nnx

from research.core.errors import UserError
from research.data.encoding import Encoding
from research.inference.batch_sampler import draw_answers, padded_length
from research.inference.graph import graph_of, merge
from research.inference.request import Completion
from research.inference.sampling import Sampling
from research.parallel import hosts
from research.reinforcement.losses import OLD
from research.reinforcement.prompts import Prompt
from research.training.cross_entropy import choose_chunks, log_probabilities

BEGIN = 0  # the id that every row of this project begins with


@dataclasses.dataclass
class Rows:
  """Rows [rows, length], each with a prompt and its completion.

  Attributes:
    tokens: int32 ids; 0 behind the completion.
    real: 1 on tokens, 0 behind them.
    mask: 1 on the tokens of completions.
    log_probs: of the completions by the policy that sampled them, 0 elsewhere.
    entropy, kept: as in `batch_sampler.Drawn`, 0 outside of completions.
    arrays: the other arrays that a loss reads, by key.
  """

  prompts: list[Prompt]
  completions: list[Completion]
  tokens: np.ndarray
  real: np.ndarray
  mask: np.ndarray
  log_probs: np.ndarray
  entropy: np.ndarray
  kept: np.ndarray
  arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

  ARRAYS = ('tokens', 'real', 'mask', 'log_probs', 'entropy', 'kept')

  def group(self, number: int, size: int) -> 'Rows':
    """The completions of prompt `number`, where each prompt has `size`."""
    part = slice(number * size, (number + 1) * size)
    arrays = {name: getattr(self, name)[part] for name in self.ARRAYS}
    return Rows(self.prompts[part], self.completions[part], **arrays)

  @classmethod
  def joined(cls, parts: list['Rows']) -> 'Rows':
    """All rows of the parts, in order."""
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.ARRAYS}
    prompts = [prompt for part in parts for prompt in part.prompts]
    completions = [completion for part in parts for completion in part.completions]
    return cls(prompts, completions, **arrays)

  def batch(self) -> dict[str, np.ndarray]:
    """The arrays that a train step reads, by seqio's keys and those of `losses`."""
    positions = np.arange(self.tokens.shape[1], dtype=np.int32) * self.real
    # Inputs are the targets, shifted by one behind the first id.
    inputs = np.pad(self.tokens[:, :-1], ((0, 0), (1, 0)), constant_values=BEGIN) * self.real
    return {
      'decoder_input_tokens': inputs,
      'decoder_target_tokens': self.tokens,
      'decoder_loss_weights': self.mask,
      'decoder_segment_ids': self.real,
      'decoder_positions': positions,
      OLD: self.log_probs,
      **self.arrays,
    }


class Sampler:
  """Samples completions.

  Args:
    graphdef: of the policy.
    encoding: its tokenizer.
    settings: of the sampling.
    length: tokens of a row.
    max_tokens: the most tokens of a completion.
    stops: ids that end a completion.
  """

  def __init__(
    self,
    graphdef: nnx.GraphDef,
    encoding: Encoding,
    settings: Sampling,
    length: int,
    max_tokens: int,
    stops: list[int],
  ):
    self.graphdef = graphdef
    self.encoding = encoding
    self.settings = settings
    self.length = length
    self.max_tokens = max_tokens
    self.stops = stops

  def padded(self, prompts: list[Prompt]) -> int:
    """The length to which these prompts are padded."""
    return padded_length([(BEGIN, *self._ids(prompt)) for prompt in prompts], self.length + 1)

  def __call__(
    self, params: dict, prompts: list[Prompt], seeds: np.ndarray, length: int = 0
  ) -> Rows:
    """Rows of completions: one for each seed of each prompt.

    Args:
      seeds: int32 [prompts, completions of each].
      length: to which the prompts are padded; 0 is `padded`.

    Raises:
      UserError: a prompt is empty, or does not leave room for a completion.
    """
    prompt_ids = [self._ids(prompt) for prompt in prompts]
    drawn = draw_answers(
      self.graphdef, params, [(BEGIN, *ids) for ids in prompt_ids], seeds, self.settings,
      most=self.max_tokens, room=self.length + 1, stops=self.stops, length=length,
    )  # fmt: skip
    count = seeds.shape[1]
    shape = seeds.size, self.length
    arrays = {name: np.zeros(shape, np.int32) for name in ('tokens', 'real', 'mask')}
    arrays |= {name: np.zeros(shape, np.float32) for name in ('log_probs', 'entropy', 'kept')}
    completions = []
    for row in range(seeds.size):
      ids = prompt_ids[row // count]  # the completions of a prompt are next to each other
      n = int(drawn.mask[row].sum())
      completion = slice(len(ids), len(ids) + n)
      arrays['tokens'][row, : len(ids)] = ids
      arrays['tokens'][row, completion] = drawn.tokens[row, :n]
      arrays['real'][row, : completion.stop] = 1
      arrays['mask'][row, completion] = 1
      for name in ('log_probs', 'entropy', 'kept'):
        arrays[name][row, completion] = getattr(drawn, name)[row, :n]
      completions.append(self._completion(drawn, row, n))
    repeated = [prompt for prompt in prompts for _ in range(count)]
    return Rows(repeated, completions, **arrays)

  def _ids(self, prompt: Prompt) -> list[int]:
    ids = self.encoding.encode(prompt.text)
    if not ids or len(ids) + self.max_tokens > self.length:
      raise UserError(
        f'the prompt {prompt.text[:60]!r} has {len(ids)} tokens; rows of {self.length} tokens have room for 1 '
        f'to {self.length - self.max_tokens} and a completion of {self.max_tokens}: raise Rollouts.length, or '
        'leave the prompt out.'
      )
    return ids

  def _completion(self, drawn, row: int, n: int) -> Completion:
    tokens = drawn.tokens[row, :n].tolist()
    stopped = bool(drawn.stopped[row])
    return Completion(
      tokens=tokens,
      text=self.encoding.decode(tokens[:-1] if stopped else tokens),  # without the stop
      logprobs=drawn.log_probs[row, :n].tolist(),
      finish='stop_token' if stopped else 'length',
    )


class Reader:
  """Reads the log-probabilities of all tokens of rows by a model, and its values if it has a value head.

  Args:
    graphdef: of the model.
    temperature: the logits are divided by it.
    values: whether to read values.
  """

  def __init__(self, graphdef: nnx.GraphDef, temperature: float, values: bool = False):
    self.graphdef = graph_of(graphdef)
    self.temperature = temperature
    self.values = values

  def __call__(self, params: dict, rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    """(log-probabilities, values or None), host arrays [rows, length]."""
    # Weights and advantages do not change what a model reads.
    keys = [
      f'decoder_{key}' for key in ('input_tokens', 'target_tokens', 'segment_ids', 'positions')
    ]
    batch = rows.batch()
    batch = hosts.place({key: batch[key] for key in keys})
    read = _read(self.graphdef, params, batch, temperature=self.temperature, values=self.values)
    log_probs, values = jax.device_get(read)
    return np.asarray(log_probs), values if values is None else np.asarray(values)


@functools.partial(jax.jit, static_argnames=('graphdef', 'temperature', 'values'))
def _read(graphdef, params: dict, batch: dict, *, temperature: float, values: bool):
  model = merge(graphdef, params)
  features, _ = model.features(batch)
  readout = model.readout()
  # Logits of the whole batch would not fit: a part of the length at a time, as in training.
  chunks = choose_chunks(*features.shape[:2], model.vocab)
  targets = batch['decoder_target_tokens']
  log_probs = log_probabilities(
    lambda x: readout(x) / temperature, features, targets, chunks=chunks
  )
  return log_probs, model.values(features) if values else None
