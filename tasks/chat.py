"""Tokenises conversations by whole turns, with loss on the assistant's turns alone."""

import json

import numpy as np
import seqio

from research.core.errors import UserError
from research.data import conversations
from tasks import vocabularies
from tasks.files import Dropped
from tasks.tokenizers import TokenizerVocabulary


def encode(
  vocabulary: seqio.Vocabulary, template: str | None, length: int, documents: list[bytes]
) -> tuple[list[dict[str, np.ndarray]], Dropped]:
  """Tokens of conversations that fit into rows of `length`.

  Args:
    vocabulary: what tokenises; segments of a template are tokenised one by one, as at generation.
    template: see `research.data.conversations.template`.
    length: tokens of a row.
    documents: JSON messages, then NUL, then their file and line.

  Returns:
    ([{'targets': (tokens,) int32, 'learned': (tokens,) 0 or 1}], what was left out or shortened, by reason).

  Raises:
    UserError: the template or the tokenizer does not suit a conversation; names its file and line.
  """
  render = conversations.template(template)
  special = _special_tokens(vocabulary)
  encoded = []
  dropped = Dropped()
  for document in documents:
    text, _, place = document.decode().partition('\0')
    messages = json.loads(text)
    tokens = _turns(vocabulary, render, special, messages, place)
    fitting = _fitting(tokens, length)
    if fitting < len(tokens):
      what = 'shortened by whole turns' if fitting else 'left out, for the first exchange is longer'
      total = sum(len(ids) for ids, _ in tokens)
      dropped[f'{what} than a row of {length}' if not fitting else what] += 1
      if len(dropped.broken) < 10:
        dropped.broken.append(f'{place}: {total} tokens are more than a row of {length}: {what}')
    if fitting:
      ids, learned = (np.concatenate(side) for side in zip(*tokens[:fitting], strict=True))
      encoded.append({'targets': ids, 'learned': learned})
  return encoded, dropped


def encode_preferences(
  vocabulary: seqio.Vocabulary, template: str | None, length: int, documents: list[bytes]
) -> tuple[list[dict[str, np.ndarray]], Dropped]:
  """Tokens of preferences that fit into rows of `length`, the rejected answer of a pair behind the chosen one.

  Args:
    vocabulary, template, length: as of `encode`.
    documents: JSON of `preferences.read_preference` or `read_judgement`, NUL, and the place where it stood.

  Returns:
    ([{'targets', 'learned', 'part': (tokens,) int32}], what was left out, by reason). `part` is 1 in
    good answers and 2 in bad ones, their prompts included.

  Raises:
    UserError: the template or the tokenizer does not suit a record; names its file and line.
  """
  render = conversations.template(template)
  special = _special_tokens(vocabulary)
  encoded, dropped = [], Dropped()
  for document in documents:
    text, _, place = document.decode().partition('\0')
    sides = []
    for part_number, messages in json.loads(text):
      tokens = _turns(vocabulary, render, special, messages, place)
      ids, learned = (np.concatenate(side) for side in zip(*tokens, strict=True))
      # Turns of the assistant in the prompt were no choice: the answer alone, the last turn, is compared.
      learned[: len(learned) - len(tokens[-1][0])] = 0
      part = np.full(len(ids), part_number, np.int32)
      sides.append({'targets': ids, 'learned': learned, 'part': part})
    whole = {key: np.concatenate([side[key] for side in sides]) for key in sides[0]}
    total = len(whole['targets'])
    if total <= length:
      encoded.append(whole)
      continue
    dropped[f'left out, for they are longer than a row of {length}'] += 1
    if len(dropped.broken) < 10:
      dropped.broken.append(f'{place}: {total} tokens are more than a row of {length}: left out')
  return encoded, dropped


def _special_tokens(vocabulary) -> list[str]:
  if not isinstance(vocabulary, TokenizerVocabulary):
    return []
  added = vocabulary.settings.get('added_tokens') or ()
  return [token['content'] for token in added if token.get('special')]


def _refuse_special(messages, special: list[str], place: str):
  """A message that spells a special token would end its own turn."""
  for number, message in enumerate(messages, 1):
    for token in special:
      if token in message['content']:
        raise UserError(
          f'{place} spells the special token {token!r} in turn {number}, which would be read as one: '
          'take it out.'
        )


def _turns(
  vocabulary, render, special: list[str], messages, place: str
) -> list[tuple[np.ndarray, np.ndarray]]:
  """`_tokens` of every segment of a conversation; what does not suit is told with its file and line."""
  _refuse_special(messages, special, place)
  try:
    parts = conversations.segments(messages, render)
  except conversations.Unsuitable as e:
    raise UserError(f'{place} {e}.') from e
  return [_tokens(vocabulary, part, learned) for part, learned in parts]


def _tokens(vocabulary, text: str, learned: bool) -> tuple[np.ndarray, np.ndarray]:
  """(ids, 1 where they carry a loss) of one segment; nothing after the turn's EOS is learned."""
  pieces = text.split(conversations.EOS)
  ids = []
  for number, piece in enumerate(pieces):
    ids += [[vocabulary.eos_id]] if number else []
    ids += (
      [vocabularies.encode_texts(vocabulary, [piece.encode(errors='replace')])[0]] if piece else []
    )
  joined = np.concatenate([*(np.asarray(i, np.int32) for i in ids), np.zeros(0, np.int32)])
  weights = np.full(len(joined), int(learned), np.int32)
  ends = np.flatnonzero(joined == vocabulary.eos_id)
  if len(ends):
    weights[ends[-1] + 1 :] = 0
  return joined.astype(np.int32), weights


def _fitting(tokens: list[tuple[np.ndarray, np.ndarray]], length: int) -> int:
  """How many segments fit; they come in pairs of what is given and the assistant's turn."""
  total = np.cumsum([len(ids) for ids, _ in tokens])
  return 2 * int((total[1::2] <= length).sum())
