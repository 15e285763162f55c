"""Reads and writes safetensors: eight bytes with the length of a JSON header, the header, the tensors.

Tensors are read and written one at a time, so that a model need not fit in memory.
"""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import ml_dtypes  # noqa: F401  gives numpy its bfloat16
import numpy as np

from research.core.errors import UserError
from research.core.storage import LFS_POINTER
from research.huggingface.settings import read_json

FILE_BYTES = 5e9  # of a file to write, as transformers has it
DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}
WIDTHS = {'BOOL': 1, 'U8': 1, 'I8': 1, 'U16': 2, 'I16': 2, 'U32': 4, 'I32': 4, 'U64': 8, 'I64': 8,
          'F8_E4M3': 1, 'F8_E5M2': 1, 'F64': 8, 'F32': 4, 'F16': 2, 'BF16': 2}  # fmt: skip
RAW = {'U8': 'uint8', 'I8': 'int8', 'I16': 'int16', 'I32': 'int32', 'I64': 'int64'}
ONE, INDEX = 'model.safetensors', 'model.safetensors.index.json'
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors package has it


class Tensors(Mapping):
  """The tensors of a checkpoint by name. Each is mapped from its file when it is asked for.

  The files are model.safetensors, or those that its index names. Others in the folder (shards of an older save,
  adapters, consolidated copies) are not read.

  Args:
    folder: with the files.
    single: the name of the file where there is only one.

  Raises:
    UserError: a file is missing, cut, empty or not safetensors, or the index and its files disagree.
  """

  def __init__(self, folder: pathlib.Path, single: str = ONE):
    self.places: dict[str, tuple[pathlib.Path, str, int]] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    if (folder / single).is_file():
      for name, entry in _header(folder / single).items():
        self._add(folder / single, name, entry)
    elif (folder / INDEX).is_file():
      self._read_index(folder)
    else:
      raise UserError(f'{folder}: {_nothing_here(folder)}')

  @staticmethod
  def are_in(folder: pathlib.Path) -> bool:
    """Whether a folder has such files."""
    return (folder / ONE).is_file() or (folder / INDEX).is_file()

  def _read_index(self, folder: pathlib.Path) -> None:
    index = folder / INDEX
    names = read_json(index).get('weight_map')
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
      raise UserError(f'{index} has no weight_map of tensors to files; download it again.')
    headers = {}
    for file in sorted(set(names.values())):
      if pathlib.PurePath(file).name != file or not (folder / file).is_file():
        raise UserError(f'{folder / file} is missing, and {INDEX} names it; download it.')
      headers[file] = _header(folder / file)
    for name, file in names.items():
      if name not in headers[file]:
        raise UserError(
          f'{folder / file} has no tensor {name}, though {INDEX} says so; download both again.'
        )
      self._add(folder / file, name, headers[file][name])

  def _add(self, file: pathlib.Path, name: str, entry: dict) -> None:
    self.places[name] = file, entry['dtype'], entry['start']
    self.shapes[name] = tuple(entry['shape'])

  def rename(self, names: Mapping[str, str]) -> None:
    """Gives tensors other names, old to new."""
    self.places = {names.get(name, name): place for name, place in self.places.items()}
    self.shapes = {names.get(name, name): shape for name, shape in self.shapes.items()}

  def __getitem__(self, name: str) -> np.ndarray:
    file, dtype, offset = self.places[name]
    if dtype not in DTYPES:
      raise UserError(
        f'{file}: {name} is {dtype}; only floating point of 16 to 64 bits can be converted.'
      )
    return np.memmap(file, DTYPES[dtype], 'r', offset, self.shapes[name])

  def raw(self, name: str) -> np.ndarray:
    """Returns a tensor of any type, as bytes if numpy lacks the type (float8)."""
    file, dtype, offset = self.places[name]
    kind = DTYPES.get(dtype) or RAW.get(dtype, 'uint8')
    return np.memmap(file, kind, 'r', offset, self.shapes[name])

  def is_plain(self) -> bool:
    """Whether every tensor is floating point of 16 to 64 bits, as no packed weight is."""
    return all(dtype in DTYPES for _, dtype, _ in self.places.values())

  def same(self, name: str, other: str) -> bool:
    """Whether both tensors are there and equal."""
    if name not in self.places or other not in self.places:
      return False
    return self.shapes[name] == self.shapes[other] and bool((self[name] == self[other]).all())

  def __contains__(self, name) -> bool:  # Mapping's own reads the tensor
    return name in self.places

  def __iter__(self):
    return iter(self.places)

  def __len__(self) -> int:
    return len(self.places)


