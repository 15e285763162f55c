"""Reads pytorch_model.bin, tensors that torch pickled, without torch and without running code from the pickle.

A pickle names the functions that rebuild its objects. Here our own code stands for those that rebuild tensors,
and any other name is refused.
"""

import collections
import math
import pathlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from research.core.errors import UserError
from research.huggingface.settings import read_json

ONE, INDEX = 'pytorch_model.bin', 'pytorch_model.bin.index.json'
STORAGES = {
  'DoubleStorage': np.float64, 'FloatStorage': np.float32, 'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16, 'LongStorage': np.int64, 'IntStorage': np.int32,
  'ShortStorage': np.int16, 'CharStorage': np.int8, 'ByteStorage': np.uint8, 'BoolStorage': np.bool_,
}  # fmt: skip
DTYPES = (
  'float64',
  'float32',
  'float16',
  'bfloat16',
  'int64',
  'int32',
  'int16',
  'int8',
  'uint8',
  'bool',
)
FLOATING = (
  np.dtype(np.float64),
  np.dtype(np.float32),
  np.dtype(np.float16),
  np.dtype(ml_dtypes.bfloat16),
)


class _Lazy:
  """A tensor of an archive, which `read` reads."""

  def __init__(self, archive: '_Archive', key: str, dtype, offset: int, shape, strides):
    self.archive = archive
    self.key = key
    self.dtype = np.dtype(dtype)
    self.offset = offset
    self.shape = tuple(shape)
    self.strides = tuple(strides)

  def read(self) -> np.ndarray:
    flat = np.frombuffer(self.archive.bytes_of(self.key), self.dtype)
    end = 1 + self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
    if math.prod(self.shape) and end > flat.size:
      raise UserError(f'{self.archive.path} is damaged: a tensor ends outside of its storage.')
    strides = tuple(s * self.dtype.itemsize for s in self.strides)
    view = np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides)
    return np.array(view)


class _Archive:
  """A file of torch.save: a zip with data.pkl and a file for each storage.

  Raises:
    UserError: the file has another format, or is damaged.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self.zip = zipfile.ZipFile(path)
      name = next(n for n in self.zip.namelist() if n.endswith('/data.pkl'))
    except (zipfile.BadZipFile, StopIteration, OSError):
      raise UserError(
        f'{path} is no archive that torch.save writes since version 1.6, or is cut; download it again.'
      ) from None
    self.folder = name.removesuffix('data.pkl')
    with self.zip.open(name) as file:
      try:
        self.content = _Unpickler(file, self).load()
      except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
      ) as error:
        raise UserError(f'{path} cannot be read: {error}') from None
    if not isinstance(self.content, dict):
      raise UserError(f'{path} holds no tensors by name.')

  def bytes_of(self, key: str) -> bytes:
    """Returns the bytes of a storage."""
    try:
      return self.zip.read(f'{self.folder}data/{key}')
    except (KeyError, zipfile.BadZipFile) as error:
      raise UserError(f'{self.path} is damaged: {error}.') from None


class _Unpickler(pickle.Unpickler):
  """Rebuilds tensors, lists and numbers, and refuses everything else."""

  def __init__(self, file, archive: _Archive):
    super().__init__(file)
    self.archive = archive

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ('collections', 'OrderedDict'):
      return collections.OrderedDict
    if (module, name) == ('torch', 'Size'):
      return tuple
    if module == 'torch' and name in STORAGES:
      return STORAGES[name]
    if module == 'torch' and name in DTYPES:
      return name
    if module == 'torch._utils' and name == '_rebuild_tensor_v2':
      return self.tensor
    if module == 'torch._utils' and name == '_rebuild_parameter':
      return self.parameter
    raise pickle.UnpicklingError(
      f'its pickle asks for {module}.{name}, which no file of tensors needs; it is not run.'
    )

  def persistent_load(self, pid):
    kind, dtype, key, *_ = pid
    if kind != 'storage':
      raise pickle.UnpicklingError(f'its pickle refers to {kind!r}, and only storages are known.')
    return dtype, key

  def parameter(self, data, *_):
    return data

  def tensor(self, storage, offset, shape, strides, *_) -> _Lazy:
    dtype, key = storage
    return _Lazy(self.archive, key, dtype, offset, shape, strides)


class PickledTensors(Mapping):
  """The tensors of pytorch_model.bin, or of the files that its index names. Each is read when it is asked for.

  Attributes:
    shapes: of the tensors.
    others: values that are no tensors, such as the state of a quantiser.

  Raises:
    UserError: a file is missing or damaged, or its pickle asks for anything but tensors.
  """

  def __init__(self, folder: pathlib.Path):
    files = [ONE]
    if not (folder / ONE).is_file():
      files = sorted(set(read_json(folder / INDEX).get('weight_map', {}).values()))
    self.lazy: dict[str, _Lazy] = {}
    self.others: dict[str, Any] = {}
    for file in files:
      if pathlib.PurePath(file).name != file or not (folder / file).is_file():
        raise UserError(f'{folder / file} is missing; download it.')
      for name, value in _Archive(folder / file).content.items():
        (self.lazy if isinstance(value, _Lazy) else self.others)[name] = value
    self.shapes = {name: value.shape for name, value in self.lazy.items()}

  @staticmethod
  def are_in(folder: pathlib.Path) -> bool:
    """Whether a folder has such files."""
    return (folder / ONE).is_file() or (folder / INDEX).is_file()

  def raw(self, name: str) -> np.ndarray:
    """Returns a tensor of any type."""
    return self.lazy[name].read()

  def __getitem__(self, name: str) -> np.ndarray:
    if self.lazy[name].dtype not in FLOATING:
      raise UserError(
        f'{name} is {self.lazy[name].dtype}; only floating point of 16 to 64 bits can be converted.'
      )
    return self.raw(name)

  def rename(self, names: Mapping[str, str]) -> None:
    """Gives tensors other names, old to new."""
    self.lazy = {names.get(name, name): value for name, value in self.lazy.items()}
    self.shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}

  def is_plain(self) -> bool:
    """Whether every tensor is floating point of 16 to 64 bits, as no packed weight is."""
    return all(value.dtype in FLOATING for value in self.lazy.values())

  def same(self, name: str, other: str) -> bool:
    """Whether both tensors are there and equal."""
    if name not in self.lazy or self.shapes[name] != self.shapes.get(other):
      return False
    return bool((self[name] == self[other]).all())

  def __contains__(self, name) -> bool:  # Mapping's own reads the tensor
    return name in self.lazy

  def __iter__(self) -> Iterator[str]:
    return iter(self.lazy)

  def __len__(self) -> int:
    return len(self.lazy)
