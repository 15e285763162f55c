"""Answers in the protocol's shapes, whole and in pieces."""

import dataclasses
import secrets
import time
from collections.abc import Callable

from research.inference.request import Request
from research.serving.api_errors import ApiError, server_error
from research.serving.engine_requests import EngineRequests
from research.serving.model_thread import Piece
from research.serving.scoring import Scores
from research.serving.tools import Call, CallReader

LEAST = (
  -9999.0
)  # the protocol's log-probability of an impossible token, because JSON has no infinity
# The engine's reasons to end an answer -> the protocol's `finish_reason`.
FINISH = {'stop_token': 'stop', 'stop': 'stop', 'length': 'length'}


def check(piece: Piece, request: Request) -> None:
  """Raises ApiError if a piece reports an error."""
  if piece.finish != 'error':
    return
  if why := getattr(request.mask, 'error', ''):
    raise ApiError(
      f'the schema is too large for this server ({why}): use a smaller one.', code='invalid_schema'
    )
  # If a grammar or a bias can forbid every token, that is the client's error.
  if request.mask is not None or request.sampling.logit_bias:
    raise ApiError(f'no answer was found: {piece.error}', code='no_token_allowed')
  raise server_error(piece.error)


@dataclasses.dataclass
class Usage:
  """Counts of tokens.

  Attributes:
    prompt: the tokens of all prompts.
    generated: the tokens of all answers.
  """

  prompt: int
  generated: int = 0

  def to_json(self) -> dict:
    return {
      'prompt_tokens': self.prompt,
      'completion_tokens': self.generated,
      'total_tokens': self.prompt + self.generated,
    }


class Spelling:
  """Writes log-probabilities with the texts of their tokens.

  Args:
    spell: returns the bytes of an id.
    ends: the ids that end a text and are no part of it.
    top: how many likely tokens the client wants at each place.
  """

  def __init__(self, spell: Callable[[int], bytes], ends: tuple[int, ...], top: int):
    self.spell = spell
    self.ends = set(ends)
    self.top = top

  def rows(self, piece: Piece) -> list[tuple[int, float, list]]:
    """Returns (id, log-probability, likeliest tokens) of each token of a piece's text."""
    rows = zip(piece.tokens, piece.logprobs, piece.top, strict=True)
    ended = piece.finish == 'stop_token'
    return [
      (token, p, top[: self.top]) for token, p, top in rows if not (ended and token in self.ends)
    ]

  def text(self, token: int) -> str:
    # A token may be a part of a character.
    return self.spell(token).decode(errors='replace')

  def for_chat(self, piece: Piece) -> dict:
    """Returns the `logprobs` of a chat's choice."""
    content = [
      {**self._token(token, p), 'top_logprobs': [self._token(t, q) for t, q in top]}
      for token, p, top in self.rows(piece)
    ]
    return {'content': content, 'refusal': None}

  def _token(self, token: int, p: float) -> dict:
    return {
      'token': self.text(token), 'logprob': max(p, LEAST), 'bytes': list(self.spell(token)),
    }  # fmt: skip


class ChatAnswer:
  """Turns the pieces of chat answers into choices with deltas.

  Args:
    requests: the engine's requests.
    spelling: writes log-probabilities; None if the client wants none.
  """

  object_name = 'chat.completion'
  prefix = 'chatcmpl'

  def __init__(self, requests: EngineRequests, spelling: Spelling | None):
    self.requests = requests
    self.spelling = spelling
    names = requests.tools
    self.readers = [CallReader(names) if names else None for _ in requests.requests]

  def first(self) -> list[dict]:
    """Returns the choices that a stream sends before any text."""
    delta = {'role': 'assistant', 'content': ''}
    return [_chat_choice(number, delta) for number in range(len(self.requests.requests))]

  def choices(self, piece: Piece) -> list[dict]:
    """Returns the choices of a piece, each for a chunk. The last one of an answer has its finish_reason."""
    text = piece.text
    calls = []
    reader = self.readers[piece.number]
    calls_before = reader.calls if reader else 0
    if reader:
      text, calls = reader.add(piece.text)
      if piece.finish:
        rest, more = reader.finish()
        text += rest
        calls += more
    logprobs = self.spelling.for_chat(piece) if self.spelling and piece.tokens else None
    choices = []
    # A token may have no certain text yet, but its log-probability is sent with it.
    if text or (logprobs and logprobs['content']):
      choices.append(_chat_choice(piece.number, {'content': text}, logprobs))
    for number, call in enumerate(calls):
      delta = {'tool_calls': [_call_json(calls_before + number, call)]}
      choices.append(_chat_choice(piece.number, delta))
    if piece.finish:
      finish = FINISH[piece.finish]
      if reader and reader.calls and finish == 'stop':
        finish = 'tool_calls'
      choices.append(_chat_choice(piece.number, {}, finish=finish))
    return choices

  def whole(self, number: int, choices: list[dict]) -> dict:
    """Returns the single choice of an answer that is not streamed, from the choices of its pieces."""
    text = ''.join(choice['delta'].get('content') or '' for choice in choices)
    calls = [call for choice in choices for call in choice['delta'].get('tool_calls', ())]
    for call in calls:
      del call['index']  # only deltas have it
    message = {'role': 'assistant', 'content': text, 'refusal': None}
    if calls:
      message |= {'content': text or None, 'tool_calls': calls}
    logprobs = None
    if self.spelling:
      parts = [choice['logprobs']['content'] for choice in choices if choice['logprobs']]
      logprobs = {'content': [token for part in parts for token in part], 'refusal': None}
    finish = choices[-1]['finish_reason']
    return {'index': number, 'message': message, 'logprobs': logprobs, 'finish_reason': finish}


