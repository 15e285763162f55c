"""The text of a model at an endpoint: prompts and conversations to ids, and what each id spells."""

import functools
from collections.abc import Sequence

import llguidance

from research.core.errors import UserError
from research.data import conversations
from research.data.encoding import (
  ByteEncoding,
  Encoding,
  HuggingFaceEncoding,
  SentencePieceEncoding,
)
from research.evaluation.folder_encoding import FolderEncoding


class Vocabulary:
  """A tokenizer, with the bytes of every token.

  Args:
    encoding: of the model.
    start: ids in front of every conversation; of a run 0, of another's model what its template spells.
    ends: ids that end a text.
    whole: whether a conversation is split into tokens as a whole, as transformers does; else turn by turn, as
      a run's conversations were.
  """

  def __init__(
    self, encoding: Encoding, start: tuple[int, ...], ends: tuple[int, ...], whole: bool
  ):
    self.encoding, self.start, self.ends, self.whole = encoding, start, ends, whole

  def decode(self, ids: Sequence[int]) -> str:
    return self.encoding.decode(list(ids))

  def of_conversation(self, parts: Sequence[str]) -> tuple[int, ...]:
    """The ids of a conversation's parts; `conversations.EOS` in them is the end-of-text token."""
    texts = [''.join(parts)] if self.whole else parts
    ids = list(self.start)
    for text in texts:
      for number, piece in enumerate(text.split(conversations.EOS)):
        ids += [self.encoding.end] if number else []
        ids += self.encoding.encode(piece) if piece else []
    return tuple(ids)

  @property
  def tokens(self) -> list[bytes]:
    """What each id spells; a special token its name. The first time it takes seconds where there are many."""
    return self._table[0]

  @property
  def special(self) -> list[int]:
    """Ids that are no part of a text."""
    return self._table[1]

  @functools.cached_property
  def _table(self) -> tuple[list[bytes], list[int]]:
    """(tokens, special ids)."""
    if isinstance(self.encoding, ByteEncoding):
      return _of_bytes(self.encoding)
    if isinstance(self.encoding, HuggingFaceEncoding):
      tokens, special = _of_json(self.encoding.tokenizer.to_str())
      offset = self.encoding.offset
      return [b'<pad>'] * offset + tokens, [*range(offset), *(i + offset for i in special)]
    if isinstance(self.encoding, SentencePieceEncoding):
      return _of_sentencepiece(self.encoding.model)
    if isinstance(self.encoding, FolderEncoding):
      file = self.encoding.folder / 'tokenizer.json'
      if file.is_file():
        return _of_json(file.read_text())
    raise UserError(
      'what the tokens of this tokenizer spell is not known: use a tokenizer.json for logprobs, tools and '
      'response_format.'
    )

  def spell(self, token: int) -> bytes:
    """What one id spells; nothing for an id that only fills the model's logits up."""
    return self.tokens[token] if token < len(self.tokens) else b''

  @functools.cached_property
  def matcher_tokenizer(self) -> llguidance.LLTokenizer:
    """What a grammar is matched with."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Wrapped(self)))


class _Wrapped:
  """The attributes that llguidance asks of a tokenizer."""

  bos_token_id = None

  def __init__(self, vocabulary: Vocabulary):
    self.tokens = vocabulary.tokens
    self.eos_token_id = vocabulary.ends[0] if vocabulary.ends else vocabulary.encoding.end
    self.special_token_ids = vocabulary.special
    self.encode = vocabulary.encoding.encode

  def __call__(self, text: str) -> list[int]:
    if isinstance(text, bytes):  # llguidance asks whether bytes are understood
      raise TypeError
    ids = self.encode(text)
    # SentencePiece drops spaces, and then a grammar would lose its place.
    same = b''.join(self.tokens[i] for i in ids) == text.encode()
    return ids if same else self._longest_first(text.encode())

  @functools.cached_property
  def _ids(self) -> dict[bytes, int]:
    special = set(self.special_token_ids)
    return {spelt: i for i, spelt in enumerate(self.tokens) if spelt and i not in special}

  def _longest_first(self, text: bytes) -> list[int]:
    """Tokens that spell a text exactly: at each place the longest."""
    longest = max(map(len, self._ids))
    ids, start = [], 0
    while start < len(text):
      lengths = range(min(longest, len(text) - start), 0, -1)
      length = next((n for n in lengths if text[start : start + n] in self._ids), None)
      if length is None:  # no token spells this byte
        return ids
      ids.append(self._ids[text[start : start + length]])
      start += length
    return ids


def _of_bytes(encoding: ByteEncoding) -> tuple[list[bytes], list[int]]:
  names = [b'<pad>', b'</s>', b'<unk>']
  tokens = names + [bytes([byte]) for byte in range(encoding.size - len(names))]
  return tokens, [*range(len(names))]


def _of_json(text: str) -> tuple[list[bytes], list[int]]:
  try:
    read = llguidance.LLTokenizer(text)
  except ValueError as error:
    raise UserError(
      f'what the tokens of this tokenizer.json spell is not known ({error}); logprobs, tools and '
      'response_format need it.'
    ) from error
  ids = range(read.vocab_size)
  return [bytes(read.decode_bytes([i])) for i in ids], [i for i in ids if read.is_special_token(i)]


def _of_sentencepiece(model) -> tuple[list[bytes], list[int]]:
  def spelt(i: int) -> bytes:
    piece = model.id_to_piece(i)
    if model.is_byte(i):
      return bytes([int(piece[3:-1], 16)])  # <0x0A>
    return piece.replace('\u2581', ' ').encode()

  ids = range(model.get_piece_size())
  special = [i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)]
  return [spelt(i) for i in ids], special
