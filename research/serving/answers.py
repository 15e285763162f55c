"""Answers in the protocol's shapes, whole and in pieces."""

import dataclasses
import secrets
import time
from collections.abc import Callable

from research.inference.request import Request
from research.serving.asked import Asked
from research.serving.model_thread import Piece
from research.serving.refusals import Refused, server_error
from research.serving.scoring import Scores
from research.serving.tools import Call, CallReader

LEAST = -9999.0  # the protocol's log-probability of what cannot be; JSON has no infinity
FINISH = {'stop_token': 'stop', 'stop': 'stop', 'length': 'length'}


def check(piece: Piece, request: Request) -> None:
  """Raises Refused where a piece is an error."""
  if piece.finish != 'error':
    return
  if request.mask is not None or request.sampling.logit_bias:
    raise Refused(f'no answer was found: {piece.error}', code='no_token_allowed')
  raise server_error(piece.error)


@dataclasses.dataclass
class Usage:
  """Counts of tokens."""

  prompt: int
  generated: int = 0

  def to_json(self) -> dict:
    return {
      'prompt_tokens': self.prompt,
      'completion_tokens': self.generated,
      'total_tokens': self.prompt + self.generated,
    }


class Spelling:
  """Log-probabilities with the texts of their tokens.

  Args:
    spell: what an id spells, as bytes.
    ends: ids that end a text, which are no part of it.
    top: how many likely tokens are wanted at each place.
  """

  def __init__(self, spell: Callable[[int], bytes], ends: tuple[int, ...], top: int):
    self.spell, self.ends, self.top = spell, set(ends), top

  def pairs(self, piece: Piece) -> list[tuple[int, float, list]]:
    """(id, log-probability, the likeliest) of each token of a piece's text."""
    rows = zip(piece.tokens, piece.logprobs, piece.top, strict=True)
    ended = piece.finish == 'stop_token'
    return [
      (token, p, top[: self.top]) for token, p, top in rows if not (ended and token in self.ends)
    ]

  def text(self, token: int) -> str:
    return self.spell(token).decode(errors='replace')

  def for_chat(self, piece: Piece) -> dict:
    content = [
      {**self._one(token, p), 'top_logprobs': [self._one(t, q) for t, q in top]}
      for token, p, top in self.pairs(piece)
    ]
    return {'content': content, 'refusal': None}

  def _one(self, token: int, p: float) -> dict:
    spelt = self.spell(token)
    return {
      'token': spelt.decode(errors='replace'), 'logprob': max(p, LEAST), 'bytes': list(spelt),
    }  # fmt: skip


class ChatAnswer:
  """Turns pieces of chat answers into deltas.

  Args:
    spelling: None where no log-probabilities are wanted.
  """

  object_name, prefix = 'chat.completion', 'chatcmpl'

  def __init__(self, asked: Asked, spelling: Spelling | None):
    self.asked, self.spelling = asked, spelling
    self.readers = [CallReader(asked.tools) if asked.tools else None for _ in asked.requests]

  def first(self) -> list[dict]:
    """The choices of a chunk that comes before any text."""
    delta = {'role': 'assistant', 'content': ''}
    return [_chat_choice(number, delta) for number in range(len(self.asked.requests))]

  def choices(self, piece: Piece) -> list[dict]:
    """The choices of the chunks that a piece makes; the last of an answer has its finish_reason."""
    text, calls = piece.text, []
    reader = self.readers[piece.number]
    counted = reader.calls if reader else 0
    if reader:
      text, calls = reader.add(piece.text)
      if piece.finish:
        rest, more = reader.finish()
        text, calls = text + rest, calls + more
    told = self.spelling.for_chat(piece) if self.spelling and piece.tokens else None
    choices = []
    if text or (told and told['content']):
      choices.append(_chat_choice(piece.number, {'content': text}, told))
    for number, call in enumerate(calls):
      delta = {'tool_calls': [_call_json(counted + number, call)]}
      choices.append(_chat_choice(piece.number, delta))
    if piece.finish:
      finish = FINISH[piece.finish]
      if reader and reader.calls and finish == 'stop':
        finish = 'tool_calls'
      choices.append(_chat_choice(piece.number, {}, finish=finish))
    return choices

  def whole(self, number: int, choices: list[dict]) -> dict:
    """One choice of an answer that is told at once, from those of its pieces."""
    text = ''.join(choice['delta'].get('content') or '' for choice in choices)
    calls = [call for choice in choices for call in choice['delta'].get('tool_calls', ())]
    for call in calls:
      del call['index']
    message = {'role': 'assistant', 'content': text, 'refusal': None}
    if calls:
      message |= {'content': text or None, 'tool_calls': calls}
    logprobs = None
    if self.spelling:
      told = [choice['logprobs']['content'] for choice in choices if choice['logprobs']]
      logprobs = {'content': [token for some in told for token in some], 'refusal': None}
    finish = choices[-1]['finish_reason']
    return {'index': number, 'message': message, 'logprobs': logprobs, 'finish_reason': finish}


