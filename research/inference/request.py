"""Requests to an engine, and its completions: plain values."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from research.core.errors import Invalid
from research.inference.sampling import Sampling

# The error of a request whose next token cannot be chosen.
NOT_NUMBERS = (
  'the logits are not numbers (NaN or infinite), or no token is allowed: check the checkpoint, or the mask and '
  'the biases.'
)
# Maps the tokens generated so far to those that may come next: a bool array [vocab].
Mask = Callable[[Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt, and how to continue it.

  Attributes:
    prompt: token ids that the decoder reads; in an encoder-decoder, those that it starts from.
    encoder: token ids that the encoder reads; empty for a decoder.
    max_tokens: the most tokens to generate.
    sampling: how tokens are chosen.
    stop_tokens: ids that end the text. The id is part of the answer's tokens.
    stop: strings that end the text. Neither the string nor the text after it is part of the answer.
    top: how many of the likeliest tokens to report at each place, with their log-probabilities.
    mask: which tokens may come next (a grammar); None for all.
  """

  prompt: tuple[int, ...]
  encoder: tuple[int, ...] = ()
  max_tokens: int = 64
  sampling: Sampling = dataclasses.field(default_factory=Sampling)
  stop_tokens: tuple[int, ...] = ()
  stop: tuple[str, ...] = ()
  top: int = 0
  mask: Mask | None = None

  def __post_init__(self):
    if not self.prompt:
      raise Invalid(Request, 'prompt', 'it is empty, and a model needs a token to start from.')
    if self.max_tokens < 1:
      raise Invalid(Request, 'max_tokens', f'{self.max_tokens!r} must be 1 or more.')
    if self.top < 0:
      raise Invalid(Request, 'top', f'{self.top!r} must be 0 or more.')
    if '' in self.stop:
      raise Invalid(Request, 'stop', 'an empty string would stop every text before it begins.')


@dataclasses.dataclass
class Completion:
  """The tokens that were generated for a request.

  Attributes:
    tokens: their ids, with the stop token if one ended the text.
    text: their text, without the stop string; empty if the engine has no tokenizer.
    logprobs: each token's log-probability by the model itself (before penalties, temperature and filters).
    top: for each token, (id, log-probability) of the likeliest tokens in its place.
    finish: why it ended: 'stop_token', 'stop' (a string), 'length', or 'error'; empty until then.
    error: what went wrong, in a sentence.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  text: str = ''
  logprobs: list[float] = dataclasses.field(default_factory=list)
  top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
  finish: str = ''
  error: str = ''
