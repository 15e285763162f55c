"""The safetensors format: eight bytes of length, a JSON header, the tensors. Read and written one at a time."""

import json
import math
import pathlib
from collections.abc import Iterable, Mapping

import ml_dtypes  # noqa: F401  gives numpy its bfloat16
import numpy as np

from research.core.errors import UserError

FILE_BYTES = 5e9  # of a file to write, as transformers has it
DTYPES = {'F64': 'float64', 'F32': 'float32', 'F16': 'float16', 'BF16': 'bfloat16'}


class Tensors(Mapping):
  """The tensors of a folder's safetensors files by name; each is mapped from its file when it is asked for.

  Raises:
    UserError: no file there; a tensor that is not floating point.
  """

  def __init__(self, folder: pathlib.Path):
    files = sorted(folder.glob('*.safetensors'))
    if not files:
      raise UserError(
        f'{folder}: no *.safetensors here (a folder of a downloaded model is wanted).'
      )
    self.places: dict[str, tuple[pathlib.Path, str, int]] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
      with file.open('rb') as f:
        length = int.from_bytes(f.read(8), 'little')
        header = json.loads(f.read(length))
      header.pop('__metadata__', None)
      for name, entry in header.items():
        if entry['dtype'] not in DTYPES:
          raise UserError(
            f'{file}: {name} is {entry["dtype"]}; only floating point can be converted.'
          )
        self.places[name] = file, DTYPES[entry['dtype']], 8 + length + entry['data_offsets'][0]
        self.shapes[name] = tuple(entry['shape'])

  def __getitem__(self, name: str) -> np.ndarray:
    file, dtype, offset = self.places[name]
    return np.memmap(file, dtype, 'r', offset, self.shapes[name])

  def __iter__(self):
    return iter(self.places)

  def __len__(self) -> int:
    return len(self.places)


def write_tensors(
  folder: pathlib.Path,
  tensors: Iterable[tuple[str, np.ndarray]],
  sizes: dict[str, tuple],
  dtype: str,
  file_bytes: float = FILE_BYTES,
) -> None:
  """Writes safetensors files of at most `file_bytes` (or one tensor), and their index where they are several.

  Args:
    tensors: name and values, in any order.
    sizes: name to shape, in the order of the files.
  """
  dtype, places = np.dtype(dtype), {}
  count = lambda names: sum(math.prod(sizes[name]) for name in names) * dtype.itemsize
  files: list[list[str]] = [[]]
  for name in sizes:
    if files[-1] and count([*files[-1], name]) > file_bytes:
      files.append([])
    files[-1].append(name)
  n = len(files)
  for i, names in enumerate(files):
    file = 'model.safetensors' if n == 1 else f'model-{i + 1:05}-of-{n:05}.safetensors'
    places |= _write_header(folder / file, {name: sizes[name] for name in names}, dtype)
  for name, x in tensors:
    file, offset = places[name]
    with file.open('r+b') as f:
      f.seek(offset)
      f.write(np.ascontiguousarray(x.astype(dtype, copy=False)).view(np.uint8).data)
  if n > 1:
    index = {
      'metadata': {'total_size': count(sizes)},
      'weight_map': {name: place[0].name for name, place in places.items()},
    }
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')


def _write_header(file: pathlib.Path, sizes: dict[str, tuple], dtype) -> dict[str, tuple]:
  """A safetensors file without its values; where in it each tensor goes."""
  label = {v: k for k, v in DTYPES.items()}[dtype.name]
  header, offsets, offset = {'__metadata__': {'format': 'pt'}}, {}, 0
  for name, shape in sizes.items():
    end = offset + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': label, 'shape': list(shape), 'data_offsets': [offset, end]}
    offsets[name], offset = offset, end
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)
  with file.open('wb') as f:
    f.write(len(text).to_bytes(8, 'little') + text)
    f.truncate(8 + len(text) + offset)
  return {name: (file, 8 + len(text) + place) for name, place in offsets.items()}
