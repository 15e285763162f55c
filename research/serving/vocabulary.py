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

  @functools.cached_property
  def tokens(self) -> list[bytes]:
    """What each id spells; a special token its name. It takes seconds where there are many."""
    if isinstance(self.encoding, ByteEncoding):
      return _bytes(self.encoding)
    if isinstance(self.encoding, HuggingFaceEncoding):
      shifted = _of_json(self.encoding.tokenizer.to_str())
      return [b'<pad>'] * self.encoding.offset + shifted
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

  def special(self) -> list[int]:
    """Ids that are no part of a text."""
    return [i for i in range(len(self.tokens)) if self.tokens[i] and not self.decode([i])]


class _Wrapped:
  """The attributes that llguidance asks of a tokenizer."""

  bos_token_id = None

  def __init__(self, vocabulary: Vocabulary):
    self.tokens = vocabulary.tokens
    self.eos_token_id = vocabulary.ends[0] if vocabulary.ends else vocabulary.encoding.end
    self.special_token_ids = vocabulary.special()
    self.encode = vocabulary.encoding.encode

  def __call__(self, text: str) -> list[int]:
    if isinstance(text, bytes):  # llguidance asks whether bytes are understood
      raise TypeError
    return self.encode(text)


def _bytes(encoding: ByteEncoding) -> list[bytes]:
  names = [b'<pad>', b'</s>', b'<unk>']
  return names + [bytes([byte]) for byte in range(encoding.size - len(names))]


def _of_json(text: str) -> list[bytes]:
  try:
    read = llguidance.LLTokenizer(text)
  except ValueError as error:
    raise UserError(
      f'what the tokens of this tokenizer.json spell is not known ({error}); logprobs, tools and '
      'response_format need it.'
    ) from error
  return [bytes(read.decode_bytes([i])) for i in range(read.vocab_size)]


def _of_sentencepiece(model) -> list[bytes]:
  def spelt(i: int) -> bytes:
    piece = model.id_to_piece(i)
    if model.is_byte(i):
      return bytes([int(piece[3:-1], 16)])  # <0x0A>
    return piece.replace('\u2581', ' ').encode()

  return [spelt(i) for i in range(model.get_piece_size())]
