"""How text becomes tokens: plain dataclasses; `tasks.vocabularies` makes seqio's of them.

Rows are padded with 0, as seqio and t5 do it; segment ids and loss weights say what is padding, so that 0 may
be a token as well. The highest `extra_ids` ids are T5's sentinels, counted downwards from the last.
"""

import dataclasses
import functools
import json
import pathlib
from typing import ClassVar

from research.core.errors import Invalid, did_you_mean

# How a file begins that stands for one in Git's large file storage.
LFS_POINTER = b'version https://git-lfs.github.com/spec/'

# The token that ends a document, where a tokenizer.json does not say: the first of these that it has.
EOS_NAMES = ('</s>', '<|endoftext|>', '<eos>', '<|end_of_text|>', '<|im_end|>', '[SEP]')


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Base of the vocabularies.

  One of your own is a subclass in a module that the gin file imports; its method `build()` returns a
  `seqio.Vocabulary`, in the process that freezes.
  """

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


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(Vocabulary):
  """Any fast tokenizer's `tokenizer.json`.

  Where a tokenizer gives id 0 to text (GPT-2 to "!"), every id is moved up by one, and so is its model's
  embedding; `Frozen.manifest['vocabulary']` says by how much. Where 0 is a special token (the EOS of GPT-NeoX,
  Pythia and MPT), ids stay as they are.

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
    check_file(HuggingFaceTokenizer, self.file)

  def signature(self) -> list:
    signature = file_signature(self.file)
    return signature + _zero_mark(eos_of_tokenizer(self.eos, *signature))


def file_signature(path: str) -> list:
  """Size and time of a file: cheap, and different once the file was written to."""
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
  """The id of the token that ends a document in a tokenizer.json; None where that cannot be told.

  Args:
    eos: the token; None takes the first of `EOS_NAMES`.
    path: of the file. What follows (its size and time) makes another cache entry of another file.
  """
  try:
    settings = json.loads(pathlib.Path(path).read_text())
    vocabulary = settings['model']['vocab']
    if isinstance(vocabulary, list):  # of a unigram model: [piece, score] by id
      vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
    ids = vocabulary | {t['content']: t['id'] for t in settings.get('added_tokens') or ()}
  except Exception:  # the freezing process opens the file as well, and says what is wrong with it
    return None
  return next((ids[name] for name in ([eos] if eos else EOS_NAMES) if name in ids), None)


@functools.lru_cache
def eos_of_sentencepiece(path: str, *_state) -> int | None:
  """The id that ends a document in a SentencePiece model; None where that cannot be told."""
  try:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=path).eos_id()
  except Exception:  # the freezing process opens the file as well, and says what is wrong with it
    return None


def _zero_mark(eos: int | None) -> list:
  """Part of the signature where id 0, which also pads rows, ends documents.

  Such ends once carried no loss; the mark keeps the streams of that time from being read again.
  """
  return ['eos 0'] if eos == 0 else []
