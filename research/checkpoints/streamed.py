"""Writes and reads checkpoints of parameters, a piece at a time.

A piece is a parameter, or the slice of a stacked one that belongs to one layer or one expert. Neither direction
has more than a piece in memory. For writing, Orbax makes the checkpoint with empty arrays, in chunks of one
piece, and the pieces are written into it one by one. `Checkpoints` restores it like any other checkpoint, onto
any mesh. Until the last piece is written the checksums do not match, so an interrupted checkpoint counts as
damaged.
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

Path = tuple  # the keys of a parameter in nested dicts
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
    folder: the folder of checkpoints.
    shapes: the shape of every parameter.
    leading: how many leading axes of a parameter are indexed by its pieces.
    pieces: yields (path, index on the leading axes, values). It is called twice: for checksums, and to write.
    dtypes: the dtypes of parameters that are not float32, such as packed ones.
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
  """Writes the checkpoint without values; returns the folder of its arrays."""
  # A single zero, broadcast to the whole shape: Orbax must not copy it, and skips chunks of zeros.
  zeros = {path: np.zeros((), dtype) for path, dtype in dtypes.items()}
  arrays = {path: np.broadcast_to(zeros[path], shape) for path, shape in shapes.items()}
  chunks = {path: ocp.SaveArgs(shard_axes=tuple(range(n))) for path, n in leading.items()}
  without_copies = ocp.type_handlers.create_type_handler_registry(
    (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
    # No array here is a jax.Array, but Orbax warns if the registry has no handler for them.
    (jax.Array, ocp.type_handlers.ArrayHandler(array_metadata_store=None)),
  )
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(type_handler_registry=without_copies),
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
  """Opens an array of a checkpoint, in the format of Orbax."""
  name = '.'.join(map(str, ('params', *path)))
  # A driver and a path and not a URL, in which #, ? and % of a folder's name would have a meaning.
  base = {'driver': 'file', 'path': f'{state}/'}
  kvstore = {'driver': 'ocdbt', 'base': base, 'path': f'{name}/'}
  return tensorstore.open({'driver': 'zarr', 'kvstore': kvstore}, open=True, **mode).result()


class Params:
  """The parameters in a checkpoint, read on demand.

  A piece is read alone if the checkpoint has chunks of single pieces. Otherwise the whole parameter is read and
  stays in memory until `forget`.

  Args:
    folder: the folder of a run, or of checkpoints.
    step: the step of the checkpoint; None for the newest.

  Raises:
    UserError: there is no such checkpoint.
  """

  def __init__(self, folder: str | pathlib.Path, step: int | None = None):
    folder = pathlib.Path(folder).absolute()
    # A run has its checkpoints in the folder 'checkpoints'.
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
    self.in_memory: dict[Path, np.ndarray] = {}
    self.arrays: dict[Path, tensorstore.TensorStore] = {}
    self.sources: dict[str, str] = {}
    self.base = self._open_base()

  def _open_base(self) -> 'Params | None':
    """Returns the checkpoint of the parameters that did not learn; None if all of them learned.

    Raises:
      UserError: that checkpoint is gone, or was changed.
    """
    base = self._meta().get('base')
    if base is None:
      return None
    why = f'{self.folder} has only the parameters that learned; the others are in {base["folder"]}'
    try:
      params = Params(base['folder'], base['step'])
    except UserError as error:
      raise UserError(f'{why}, which cannot be read: {error}') from None
    if params.signature != base['signature']:
      raise UserError(
        f'{why}, which has changed since: restore the checkpoint that the run started from.'
      )
    self.sources = base['sources']
    return params

  def piece(self, path: Path, index: tuple[int, ...]) -> np.ndarray:
    """Returns the values of a parameter at `index` of its leading axes.

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
    if path not in self.in_memory:
      self.in_memory[path] = array.read().result()
    return self.in_memory[path][index]

  def checksums(self) -> dict[str, int]:
    """Returns the checksum of every array by name, 'params/...'; empty if the checkpoint has none."""
    sums = dict(self._meta().get('checksums', {}))
    if self.base is not None:
      of_base = self.base.checksums()
      pairs = ((f'params/{name}', f'params/{source}') for name, source in self.sources.items())
      sums |= {name: of_base[source] for name, source in pairs if source in of_base}
    return sums

  @property
  def signature(self) -> str:
    """A digest that differs if any parameter does."""
    sums = self.checksums()
    return digest({name: n for name, n in sums.items() if name.startswith('params/')})

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every parameter by name, such as 'stack/norm/scale'."""
    tree = ocp.StandardCheckpointHandler().metadata(self.state).tree['params']
    shapes = {name: tuple(value.shape) for name, value in names(tree).items()}
    if self.base is not None:
      of_base = self.base.shapes()
      shapes |= {name: of_base[source] for name, source in self.sources.items()}
    return shapes

  def _meta(self) -> dict:
    """Returns the JSON values that were saved beside the arrays."""
    path = self.state.parent / 'meta' / 'metadata'
    return json.loads(path.read_text()) if path.is_file() else {}

  def forget(self) -> None:
    """Frees the parameters in memory."""
    self.in_memory.clear()
    if self.base is not None:
      self.base.forget()


def nested(flat: Mapping[Path, object]) -> dict:
  """Turns values by path into nested dicts."""
  tree: dict = {}
  for path, value in flat.items():
    node = tree
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = value
  return tree
