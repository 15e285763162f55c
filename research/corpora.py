"""Where text comes from: plain dataclasses; `tasks.readers` reads them, `tasks.store` keeps the text.

`signature()` is what the cache is keyed by: cheap, and different when the text may have changed.
"""

import dataclasses
import importlib.metadata
import platform
from typing import ClassVar

from research.errors import Invalid

SPLITS = ('train', 'validation')

# Installed with every lock of this project on every platform, at least 40 kB of Python each.
# fmt: off
TRAIN_PACKAGES = (
  'absl-py', 'anyio', 'babel', 'charset-normalizer', 'clu', 'contourpy', 'dm-tree', 'filelock',
  'flatbuffers', 'flax', 'fonttools', 'gast', 'gin-config', 'google-pasta',
  'googleapis-common-protos', 'grpcio', 'h11', 'h5py', 'huggingface-hub', 'humanize', 'idna', 'jax',
  'jaxlib', 'keras', 'lxml', 'matplotlib', 'ml-collections', 'narwhals', 'nltk', 'numpy', 'optree',
  'orbax-checkpoint', 'packaging', 'pandas', 'portalocker', 'prometheus-client', 'promise',
  'protobuf', 'psutil', 'pydantic', 'pyglove', 'pygments', 'pyparsing', 'pyyaml', 'regex',
  'rouge-score', 'safetensors', 'scikit-learn', 'scipy', 'setuptools', 'simple-parsing',
  'simplejson', 't5', 'tabulate', 'tensorflow-datasets', 'tensorflow-metadata', 'tensorflow-text',
  'termcolor', 'threadpoolctl', 'tokenizers', 'toml', 'tqdm', 'transformers', 'typer',
  'typing-extensions', 'wheel', 'wrapt',
)
VALIDATION_PACKAGES = (
  'attrs', 'click', 'cloudpickle', 'docstring-parser', 'etils', 'fsspec', 'joblib',
  'markdown-it-py', 'opt-einsum', 'optax', 'pillow', 'pyarrow', 'python-dateutil', 'requests',
  'rich', 'sacrebleu', 'seqio', 'tensorboardx', 'treescope', 'urllib3',
)
# fmt: on


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Base of the corpora."""

  name: ClassVar[str]

  @property
  def pairs(self) -> bool:
    """Whether it gives prompts and completions instead of plain text."""
    return False

  def signature(self) -> list:
    """What outside these fields decides the text, for the cache's key."""
    return []


@dataclasses.dataclass(frozen=True)
class PythonSources(Corpus):
  """The Python sources of the packages that this project's lock installs, and the standard library.

  Real text without a download. Left out: tests, vendored and generated code, tables of data, files
  over `max_bytes`. The comment with the licence at the head of a file is cut off. No package, and
  no file's content, is in both splits.

  Attributes:
    packages: distributions of the training split.
    validation: distributions of the validation split.
    stdlib: whether the standard library joins the training split.
    max_bytes: the largest file taken.
  """

  packages: tuple[str, ...] = TRAIN_PACKAGES
  validation: tuple[str, ...] = VALIDATION_PACKAGES
  stdlib: bool = True
  max_bytes: int = 200_000
  name: ClassVar[str] = 'python_sources'

  def __post_init__(self):
    object.__setattr__(self, 'packages', tuple(self.packages))
    object.__setattr__(self, 'validation', tuple(self.validation))
    both = sorted(set(self.packages) & set(self.validation))
    if both:
      raise Invalid(PythonSources, 'validation', f'{both[0]!r} is in the training split as well.')

  def signature(self) -> list:
    names = (*self.packages, *self.validation)
    return [platform.python_version() if self.stdlib else '', *map(version, names)]


def version(package: str) -> str:
  """'package-version' of an installed distribution; 'package-absent' where it is missing."""
  try:
    return f'{package}-{importlib.metadata.version(package)}'
  except importlib.metadata.PackageNotFoundError:
    return f'{package}-absent'


CORPORA = (PythonSources,)
