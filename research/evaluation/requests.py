"""The kinds of request that a model answers, and the kinds of answer.

The kinds are those of EleutherAI's lm-eval: the log-likelihood of a continuation, the log-likelihood of a whole
text, generation until a stop, and the embedding of a text. Log-likelihoods are in nats.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from research.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
  """Asks for ln p(continuation | context).

  Attributes:
    alone: whether no other request has this context. Both are then read at once, by one program instead of two.
  """

  context: str
  continuation: str
  alone: bool = False


@dataclasses.dataclass(frozen=True)
class TokensLogLikelihood:
  """Asks for ln p(continuation | context) of token ids, from a caller that splits its text itself.

  The context is read as it is: no beginning-of-text token is put in front.
  """

  alone: ClassVar[bool] = False

  context: tuple[int, ...]
  continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RollingLogLikelihood:
  """Asks for ln p(text) of a whole text of any length. It is scored in windows: see `Settings.stride`."""

  alone: ClassVar[bool] = True

  text: str


@dataclasses.dataclass(frozen=True)
class GenerateUntil:
  """Asks for a continuation of `context`.

  Attributes:
    until: the text ends before the first of these strings. An end-of-text token ends it as well.
    max_tokens: the most tokens of the continuation.
    sampling: how a token is chosen; the likeliest by default.
  """

  context: str
  until: tuple[str, ...] = ('\n',)
  max_tokens: int = 64
  sampling: Sampling = dataclasses.field(default_factory=Sampling)


@dataclasses.dataclass(frozen=True)
class Embed:
  """Asks for the embedding of a text: the model's last features, before its head.

  Attributes:
    pooling: 'mean' over the tokens, or 'last' for the last token's features.
  """

  text: str
  pooling: str = 'mean'


Request = LogLikelihood | TokensLogLikelihood | RollingLogLikelihood | GenerateUntil | Embed


@dataclasses.dataclass(frozen=True)
class Likelihood:
  """The answer to every request for a log-likelihood.

  Attributes:
    nats: the log-likelihood of all scored tokens; negative.
    tokens: how many tokens were scored.
    greedy: whether each of them was the likeliest.
    cut: how many tokens of the context were cut off on the left.
  """

  nats: float
  tokens: int
  greedy: bool
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Generation:
  """The answer to `GenerateUntil`.

  Attributes:
    text: the generated text, without the stop.
    tokens: how many tokens were generated.
    stopped: whether a stop or an end-of-text token ended it, and not `max_tokens`.
    cut: how many tokens of the context were cut off on the left.
  """

  text: str
  tokens: int
  stopped: bool
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Embedding:
  """The answer to `Embed`.

  Attributes:
    vector: float32 [embed].
    cut: how many tokens of the text were cut off on the left.
  """

  vector: np.ndarray
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Failed:
  """The reason why a request has no answer."""

  reason: str


Answer = Likelihood | Generation | Embedding | Failed
