"""Vocabularies: dataclasses that describe how text becomes tokens. `tasks.vocabularies` builds them for seqio.

Rows are padded with 0, as in seqio and t5. Segment ids and loss weights mark the padding, so 0 may be a token
as well. The highest `extra_ids` ids are T5's sentinels, counted downwards from the last.
"""

import dataclasses
import functools
import json
import pathlib
from typing import ClassVar

from research.core.errors import Invalid, did_you_mean
from research.core.storage import LFS_POINTER
from research.data.spec import digest, to_spec

# A tokenizer.json does not say which token ends a document. We take the first of these that it has.
EOS_NAMES = ('</s>', '<|endoftext|>', '<eos>', '<|end_of_text|>', '<|im_end|>', '[SEP]')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Base class of vocabularies.

  To add one, write a subclass in a module that the gin file imports. The freezing process calls its method
  `build()`, which returns a `seqio.Vocabulary`. Whatever turns text into tokens after training uses the class
  itself as an `encoding.Encoding`: its `encode`, `decode`, `end` and `size`.
  """

  name: ClassVar[str]

  def signature(self) -> list:
    """Returns what decides the tokens besides these fields (a file's size and time), for the cache's key."""
    return []


def _check_extra_ids(self):
  if not isinstance(self.extra_ids, int) or self.extra_ids < 0:
    raise Invalid(type(self), 'extra_ids', f'{self.extra_ids!r} must be 0 or more.')


@dataclasses.dataclass(frozen=True)
class Bytes(Vocabulary):
  """UTF-8 bytes plus 3: 0 is padding, 1 EOS, 2 unknown (ByT5; Xue et al. 2021, arXiv:2105.13626).

  Attributes:
    extra_ids: sentinels after these 259 ids. ByT5's 125 make 384 ids, a multiple of 128.
  """

  extra_ids: int = 125
  name: ClassVar[str] = 'bytes'

  def __post_init__(self):
    _check_extra_ids(self)


@dataclasses.dataclass(frozen=True)
class SentencePiece(Vocabulary):
  """A SentencePiece model: trained on the corpus at first use, or read from `file`.

  A model trained here is lossless, so that bits per byte are exact: it normalises nothing, adds no dummy
  prefix, keeps runs of spaces, and falls back to bytes for unknown characters.

  Attributes:
    size: number of ids, with `extra_ids`; leave it None for a `file`.
    model_type: 'bpe' or 'unigram' (Kudo & Richardson 2018, arXiv:1808.06226).
    extra_ids: sentinels.
    file: path of an existing .model.
    train_bytes: bytes of the training split to train the model on.
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
      check_file(SentencePiece, self.file)
      return
    if self.size is None:
      object.__setattr__(self, 'size', 8192)
    # 256 bytes for fallback, padding, EOS and unknown come before the first learned piece.
    if not isinstance(self.size, int) or self.size < self.extra_ids + 320:
      why = f'{self.size!r} is too small: with {self.extra_ids} extra ids take at least '
      raise Invalid(SentencePiece, 'size', why + f'{self.extra_ids + 320}.')

  def signature(self) -> list:
    if not self.file:
      return []
    signature = file_signature(self.file)
    return signature + _zero_mark(eos_of_sentencepiece(*signature))


def trained_file(vocabulary: SentencePiece, cache: pathlib.Path, fingerprint: str) -> pathlib.Path:
  """Returns the path of the SentencePiece model that is trained on the training split of this fingerprint."""
  key = digest([to_spec(vocabulary), fingerprint])
  return cache / 'vocabularies' / f'{vocabulary.model_type}-{vocabulary.size}-{key}.model'


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(Vocabulary):
  """Any fast tokenizer's `tokenizer.json`.

  If id 0 is text ("!" in GPT-2), every id moves up by one, and so do the rows of the model's embedding;
  `Frozen.manifest['vocabulary']` has the offset. If id 0 is a special token (the EOS of GPT-NeoX, Pythia and
  MPT), ids are unchanged.

  Attributes:
    file: path of the tokenizer.json.
    eos: the token that ends a document; None takes the first of `EOS_NAMES` that the tokenizer has.
    extra_ids: sentinels after the tokenizer's own ids.
  """

  file: str = ''
  eos: str | None = None
  extra_ids: int = 0
  name: ClassVar[str] = 'huggingface'

  def __post_init__(self):
    _check_extra_ids(self)
    check_file(HuggingFaceTokenizer, self.file)

  def signature(self) -> list:
    signature = file_signature(self.file)
    return signature + _zero_mark(eos_of_tokenizer(self.eos, *signature))


def file_signature(path: str) -> list:
  """Returns path, size and time of a file, which are cheap to read and change with every write."""
  stat = pathlib.Path(path).stat()
  return [str(path), stat.st_size, stat.st_mtime_ns]


def check_file(owner: type, file: str):
  """Raises `Invalid` unless `file` is a file with content, and not a pointer to one."""
  path = pathlib.Path(file)
  if not path.is_file():
    kind = 'is a folder' if path.is_dir() and file else 'is no file'
    raise Invalid(owner, 'file', f'{file!r} {kind}: name the file of the vocabulary.')
  try:
    with path.open('rb') as opened:
      head = opened.read(len(LFS_POINTER))
  except OSError as e:
    raise Invalid(owner, 'file', f'{file} cannot be read ({e.strerror}).') from e
  if not head:
    raise Invalid(owner, 'file', f'{file} is empty.')
  if head == LFS_POINTER:
    why = f'{file} is a Git LFS pointer and not the file itself: fetch it with git lfs pull.'
    raise Invalid(owner, 'file', why)


@functools.lru_cache
def eos_of_tokenizer(eos: str | None, path: str, *_state) -> int | None:
  """Returns the id of the token that ends a document in a tokenizer.json; None if that is not known.

  Args:
    eos: the token; None takes the first of `EOS_NAMES`.
    path: the file.
    *_state: its size and time, so that a changed file has another entry in the function's cache.
  """
  try:
    settings = json.loads(pathlib.Path(path).read_text())
    vocabulary = settings['model']['vocab']
    if isinstance(vocabulary, list):  # of a unigram model: [piece, score] by id
      vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    ids = vocabulary | {t['content']: t['id'] for t in settings.get('added_tokens') or ()}
  except Exception:  # the freezing process opens the file as well, and reports the error
    return None
  return next((ids[name] for name in ([eos] if eos else EOS_NAMES) if name in ids), None)


@functools.lru_cache
def eos_of_sentencepiece(path: str, *_state) -> int | None:
  """Returns the id that ends a document in a SentencePiece model; None if that is not known."""
  try:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=path).eos_id()
  except Exception:  # the freezing process opens the file as well, and says what is wrong with it
    return None


def _zero_mark(eos: int | None) -> list:
  """Returns a part of the signature for vocabularies in which id 0, which also pads rows, ends documents.

  In an earlier version such ends carried no loss. The mark keeps its streams from being read again.
  """
  return ['eos 0'] if eos == 0 else []
