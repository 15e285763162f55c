"""How text becomes tokens: plain dataclasses; `tasks.vocabularies` makes seqio's of them.

In every vocabulary 0 is padding, as seqio and t5 want it, and the highest `extra_ids` ids are T5's
sentinels, counted downwards from the last.
"""

import dataclasses
import pathlib
from typing import ClassVar

from research.core.errors import Invalid, did_you_mean


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Base of the vocabularies."""

  name: ClassVar[str]

  def signature(self) -> list:
    """What outside these fields decides the tokens (a file's size and time), for the cache's key."""
    return []


def _check_extra_ids(self):
  if not isinstance(self.extra_ids, int) or self.extra_ids < 0:
    raise Invalid(type(self), 'extra_ids', f'{self.extra_ids!r} must be 0 or more.')


@dataclasses.dataclass(frozen=True)
class Bytes(Vocabulary):
  """UTF-8 bytes plus 3; 0 padding, 1 EOS, 2 unknown (ByT5; Xue et al. 2021, arXiv:2105.13626).

  Attributes:
    extra_ids: sentinels after the 259. ByT5's own 125 make 384, a multiple of 128.
  """

  extra_ids: int = 125
  name: ClassVar[str] = 'bytes'

  def __post_init__(self):
    _check_extra_ids(self)


@dataclasses.dataclass(frozen=True)
class SentencePiece(Vocabulary):
  """A SentencePiece model: trained on the corpus at first use and kept, or read from `file`.

  A trained one is lossless: identity normalisation, no dummy prefix, runs of spaces kept, and bytes
  for characters outside it, so that bits per byte are exact.

  Attributes:
    size: ids in all, with `extra_ids`; for a `file` it must be left None.
    model_type: 'bpe' or 'unigram' (Kudo & Richardson 2018, arXiv:1808.06226).
    extra_ids: sentinels.
    file: path of an existing .model.
    train_bytes: how much text of the training split the model is trained on.
  """

  size: int | None = None
  model_type: str = 'bpe'
  extra_ids: int = 128
  file: str | None = None
  train_bytes: int = 16 << 20
  name: ClassVar[str] = 'sentencepiece'

  def __post_init__(self):
    _check_extra_ids(self)
    if self.model_type not in ('bpe', 'unigram'):
      hint = did_you_mean(self.model_type, ('bpe', 'unigram'))
      raise Invalid(SentencePiece, 'model_type', f'{self.model_type!r} is not known.{hint}')
    if self.file is not None:
      if self.size is not None:
        raise Invalid(SentencePiece, 'size', 'a model from a file has its own size: leave it out.')
      if not pathlib.Path(self.file).is_file():
        raise Invalid(SentencePiece, 'file', f'there is no file {self.file}.')
      return
    if self.size is None:
      object.__setattr__(self, 'size', 8192)
    # 256 bytes for fallback, padding, EOS and unknown come before the first learned piece.
    if not isinstance(self.size, int) or self.size < self.extra_ids + 320:
      why = f'{self.size!r} is too small: with {self.extra_ids} extra ids take at least '
      raise Invalid(SentencePiece, 'size', why + f'{self.extra_ids + 320}.')

  def signature(self) -> list:
    return file_signature(self.file) if self.file else []


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(Vocabulary):
  """Any fast tokenizer's `tokenizer.json`.

  Id 0 is padding here. Where a tokenizer gives 0 to text (GPT-2 to "!"), every id is moved up by one,
  and so is its model's embedding; `Frozen.manifest['vocabulary']` says by how much.

  Attributes:
    file: path of the tokenizer.json.
    eos: the token that ends a document; None looks for the usual names.
    extra_ids: sentinels after the tokenizer's own ids.
  """

  file: str = ''
  eos: str | None = None
  extra_ids: int = 0
  name: ClassVar[str] = 'huggingface'

  def __post_init__(self):
    _check_extra_ids(self)
    if not pathlib.Path(self.file).is_file():
      raise Invalid(HuggingFaceTokenizer, 'file', f'there is no file {self.file!r}.')

  def signature(self) -> list:
    return file_signature(self.file)


def file_signature(path: str) -> list:
  """Size and time of a file: cheap, and different once the file was written to."""
  stat = pathlib.Path(path).stat()
  return [str(path), stat.st_size, stat.st_mtime_ns]


VOCABULARIES = (Bytes, SentencePiece, HuggingFaceTokenizer)
