"""Checkpoints of parameters alone, written and read a piece at a time.

A piece is a parameter, or one layer's (or one expert's) slice of a stacked one. Neither direction holds more
than the pieces in hand: Orbax makes the checkpoint of arrays that are still empty, in chunks of one piece,
and the pieces are put in one by one; `Checkpoints` then restores it like any other, onto any mesh. Until the
last piece is in, its checksums do not match, so a checkpoint cut short is found to be damaged.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from research.checkpoints import folders
from research.checkpoints.manager import names, partial_checksum
from research.core import storage
from research.core.errors import UserError
from research.data.spec import digest

Path = tuple  # of keys in nested dicts
Pieces = Iterable[tuple[Path, tuple[int, ...], np.ndarray]]


def write_params(
  folder: pathlib.Path,
  shapes: Mapping[Path, tuple[int, ...]],
  leading: Mapping[Path, int],
  pieces: Callable[[], Pieces],
  dtypes: Mapping[Path, np.dtype] = MappingProxyType({}),
) -> None:
  """Writes parameters as the checkpoint of step 0.

  Args:
    folder: of checkpoints.
    shapes: of every parameter.
    leading: how many leading axes of a parameter a piece has one index of.
    pieces: called twice, for the checksums and to write: (path, index on the leading axes, values).
    dtypes: of the parameters that are not float32, such as packed ones.
  """
  dtypes = {path: np.dtype(dtypes.get(path, np.float32)) for path in shapes}
  sums = dict.fromkeys(shapes, 0)
  for path, index, x in pieces():
    start = sum(i * math.prod(shapes[path][k + 1 :]) for k, i in enumerate(index))
    x = np.ascontiguousarray(x, dtypes[path])
    sums[path] = (sums[path] + partial_checksum(x, start)) % 2**32
  state = _write_empty(folder, shapes, leading, sums, dtypes)
  arrays = {path: _open(state, path, write=True) for path in shapes}
  for path, index, x in pieces():
    arrays[path][index].write(np.ascontiguousarray(x, dtypes[path])).result()


def _write_empty(folder, shapes, leading, sums, dtypes) -> pathlib.Path:
  """The checkpoint without the values; the folder of its arrays."""
  # One number seen as a whole array: Orbax must not copy it, and writes nothing of what is empty.
  zeros = {path: np.zeros((), dtype) for path, dtype in dtypes.items()}
  arrays = {path: np.broadcast_to(zeros[path], shape) for path, shape in shapes.items()}
  chunks = {path: ocp.SaveArgs(shard_axes=tuple(range(n))) for path, n in leading.items()}
  as_they_are = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    # No array is one of jax, but Orbax warns where it cannot ask how those are described.
    (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),
  )
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(type_handler_registry=as_they_are),
    'meta': ocp.JsonCheckpointHandler(),
  }
  meta = {'checksums': {'/'.join(map(str, ('params', *path))): n for path, n in sums.items()}}
  items = ocp.args.Composite(
    state=ocp.args.PyTreeSave({'params': nested(arrays)}, save_args={'params': nested(chunks)}),
    meta=ocp.args.JsonSave(meta),
  )
  options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
  folder = storage.plain_path(pathlib.Path(folder).absolute())
  with ocp.CheckpointManager(folder, options=options, item_handlers=handlers) as manager:
    manager.save(0, args=items)
  return folder / '0' / 'state'


def _open(state: pathlib.Path, path: Path, **mode) -> tensorstore.TensorStore:
  """An array of a checkpoint as Orbax lays it out."""
  name = '.'.join(map(str, ('params', *path)))
  # A driver and a path, not a URL, in which #, ? and % would mean something.
  base = {'driver': 'file', 'path': f'{state}/'}
  kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  return tensorstore.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, **mode).result()


class Params:
  """The parameters in a checkpoint of a folder (a run's, or a folder of checkpoints), read by need.

  A piece is read by itself where the checkpoint is chunked so; else its whole parameter is read and held
  until `forget`.

  Args:
    folder: of a run, or of checkpoints.
    step: which checkpoint; None for the newest.

  Raises:
    UserError: there is no such checkpoint.
  """

  def __init__(self, folder: str | pathlib.Path, step: int | None = None):
    folder = pathlib.Path(folder).absolute()
    # A run's checkpoints stand in its folder 'checkpoints'.
    folder = next((f for f in (folder / 'checkpoints', folder) if f.is_dir()), folder)
    if not folder.is_dir():
      raise UserError(f'there is no folder {folder}.')
    # Not by Orbax' manager, which warns of every option that a reader does not need.
    steps = folders.saved_steps(folder)
    if not steps:
      raise UserError(f'there is no checkpoint in {folder}.')
    if step not in (None, *steps):
      raise UserError(f'{folder} has no checkpoint of step {step}; its steps are {steps}.')
    self.step = steps[-1] if step is None else step
    self.state = storage.plain_path(folder) / str(self.step) / 'state'
    self.folder = folder
    self.held: dict[Path, np.ndarray] = {}
    self.arrays: dict[Path, tensorstore.TensorStore] = {}
    self.sources: dict[str, str] = {}
    self.base = self._open_base()

  def _open_base(self) -> 'Params | None':
    """The checkpoint that has the parameters which did not learn, where some did not.

    Raises:
      UserError: it is not there any more, or holds something else.
    """
    base = self._meta().get('base')
    if base is None:
      return None
    why = f'{self.folder} holds what learned alone; the other parameters are in {base["folder"]}'
    try:
      params = Params(base['folder'], base['step'])
    except UserError as error:
      raise UserError(f'{why}, which cannot be read: {error}') from None
    if params.signature != base['signature']:
      raise UserError(f'{why}, which was changed since: put back what was there at the time.')
    self.sources = base['sources']
    return params

  def piece(self, path: Path, index: tuple[int, ...]) -> np.ndarray:
    """The values of a parameter at `index` of its leading axes.

    Raises:
      UserError: the checkpoint has no parameter of this name.
    """
    name = '/'.join(map(str, path))
    if self.base is not None and name in self.sources:
      return self.base.piece(tuple(self.sources[name].split('/')), index)
    if path not in self.arrays:
      try:
        self.arrays[path] = _open(self.state, path)
      except ValueError:
        raise UserError(f'{self.folder} has no parameter {name}.') from None
    array = self.arrays[path]
    if all(n == 1 for n in array.chunk_layout.read_chunk.shape[: len(index)]):
      return array[index].read().result()
    if path not in self.held:
      self.held[path] = array.read().result()
    return self.held[path][index]

  def checksums(self) -> dict[str, int]:
    """The checksum of every array by name, 'params/...'; empty where none were written."""
    sums = dict(self._meta().get('checksums', {}))
    if self.base is not None:
      of_base = self.base.checksums()
      pairs = ((f'params/{name}', f'params/{source}') for name, source in self.sources.items())
      sums |= {name: of_base[source] for name, source in pairs if source in of_base}
    return sums

  @property
  def signature(self) -> str:
    """Differs when any parameter does."""
    sums = self.checksums()
    return digest({name: n for name, n in sums.items() if name.startswith('params/')})

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter by name, 'stack/norm/scale'."""
    tree = ocp.StandardCheckpointHandler().metadata(self.state).tree['params']
    shapes = {name: tuple(value.shape) for name, value in names(tree).items()}
    if self.base is not None:
      of_base = self.base.shapes()
      shapes |= {name: of_base[source] for name, source in self.sources.items()}
    return shapes

  def _meta(self) -> dict:
    """What was saved beside the arrays."""
    path = self.state.parent / 'meta' / 'metadata'
    return json.loads(path.read_text()) if path.is_file() else {}

  def forget(self) -> None:
    """Frees what is held."""
    self.held.clear()
    if self.base is not None:
      self.base.forget()


def nested(flat: Mapping[Path, object]) -> dict:
  """Nested dicts of values by path."""
  tree: dict = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree
