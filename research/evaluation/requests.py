"""What may be asked of a model, the field's four kinds of request, and what it may answer.

The kinds are those of EleutherAI's lm-eval: the log-likelihood of a continuation, the log-likelihood of a whole
text, generation until a stop, and the embedding of a text. Log-likelihoods are in nats.
"""

import dataclasses

import numpy as np

from research.inference.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
  """How likely is `continuation` after `context`?"""

  context: str
  continuation: str


@dataclasses.dataclass(frozen=True)
class TokensLogLikelihood:
  """The same of token ids, for a caller that splits its text itself. Nothing is put in front of them."""

  context: tuple[int, ...]
  continuation: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RollingLogLikelihood:
  """How likely is a whole text, of any length? It is scored in windows: see `Settings.stride`."""

  text: str


@dataclasses.dataclass(frozen=True)
class GenerateUntil:
  """What comes after `context`?

  Attributes:
    until: the text ends before the first of these; an end-of-text token ends it as well.
    max_tokens: it ends after so many tokens in any case.
    sampling: how a token is chosen; the likeliest by default.
  """

  context: str
  until: tuple[str, ...] = ('\n',)
  max_tokens: int = 64
  sampling: Sampling = dataclasses.field(default_factory=Sampling)


@dataclasses.dataclass(frozen=True)
class Embed:
  """Where does a text lie? The model's last features, before its head.

  Attributes:
    pooling: 'mean' over the tokens, or the 'last' one's.
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
    text: without the stop.
    tokens: how many were generated.
    stopped: whether a stop or an end-of-text token ended it, and not `max_tokens`.
    cut: how many tokens of the context were cut off on the left.
  """

  text: str
  tokens: int
  stopped: bool
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Embedding:
  """The answer to `Embed`: float32 [embed]; `cut` as in the others."""

  vector: np.ndarray
  cut: int = 0


@dataclasses.dataclass(frozen=True)
class Failed:
  """A request that has no answer, and why."""

  reason: str


Answer = Likelihood | Generation | Embedding | Failed