def _chat_choice(number: int, delta: dict, logprobs: dict | None = None, finish=None) -> dict:
  return {'index': number, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish}


def _call_json(index: int, call: Call) -> dict:
  function = {'name': call.name, 'arguments': call.arguments}
  return {'index': index, 'id': call.id, 'type': 'function', 'function': function}


class TextAnswer:
  """Turns pieces of completions into choices. `Scores` of a prompt come first where it is echoed."""

  object_name, prefix = 'text_completion', 'cmpl'

  def __init__(self, asked: Asked, spelling: Spelling | None):
    self.asked, self.spelling = asked, spelling
    self.offsets = [0] * len(asked.requests)

  def first(self) -> list[dict]:
    return []

  def choices(self, piece: Piece) -> list[dict]:
    told = None
    if self.spelling:
      pairs = self.spelling.pairs(piece)
      told = self._logprobs(piece.number, pairs)
    if not (piece.text or piece.finish or (told and told['tokens'])):
      return []
    return [_text_choice(piece.number, piece.text, told, FINISH.get(piece.finish))]

  def echo(self, number: int, tokens, text: str, scores: Scores | None) -> dict:
    """The choice of a prompt that is echoed; its first token has no log-probability."""
    if self.spelling is None or scores is None:
      return _text_choice(number, text, None, None)
    pairs = [(tokens[0], None, []), *zip(tokens[1:], scores.logprobs, scores.top, strict=True)]
    pairs = [(token, p, top[: self.spelling.top]) for token, p, top in pairs]
    return _text_choice(number, text, self._logprobs(number, pairs), None)

  def whole(self, number: int, choices: list[dict]) -> dict:
    text = ''.join(choice['text'] for choice in choices)
    told = [choice['logprobs'] for choice in choices if choice['logprobs']]
    logprobs = None
    if self.spelling:
      keys = ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')
      logprobs = {key: [x for some in told for x in some[key]] for key in keys}
    return _text_choice(number, text, logprobs, choices[-1]['finish_reason'])

  def _logprobs(self, number: int, pairs) -> dict:
    texts = [self.spelling.text(token) for token, _, _ in pairs]
    offsets = []
    for text in texts:
      offsets.append(self.offsets[number])
      self.offsets[number] += len(text)
    tops = []
    for token, p, top in pairs:
      # The protocol tells the token that was chosen as well, likely or not.
      likely = {} if p is None else {self.spelling.text(token): max(p, LEAST)}
      likely = {self.spelling.text(t): max(q, LEAST) for t, q in top} | likely
      tops.append(likely if p is not None and self.spelling.top else None)
    return {
      'tokens': texts,
      'token_logprobs': [None if p is None else max(p, LEAST) for _, p, _ in pairs],
      'top_logprobs': tops,
      'text_offset': offsets,
    }


def _text_choice(number: int, text: str, logprobs: dict | None, finish: str | None) -> dict:
  return {'index': number, 'text': text, 'logprobs': logprobs, 'finish_reason': finish}


def envelope(answer: ChatAnswer | TextAnswer, model: str, chunk: bool) -> dict:
  """What stands around the choices of an answer and of all its chunks."""
  name = answer.object_name
  return {
    'id': f'{answer.prefix}-{secrets.token_hex(12)}',
    'object': f'{name}.chunk' if chunk and name == 'chat.completion' else name,
    'created': int(time.time()),
    'model': model,
  }
