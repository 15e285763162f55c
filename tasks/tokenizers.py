"""Hugging Face's tokenizer.json through seqio's Vocabulary interface."""

import json
import pathlib
import re

import numpy as np
import seqio
import tensorflow as tf

from research.core.errors import Invalid, did_you_mean
from research.data.encoding import read_tokenizer
from research.data.vocabularies import EOS_NAMES, HuggingFaceTokenizer


class TokenizerVocabulary(seqio.Vocabulary):
  """A fast tokenizer. `offset` is added to its ids: 1 where its id 0 is text, and otherwise 0.

  Args:
    file: path of the tokenizer.json.
    eos: the token that ends a document; None looks for the usual names.
    extra_ids: sentinels after the tokenizer's ids.
  """

  def __init__(self, file: str, eos: str | None = None, extra_ids: int = 0):
    try:
      self.tokenizer = read_tokenizer(file)
      self.settings = json.loads(pathlib.Path(file).read_text())
    except (KeyboardInterrupt, SystemExit):
      raise
    except BaseException as e:  # a panic of the library's Rust is no Exception
      why = ' '.join(str(e).split())[:200]
      raise Invalid(HuggingFaceTokenizer, 'file', f'{file} is no tokenizer.json: {why}.') from e
    self.file = str(file)
    added = self.settings.get('added_tokens') or ()
    self.special = {t['id'] for t in added if t.get('special')}
    self.offset = 0 if 0 in self.special else 1
    self._eos = self._find_eos(eos)
    super().__init__(extra_ids=extra_ids)

  def _find_eos(self, eos: str | None) -> int:
    for name in [eos] if eos else EOS_NAMES:
      i = self.tokenizer.token_to_id(name)
      if i is not None:
        return i + self.offset
    special = [t['content'] for t in self.settings.get('added_tokens', ())]
    why = f'{eos!r} is not in {self.file}.{did_you_mean(eos or "", special)}'
    raise Invalid(HuggingFaceTokenizer, 'eos', why)

  @property
  def eos_id(self) -> int:
    return self._eos

  @property
  def bos_id(self) -> int:
    return self.pad_id

  @property
  def unk_id(self) -> None:
    return None

  @property
  def _base_vocab_size(self) -> int:
    # Ids may have gaps, so the highest decides.
    return max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1 + self.offset

  def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
    """Ids of every text, without special tokens."""
    encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(e.ids, np.int32) + self.offset for e in encoded]

  def _encode(self, s: str):
    return self.encode_batch([s])[0].tolist()

  def _decode(self, ids):
    unshifted = [i - self.offset for i in ids if self.offset <= i < self._base_vocab_size and i]
    return self.tokenizer.decode(unshifted, skip_special_tokens=True)

  def _encode_tf(self, s):
    def encode(text):
      return np.array(self._encode(np.asarray(text).item().decode()), np.int32)

    return tf.ensure_shape(tf.numpy_function(encode, [s], tf.int32), [None])

  def _decode_tf(self, ids):
    def decode(row):
      return self._decode(np.asarray(row).tolist()).encode()

    if ids.shape.rank == 1:
      return tf.numpy_function(decode, [ids], tf.string)
    return tf.map_fn(self._decode_tf, ids, fn_output_signature=tf.string)

  def token_bytes(self) -> np.ndarray:
    """(vocab_size,) bytes of text per id, by the decoder's kind; 0 for special tokens."""
    sizes = np.zeros(self.vocab_size, np.int64)
    kinds = json.dumps(self.settings.get('decoder'))
    for token, i in self.tokenizer.get_vocab(with_added_tokens=True).items():
      if i not in self.special:
        sizes[i + self.offset] = _bytes_of(token, kinds)
    return sizes

  def __eq__(self, other):
    return isinstance(other, TokenizerVocabulary) and vars(self).keys() == vars(other).keys() and (
      self.file, self._eos, self.extra_ids
    ) == (other.file, other._eos, other.extra_ids)  # fmt: skip

  __hash__ = None

  def __str__(self):
    return f'TokenizerVocabulary({self.file}, eos={self._eos}, offset={self.offset})'


def _bytes_of(token: str, decoder: str) -> int:
  if '"ByteLevel"' in decoder:
    return len(token)  # one character of the token's alphabet for every byte
  if '"ByteFallback"' in decoder and re.fullmatch('<0x[0-9A-F]{2}>', token):
    return 1
  if '"WordPiece"' in decoder:
    return len(token.removeprefix('##').encode()) + (not token.startswith('##'))
  return len(token.replace('▁', ' ').encode())
