"""Corpora: dataclasses that describe where text is. `tasks.readers` reads it, and `tasks.store` caches it.

The key of the cache includes `signature()`, which is cheap and changes whenever the text may have changed.
"""

import dataclasses
import functools
import glob
import importlib.metadata
import pathlib
import platform
from typing import ClassVar

from research.core.errors import Invalid, did_you_mean
from research.data import cleaning
from research.data.python_packages import TRAIN_PACKAGES, VALIDATION_PACKAGES
from research.data.vocabularies import file_signature

SPLITS = ('train', 'validation')
BROKEN = ('refuse', 'skip')


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Base class of corpora.

  Attributes:
    filters: rules of `research.data.cleaning`, in order, such as (Length(200), Gopher()).
    near_duplicates: drops near-duplicate documents; exact duplicates are always dropped.
    contamination: counts or drops training documents that repeat validation text.
    piece_bytes: bytes of text per piece of the training split; a piece makes one shard. Pieces of the
      validation split are a quarter of that.
  """

  filters: tuple[cleaning.Filter, ...] = ()
  near_duplicates: cleaning.NearDuplicates | None = None
  contamination: cleaning.Contamination | None = None
  piece_bytes: int = 8 << 20

  name: ClassVar[str]

  # If a reader does not name the split, a hash sends this fraction of the documents to validation.
  validation_fraction: ClassVar[float] = 0.01

  @property
  def gives(self) -> str:
    """The kind of its documents, a key of `objective.READS`."""
    return 'text'

  def signature(self) -> list:
    """Returns what decides the text besides these fields, for the key of the cache."""
    return []


@dataclasses.dataclass(frozen=True)
class PythonSources(Corpus):
  """The Python sources of the packages that this project's lock installs, and the standard library.

  Real text without a download. It leaves out tests, vendored and generated code, tables of data, files over
  `max_bytes`, and the licence comment at the head of a file. The splits share no package and no file's
  content.

  Attributes:
    packages: distributions of the training split.
    validation: distributions of the validation split.
    stdlib: whether the standard library joins the training split.
    max_bytes: the size of the largest file to take.
  """

  packages: tuple[str, ...] = TRAIN_PACKAGES
  validation: tuple[str, ...] = VALIDATION_PACKAGES
  stdlib: bool = True
  max_bytes: int = 200_000
  name: ClassVar[str] = 'python_sources'

  def __post_init__(self):
    object.__setattr__(self, 'packages', tuple(self.packages))
    object.__setattr__(self, 'validation', tuple(self.validation))
    shared = sorted(set(self.packages) & set(self.validation))
    if shared:
      raise Invalid(PythonSources, 'validation', f'{shared[0]!r} is in the training split as well.')

  def signature(self) -> list:
    names = (*self.packages, *self.validation)
    return [platform.python_version() if self.stdlib else '', *map(version, names)]


@functools.cache
def version(package: str) -> str:
  """'package-version' of an installed distribution; 'package-absent' where it is missing."""
  try:
    return f'{package}-{importlib.metadata.version(package)}'
  except importlib.metadata.PackageNotFoundError:
    return f'{package}-absent'


@dataclasses.dataclass(frozen=True)
class Files(Corpus):
  """Base class of corpora that are files.

  Attributes:
    files: a path or glob, or several; local or gs:// (through TensorFlow's file system); plain or compressed
      with gzip, bzip2, xz or zstd.
    validation_files: the validation split; without it, a hash of each document decides its split.
    validation_fraction: the fraction of documents that the hash sends to validation.
    broken: 'refuse' stops at the first broken file or line and names it; 'skip' skips and counts them.
    longest: bytes; longer documents are cut at line ends.
  """

  files: str | tuple[str, ...] = ()
  validation_files: str | tuple[str, ...] = ()
  validation_fraction: float = 0.01
  broken: str = 'refuse'
  longest: int = 1_000_000

  def __post_init__(self):
    for field in ('files', 'validation_files'):
      value = getattr(self, field)
      object.__setattr__(self, field, (value,) if isinstance(value, str) else tuple(value))
    if not self.files:
      raise Invalid(type(self), 'files', 'set the files to read, such as "/data/*.jsonl.gz".')
    _check_broken(self)
    if not 0 < self.validation_fraction < 1 and not self.validation_files:
      why = f'{self.validation_fraction} must lie between 0 and 1.'
      raise Invalid(type(self), 'validation_fraction', why)
    for field in ('files', 'validation_files'):
      for pattern in getattr(self, field):
        if '://' not in pattern and not matching(pattern):
          raise Invalid(type(self), field, f'no file matches {pattern!r}.{_near(pattern)}')

  def signature(self) -> list:
    patterns = (*self.files, *self.validation_files)
    return [file_signature(f) for p in patterns if '://' not in p for f in matching(p)]


def _check_broken(corpus):
  if corpus.broken not in BROKEN:
    hint = did_you_mean(corpus.broken, BROKEN)
    raise Invalid(type(corpus), 'broken', f'{corpus.broken!r} is not known.{hint}')


def matching(pattern: str) -> list[str]:
  """Local files (or folders) that a path or a glob names, sorted.

  A pattern that is the path of an existing file means that file, even with brackets in its name.
  """
  path = pathlib.Path(pattern).expanduser()
  if path.exists():
    return [str(path)]
  literal = path
  while not literal.exists() and literal != literal.parent:
    literal = literal.parent
  # Brackets in the names of existing folders are literal; only what follows them is a pattern.
  pattern = pathlib.Path(glob.escape(str(literal))) / path.relative_to(literal)
  return sorted(glob.glob(str(pattern), recursive=True))


def _near(pattern: str) -> str:
  path = pathlib.Path(pattern).expanduser()
  if glob.has_magic(str(path.parent)) and not path.parent.is_dir():
    return ''
  if not path.parent.is_dir():
    return f' There is no folder {path.parent}.'
  hint = did_you_mean(path.name, [p.name for p in path.parent.iterdir()])
  return hint if hint.startswith(' Did') else ''


@dataclasses.dataclass(frozen=True)
class TextFiles(Files):
  """UTF-8 text files.

  Attributes:
    separator: text between the documents of a file, such as a newline or '<|endoftext|>'; None makes every
      file one document.
  """

  separator: str | None = None
  name: ClassVar[str] = 'text'

  def __post_init__(self):
    super().__post_init__()
    if self.separator == '':
      raise Invalid(
        TextFiles, 'separator', "'' separates nothing: use None to make each file one document."
      )


@dataclasses.dataclass(frozen=True)
class _Records:
  """The fields that corpora of records add: which field of a record has the text.

  Attributes:
    field: the field with the text (with `prompt`: with the completion).
    prompt: the field with the prompt, for instruction pairs.
  """

  field: str = 'text'
  prompt: str | None = None

  @property
  def gives(self) -> str:
    return 'text' if self.prompt is None else 'pairs'


@dataclasses.dataclass(frozen=True)
class JsonLines(_Records, Files):
  """A JSON object on every line."""

  name: ClassVar[str] = 'jsonl'


@dataclasses.dataclass(frozen=True)
class Conversations(Files):
  """A conversation as a JSON object on every line, in any shape of `conversations.read_messages`."""

  name: ClassVar[str] = 'conversations'

  def __post_init__(self):
    super().__post_init__()
    if self.filters:
      raise Invalid(type(self), 'filters', 'apply to plain text alone: leave them empty.')

  @property
  def gives(self) -> str:
    return self.name


@dataclasses.dataclass(frozen=True)
class PreferencePairs(Conversations):
  """A preference as a JSON object on every line, in any shape of `preferences.read_preference`."""

  name: ClassVar[str] = 'preferences'


@dataclasses.dataclass(frozen=True)
class JudgedAnswers(Conversations):
  """An answer and whether it is good as a JSON object on every line, as `preferences.read_judgement`."""

  name: ClassVar[str] = 'judgements'


@dataclasses.dataclass(frozen=True)
class Parquet(_Records, Files):
  """Parquet files, read by row group."""

  name: ClassVar[str] = 'parquet'


@dataclasses.dataclass(frozen=True)
class HuggingFace(_Records, Files):
  """What `save_to_disk` of `datasets` wrote: `files` are folders of one split each, or .arrow files."""

  name: ClassVar[str] = 'huggingface'

  def __post_init__(self):
    super().__post_init__()
    for field in ('files', 'validation_files'):
      for path in (f for p in getattr(self, field) if '://' not in p for f in matching(p)):
        if (pathlib.Path(path) / 'dataset_dict.json').is_file():
          why = f'{path} has several splits: name the folder of one, such as {path}/train.'
          raise Invalid(HuggingFace, field, why)


@dataclasses.dataclass(frozen=True)
class TFRecords(_Records, Files):
  """TFRecord files of tf.train.Example, the text in a bytes feature."""

  name: ClassVar[str] = 'tfrecord'


@dataclasses.dataclass(frozen=True)
class ArrayRecords(_Records, Files):
  """ArrayRecord files of tf.train.Example, the text in a bytes feature."""

  name: ClassVar[str] = 'array_record'


@dataclasses.dataclass(frozen=True)
class Tfds(_Records, Corpus):
  """A TensorFlow Datasets data set that is already prepared under `data_dir`; nothing is downloaded.

  Attributes:
    tfds_name: such as 'lm1b:1.1.0'; the version is part of the name.
    data_dir: TFDS's folder; None is its default.
    broken, longest: as for files.
    train, validation: TFDS splits, such as 'train[:99%]'.
  """

  tfds_name: str = ''
  data_dir: str | None = None
  train: str = 'train'
  validation: str = 'validation'
  broken: str = 'refuse'
  longest: int = 1_000_000
  name: ClassVar[str] = 'tfds'

  def __post_init__(self):
    if not self.tfds_name:
      raise Invalid(Tfds, 'tfds_name', "set the data set's name, such as 'lm1b:1.1.0'.")
    _check_broken(self)
