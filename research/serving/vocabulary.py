"""A model's tokenizer at an endpoint: the ids of a conversation, and the bytes of every token."""

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
    encoding: the model's.
    start: the ids before every conversation. They are (0,) for a run; the template of a Hugging Face model
      writes its own.
    ends: the ids that end a text.
    whole: whether a conversation is tokenized as a whole, as transformers does it. Otherwise it is tokenized
      turn by turn, as in the training of a run.
  """

  def __init__(
    self, encoding: Encoding, start: tuple[int, ...], ends: tuple[int, ...], whole: bool
  ):
    self.encoding = encoding
    self.start = start
    self.ends = ends
    self.whole = whole

  def decode(self, ids: Sequence[int]) -> str:
    return self.encoding.decode(list(ids))

  def of_conversation(self, parts: Sequence[str]) -> tuple[int, ...]:
    """Returns the ids of a conversation's parts. `conversations.EOS` in them is the end-of-text token."""
    texts = [''.join(parts)] if self.whole else parts
    ids = list(self.start)
    for text in texts:
      for number, piece in enumerate(text.split(conversations.EOS)):
        if number:
          ids.append(self.encoding.end)
        if piece:
          ids += self.encoding.encode(piece)
    return tuple(ids)

  @property
  def tokens(self) -> list[bytes]:
    """The bytes of each id; for a special token its name. For a large vocabulary the first use takes seconds.

    Raises:
      UserError: the tokenizer is of a kind whose bytes are not known.
    """
    return self._table[0]

  @property
  def special(self) -> list[int]:
    """The ids that are no part of a text."""
    return self._table[1]

  @functools.cached_property
  def _table(self) -> tuple[list[bytes], list[int]]:
    """The bytes of each id, and the special ids."""
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
      'the bytes of the tokens of this tokenizer are not known: logprobs, tools and response_format need a '
      'tokenizer.json.'
    )

  def spell(self, token: int) -> bytes:
    """Returns the bytes of an id. An id that only pads the model's logits has none."""
    return self.tokens[token] if token < len(self.tokens) else b''

  @functools.cached_property
  def matcher_tokenizer(self) -> llguidance.LLTokenizer:
    """The tokenizer in llguidance's form, for grammars."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_MatcherTokens(self)))


class _MatcherTokens:
  """The attributes and the call that llguidance expects of a tokenizer."""

  bos_token_id = None

  def __init__(self, vocabulary: Vocabulary):
    self.tokens = vocabulary.tokens
    self.eos_token_id = vocabulary.ends[0] if vocabulary.ends else vocabulary.encoding.end
    self.special_token_ids = vocabulary.special
    self.encode = vocabulary.encoding.encode

  def __call__(self, text: str) -> list[int]:
    if isinstance(text, bytes):  # llguidance tries whether bytes are accepted
      raise TypeError
    ids = self.encode(text)
    # SentencePiece drops some spaces, and then a grammar would lose its position in the text.
    exact = b''.join(self.tokens[i] for i in ids) == text.encode()
    return ids if exact else self._longest_first(text.encode())

  @functools.cached_property
  def _ids(self) -> dict[bytes, int]:
    special = set(self.special_token_ids)
    return {spelt: i for i, spelt in enumerate(self.tokens) if spelt and i not in special}

  def _longest_first(self, text: bytes) -> list[int]:
    """Returns tokens with exactly the bytes of a text: at each position the longest token."""
    longest = max(map(len, self._ids))
    ids = []
    start = 0
    while start < len(text):
      lengths = range(min(longest, len(text) - start), 0, -1)
      length = next((n for n in lengths if text[start : start + n] in self._ids), None)
      if length is None:  # no token has this byte
        return ids
      ids.append(self._ids[text[start : start + length]])
      start += length
    return ids


def _of_bytes(encoding: ByteEncoding) -> tuple[list[bytes], list[int]]:
  names = [b'<pad>', b'</s>', b'<unk>']
  tokens = names + [bytes([byte]) for byte in range(encoding.size - len(names))]
  return tokens, [*range(len(names))]


def _of_json(text: str) -> tuple[list[bytes], list[int]]:
  """Returns the bytes and the special ids of a tokenizer.json.

  Raises:
    UserError: its tokens have no bytes of their own.
  """
  try:
    tokenizer = llguidance.LLTokenizer(text)
  except ValueError:  # llguidance undoes only byte encodings
    return _by_decoder(text)
  ids = range(tokenizer.vocab_size)
  tokens = [bytes(tokenizer.decode_bytes([i])) for i in ids]
  return tokens, [i for i in ids if tokenizer.is_special_token(i)]


def _by_decoder(text: str) -> tuple[list[bytes], list[int]]:
  """Returns the same as `_of_json` for tokenizers of words or pieces: what each token adds to a text before it.

  So the first token of a text may have a space in front that the text has not, as SentencePiece's.
  """
  import tokenizers

  tokenizer = tokenizers.Tokenizer.from_str(text)
  added = tokenizer.get_added_tokens_decoder()
  special = sorted(i for i, token in added.items() if token.special)
  tokens = [b''] * (1 + max(tokenizer.get_vocab(with_added_tokens=True).values()))
  for i in special:
    tokens[i] = added[i].content.encode()
  plain = sorted(set(tokenizer.get_vocab(with_added_tokens=True).values()) - set(special))

  def decode(rows: list[list[int]]) -> list[str]:
    return tokenizer.decode_batch(rows, skip_special_tokens=False)

  before, after = plain[-1], plain[-2]
  start, end = decode([[before], [before, after]])
  end = end.removeprefix(start)
  wholes = decode([[before, i, after] for i in plain])
  for i, longer, whole in zip(plain, decode([[before, i] for i in plain]), wholes, strict=True):
    name = tokenizer.id_to_token(i)
    added_text = longer.removeprefix(start)
    # A token that changes with those around it, or is a part of a character, has no bytes of its own.
    is_part = '\ufffd' in added_text and '\ufffd' not in name
    if is_part or whole != start + added_text + end:
      raise UserError(
        f'the token {name!r} of this tokenizer.json has no bytes of its own; logprobs, tools and '
        'response_format need them.'
      )
    tokens[i] = added_text.encode()
  return tokens, special


def _of_sentencepiece(model) -> tuple[list[bytes], list[int]]:
  def spell(i: int) -> bytes:
    piece = model.id_to_piece(i)
    if model.is_byte(i):
      return bytes([int(piece[3:-1], 16)])  # <0x0A>
    return piece.replace('\u2581', ' ').encode()  # SentencePiece's mark of a space

  ids = range(model.get_piece_size())
  special = [i for i in ids if model.is_control(i) or model.is_unknown(i) or model.is_unused(i)]
  return [spell(i) for i in ids], special
