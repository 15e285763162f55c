"""What is asked of an engine, and what it answers: plain values."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from research.core.errors import Invalid
from research.inference.sampling import Sampling

# Which tokens may come next, given the tokens generated so far: a bool array [vocab].
Mask = Callable[[Sequence[int]], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One prompt and how to go on from it.

  Attributes:
    prompt: token ids that the decoder reads; of an encoder-decoder, what it starts with.
    encoder: token ids that the encoder reads; empty for a decoder.
    max_tokens: the most tokens to generate.
    sampling: how they are chosen.
    stop_tokens: ids that end the text; the id itself is part of the answer's tokens.
    stop: strings that end the text; neither they nor what follows is part of the answer's text.
    top: how many of the likeliest tokens to tell at each place, with their log-probabilities.
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
  """What was generated for a request.

  Attributes:
    tokens: the ids, with the stop token where one ended it.
    text: of the tokens, without what stopped it; empty where the engine has no tokenizer.
    logprobs: of each token, by the model's own distribution (before penalties, temperature and filters).
    top: for each token, (id, log-probability) of the likeliest ones.
    finish: why it ended: 'stop_token', 'stop' (a string), 'length', or 'error'; empty until then.
    error: what went wrong, in a sentence.
  """

  tokens: list[int] = dataclasses.field(default_factory=list)
  text: str = ''
  logprobs: list[float] = dataclasses.field(default_factory=list)
  top: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
  finish: str = ''
  error: str = ''
