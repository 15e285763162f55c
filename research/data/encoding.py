"""Turns text into token ids and back, without TensorFlow, with the same ids as in frozen streams."""

import json
import pathlib
from typing import Protocol

from research.core.errors import UserError
from research.data import vocabularies

BYTE_OFFSET = 3  # ids 0 to 2 are padding, end of text and unknown
PARTS = ('encode', 'decode', 'end', 'size')  # of an `Encoding`


class Encoding(Protocol):
  """A tokenizer. A vocabulary from outside the project that has all four of these is its own.

  Attributes:
    end: the id of the end-of-text token.
    size: the highest id plus one.
  """

  end: int
  size: int

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens."""
    ...

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, without special tokens and ids beyond the size."""
    ...


class ByteEncoding:
  """UTF-8 bytes plus 3, as `vocabularies.Bytes`."""

  end = 1
  size = 256 + BYTE_OFFSET

  def encode(self, text: str) -> list[int]:
    return [byte + BYTE_OFFSET for byte in text.encode()]

  def decode(self, ids: list[int]) -> str:
    data = bytes(i - BYTE_OFFSET for i in ids if BYTE_OFFSET <= i < self.size)
    return data.decode(errors='replace')


class SentencePieceEncoding:
  """A SentencePiece model's ids, as `vocabularies.SentencePiece`."""

  def __init__(self, file: str):
    import sentencepiece

    self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    self.end = self.model.eos_id()
    self.size = self.model.get_piece_size()

  def encode(self, text: str) -> list[int]:
    return self.model.encode(text)

  def decode(self, ids: list[int]) -> str:
    return self.model.decode([i for i in ids if 0 < i < self.size and not self.model.is_control(i)])


def read_tokenizer(file: str | pathlib.Path):
  """Returns the `tokenizers.Tokenizer` of a tokenizer.json, without its padding and truncation.

  Those are settings for the batches of one model (BERT's often have 128 tokens). Here a text has all its tokens
  and no others.
  """
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_file(str(file))
  tokenizer.no_padding()
  tokenizer.no_truncation()
  return tokenizer


class HuggingFaceEncoding:
  """The ids of a tokenizer.json, as `vocabularies.HuggingFaceTokenizer`: one higher if its id 0 is text."""

  def __init__(self, vocabulary: vocabularies.HuggingFaceTokenizer):
    self.tokenizer = read_tokenizer(vocabulary.file)
    settings = json.loads(pathlib.Path(vocabulary.file).read_text())
    # Id 0 pads rows, so it must not be text. Freezing shifts by the same rule.
    special = {t['id'] for t in settings.get('added_tokens', ()) if t.get('special')}
    self.offset = 0 if 0 in special else 1
    names = [vocabulary.eos] if vocabulary.eos else vocabularies.EOS_NAMES
    ends = [i for name in names if (i := self.tokenizer.token_to_id(name)) is not None]
    if not ends:
      raise UserError(
        f'{vocabulary.file} has no known end-of-text token: set HuggingFaceTokenizer.eos to its name.'
      )
    self.end = ends[0] + self.offset
    self.size = self.offset + 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values())

  def encode(self, text: str) -> list[int]:
    return [i + self.offset for i in self.tokenizer.encode(text, add_special_tokens=False).ids]

  def decode(self, ids: list[int]) -> str:
    unshifted = [i - self.offset for i in ids if self.offset <= i < self.size]
    return self.tokenizer.decode(unshifted, skip_special_tokens=True)


def make_encoding(vocabulary: vocabularies.Vocabulary) -> Encoding:
  """Returns the tokenizer of a vocabulary.

  A vocabulary from outside the project has a method `build` for freezing, which needs TensorFlow. Elsewhere it
  is its own tokenizer.

  Raises:
    UserError: the vocabulary is a SentencePiece model without a file, which freezing has trained; or it is from
      outside the project and lacks a part of an `Encoding`.
  """
  if not hasattr(vocabulary, 'build'):
    if isinstance(vocabulary, vocabularies.Bytes):
      return ByteEncoding()
    if isinstance(vocabulary, vocabularies.HuggingFaceTokenizer):
      return HuggingFaceEncoding(vocabulary)
    if isinstance(vocabulary, vocabularies.SentencePiece):
      return _of_sentencepiece(vocabulary)
  missing = [name for name in PARTS if not hasattr(vocabulary, name)]
  if missing:
    raise UserError(
      f'{type(vocabulary).__name__} cannot encode and decode text outside of freezing: add '
      f'{", ".join(missing)} to the class, as docs/data.md says of a vocabulary of your own.'
    )
  return vocabulary


def _of_sentencepiece(vocabulary: vocabularies.SentencePiece) -> SentencePieceEncoding:
  if vocabulary.file is None:
    raise UserError(
      'Suite.vocabulary: this run trained its own SentencePiece model; bind a '
      'vocabularies.SentencePiece whose file is that model (in the data cache, vocabularies/*.model).'
    )
  return SentencePieceEncoding(vocabulary.file)