def _nothing_here(folder: pathlib.Path) -> str:
  """Explains why nothing can be read in a folder without model.safetensors and without its index."""
  names = {path.name for path in folder.iterdir()}
  if 'adapter_model.safetensors' in names or 'adapter_config.json' in names:
    return 'an adapter without its model; read it with --from_peft, beside its model.'
  if any(name.endswith(('.bin', '.pt', '.pth')) for name in names):
    return (
      'pickled weights here, but no pytorch_model.bin and no index of it; save them as safetensors first '
      '(save_pretrained of transformers).'
    )
  if any(name.endswith('.gguf') for name in names):
    return 'a GGUF file and no safetensors here; name the GGUF file itself.'
  if any(name.endswith('.safetensors') for name in names):
    return f'there are *.safetensors here, but neither {ONE} nor {INDEX} that says which of them are the model.'
  return f'no {ONE} and no {INDEX} here (a folder of a downloaded model is wanted).'


def _header(file: pathlib.Path) -> dict[str, dict]:
  """Returns dtype, shape and `start`, the first byte of the values, of every tensor in a safetensors file.

  Raises:
    UserError: the file is not whole, or not of this format.
  """
  size = file.stat().st_size
  with file.open('rb') as f:
    start = f.read(len(LFS_POINTER))
    if start == LFS_POINTER:
      raise UserError(
        f'{file} is a Git LFS pointer and not the file itself; fetch it with git lfs pull.'
      )
    if size < 8:
      raise UserError(f'{file} is {"empty" if not size else "cut"}; download it again.')
    length = int.from_bytes(start[:8], 'little')
    if length > LONGEST_HEADER:
      raise UserError(
        f'{file} is not a safetensors file: it does not begin with the length of a header.'
      )
    if 8 + length > size:
      raise UserError(f'{file} is cut: it ends within its header; download it again.')
    f.seek(8)
    text = f.read(length)
  try:
    header = json.loads(text.decode())
    header.pop('__metadata__', None)
    for name, entry in header.items():
      begin, end = entry['data_offsets']
      entry['start'] = 8 + length + begin
      width = WIDTHS.get(entry['dtype'])
      if not 0 <= begin <= end or any(size < 0 for size in entry['shape']):
        raise ValueError(name)
      if width and end - begin != math.prod(entry['shape']) * width:
        raise ValueError(name)
  except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
    raise UserError(
      f'{file} is not a safetensors file: its header cannot be read; download it again.'
    ) from None
  end = 8 + length + max((entry['data_offsets'][1] for entry in header.values()), default=0)
  if end > size:
    raise UserError(f'{file} is cut: {size} bytes of {end}; download it again.')
  return header


def write_tensors(
  folder: pathlib.Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  sizes: dict[str, tuple],
  dtype: str,
  file_bytes: float = FILE_BYTES,
) -> None:
  """Writes safetensors files of at most `file_bytes` (or one tensor), and an index if there are several.

  Args:
    folder: to write into.
    tensors: name and values, in any order.
    sizes: name to shape, in the order of the files.
    dtype: of the tensors in the files.
    file_bytes: the size of a file.
  """
  dtype = np.dtype(dtype)
  tensor_bytes = {name: math.prod(shape) * dtype.itemsize for name, shape in sizes.items()}
  files = _in_files(tensor_bytes, file_bytes)
  count = len(files)
  places = {}
  for i, names in enumerate(files):
    file = ONE if count == 1 else f'model-{i + 1:05}-of-{count:05}.safetensors'
    places |= _write_header(folder / file, {name: sizes[name] for name in names}, dtype)
  for name, x in tensors:
    file, offset = places[name]
    with file.open('r+b') as f:
      f.seek(offset)
      f.write(np.ascontiguousarray(x.astype(dtype, copy=False)).view(np.uint8).data)
  if count > 1:
    index = {
      'metadata': {'total_size': sum(tensor_bytes.values())},
      'weight_map': {name: file.name for name, (file, _) in places.items()},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')


def _in_files(tensor_bytes: dict[str, int], file_bytes: float) -> list[list[str]]:
  """Names of tensors by file, in their order; a file has more than `file_bytes` only for a single tensor."""
  files: list[list[str]] = [[]]
  size = 0
  for name, added in tensor_bytes.items():
    if files[-1] and size + added > file_bytes:
      files.append([])
      size = 0
    files[-1].append(name)
    size += added
  return files


def _write_header(file: pathlib.Path, sizes: dict[str, tuple], dtype) -> dict[str, tuple]:
  """Writes a safetensors file without its values; returns the file and the first byte of every tensor."""
  label = {name: label for label, name in DTYPES.items()}[dtype.name]
  header = {'__metadata__': {'format': 'pt'}}
  offsets = {}
  end = 0
  for name, shape in sizes.items():
    offsets[name] = end
    end += math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': label, 'shape': list(shape), 'data_offsets': [offsets[name], end]}
  text = json.dumps(header).encode()
  # The format aligns the tensors to eight bytes.
  text += b' ' * (-len(text) % 8)
  with file.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    f.truncate(8 + len(text) + end)
  return {name: (file, 8 + len(text) + offset) for name, offset in offsets.items()}