def _chat_choice(
  number: int, delta: dict, logprobs: dict | None = None, finish: str | None = None
) -> dict:
  return {'index': number, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish}


def _call_json(index: int, call: Call) -> dict:
  function = {'name': call.name, 'arguments': call.arguments}
  return {'index': index, 'id': call.id, 'type': 'function', 'function': function}


class TextAnswer:
  """Turns the pieces of completions into choices. `echo` gives the choice of a prompt, which comes first.

  Args:
    requests: the engine's requests.
    spelling: writes log-probabilities; None if the client wants none.
  """

  object_name = 'text_completion'
  prefix = 'cmpl'

  def __init__(self, requests: EngineRequests, spelling: Spelling | None):
    self.requests = requests
    self.spelling = spelling
    self.offsets = [0] * len(requests.requests)  # where the next token's text begins

  def first(self) -> list[dict]:
    """Returns the choices that a stream sends before any text: none."""
    return []

  def choices(self, piece: Piece) -> list[dict]:
    """Returns the choice of a piece, if it says anything."""
    logprobs = None
    if self.spelling:
      logprobs = self._logprobs(piece.number, self.spelling.rows(piece))
    if not (piece.text or piece.finish or (logprobs and logprobs['tokens'])):
      return []
    return [_text_choice(piece.number, piece.text, logprobs, FINISH.get(piece.finish))]

  def echo(self, number: int, tokens, text: str, scores: Scores | None) -> dict:
    """Returns the choice of an echoed prompt. Its first token has no log-probability."""
    if self.spelling is None or scores is None:
      return _text_choice(number, text, None, None)
    rows = [(tokens[0], None, [])]
    for token, p, top in zip(tokens[1:], scores.logprobs, scores.top, strict=True):
      rows.append((token, p, top[: self.spelling.top]))
    return _text_choice(number, text, self._logprobs(number, rows), None)

  def whole(self, number: int, choices: list[dict]) -> dict:
    """Returns the single choice of an answer that is not streamed, from the choices of its pieces."""
    text = ''.join(choice['text'] for choice in choices)
    parts = [choice['logprobs'] for choice in choices if choice['logprobs']]
    logprobs = None
    if self.spelling:
      keys = ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')
      logprobs = {key: [value for part in parts for value in part[key]] for key in keys}
    return _text_choice(number, text, logprobs, choices[-1]['finish_reason'])

  def _logprobs(self, number: int, rows) -> dict:
    """Returns the `logprobs` of a choice, from rows as of `Spelling.rows`."""
    texts = [self.spelling.text(token) for token, _, _ in rows]
    offsets = []
    for text in texts:
      offsets.append(self.offsets[number])
      self.offsets[number] += len(text)
    tops = []
    for token, p, top in rows:
      if p is None or not self.spelling.top:
        tops.append(None)
        continue
      likely = {self.spelling.text(t): max(q, LEAST) for t, q in top}
      # The protocol lists the chosen token too, likely or not.
      likely[self.spelling.text(token)] = max(p, LEAST)
      tops.append(likely)
    return {
      'tokens': texts,
      'token_logprobs': [None if p is None else max(p, LEAST) for _, p, _ in rows],
      'top_logprobs': tops,
      'text_offset': offsets,
    }


def _text_choice(number: int, text: str, logprobs: dict | None, finish: str | None) -> dict:
  return {'index': number, 'text': text, 'logprobs': logprobs, 'finish_reason': finish}


def envelope(answer: ChatAnswer | TextAnswer, model: str, chunk: bool) -> dict:
  """Returns the fields around the choices. All chunks of one answer have the same.

  Args:
    answer: whose class says which object it is.
    model: the model's name.
    chunk: whether it is for the chunks of a stream.
  """
  name = answer.object_name
  return {
    'id': f'{answer.prefix}-{secrets.token_hex(12)}',
    'object': f'{name}.chunk' if chunk and name == 'chat.completion' else name,
    'created': int(time.time()),
    'model': model,
  }
