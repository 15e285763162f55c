"""Saves and restores checkpoints by Orbax, and verifies them when they are loaded.

Orbax restores a flipped byte without an error. So every checkpoint has a checksum of each array. If one does
not match, the restore reports it and falls back to the previous good step.
"""

import contextlib
import logging
import pathlib
import shutil
import time
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from research.checkpoints import folders
from research.core import cli, storage
from research.core.errors import UserError, in_a_line
from research.core.text import tell
from research.parallel import hosts


def names(tree) -> dict[str, Any]:
  """Returns the leaves of nested dicts by path, such as 'params/embedder/tokens'."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


@jax.jit
def _checksums(tree):
  def checksum(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    size = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    bits = bits.astype(jnp.uint32)
    place = jnp.zeros((), jnp.uint32)  # becomes each element's index in the flattened array
    stride = 1
    for axis in reversed(range(x.ndim)):
      place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
      stride *= x.shape[axis]
    # The weights are odd, so that no flipped bit vanishes modulo 2^32. Sums of integers do not depend on the
    # mesh.
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

  return jax.tree.map(checksum, tree)


def checksums(tree) -> dict[str, int]:
  """Returns a 32-bit checksum of every array, by name. It is the same on every mesh."""
  # numpy needs no compilation, which takes longer than the sums of a small model.
  if all(_at_hand(x) for x in jax.tree.leaves(tree)):
    return {name: partial_checksum(np.asarray(x), 0) for name, x in names(tree).items()}
  return {name: int(value) for name, value in names(_checksums(tree)).items()}


def _at_hand(x) -> bool:
  """Returns whether numpy can read an array in this process's memory."""
  if not isinstance(x, jax.Array):
    return isinstance(x, np.ndarray)
  on_cpu = all(device.platform == 'cpu' for device in x.devices())
  return on_cpu and x.is_fully_addressable and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


_WEIGHTS = np.arange(1, 2**20, 2, dtype=np.uint32)  # of the first elements: 1, 3, 5, ...


def partial_checksum(x: np.ndarray, start: int) -> int:
  """Returns the share of a piece in the checksum of an array.

  The checksum of an array is the sum of those of its pieces, modulo 2^32.

  Args:
    x: contiguous values on the host.
    start: their first index in the flattened array.
  """
  bits = x.reshape(-1).view(f'u{x.dtype.itemsize}')
  total = 0
  step = _WEIGHTS.size
  for i in range(0, bits.size, step):
    part = bits[i : i + step].astype(np.uint32, copy=False)
    # The weight of index `start + i + j` is 2 (start + i) more than that of index j.
    total += int(part @ _WEIGHTS[: part.size])
    total += 2 * (start + i) * int(np.sum(part, dtype=np.uint32))
  return total % 2**32


def _are_parameters(paths: Iterable[str]) -> bool:
  """Returns whether all names are those of parameters: no optimizer's state, no step."""
  return all(path.startswith('params/') for path in paths)


class _NotOfFullDisk(logging.Filter):
  """Drops the hundreds of lines that Orbax and asyncio log about a full disk: `Checkpoints` reports it once."""

  def filter(self, record: logging.LogRecord) -> bool:
    errors = [Exception(record.getMessage()), record.exc_info and record.exc_info[1]]
    return not any(error and cli.machine_fault(error) for error in errors)


_NOT_OF_FULL_DISK = _NotOfFullDisk()


class Checkpoints:
  """The newest `keep` checkpoints of a run, in `folder`/<step>.

  Saving is asynchronous. The error of a save is raised by the next `save`, by `wait` or by `close`.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    self.folder = folder if storage.is_bucket(folder) else folder.absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    handlers = {'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}
    for logger in ('absl', 'asyncio'):
      # Adding the same filter again has no effect.
      logging.getLogger(logger).addFilter(_NOT_OF_FULL_DISK)
    plain = storage.plain_path(self.folder)
    self.manager = ocp.CheckpointManager(plain, options=options, item_handlers=handlers)

  def save(self, step: int, state, meta: dict[str, Any]) -> None:
    """Starts to save a state. Its arrays may be donated after this call.

    Args:
      step: the step of the state; a step that is saved already is skipped.
      state: a tree of arrays.
      meta: JSON values to save beside it.

    Raises:
      UserError: the disk is full.
    """
    if step in self.manager.all_steps():
      return
    meta = {**meta, 'checksums': checksums(state)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with self._full_disk_as_error():
      self.manager.save(step, args=items)

  def restore(self, abstract_state, log=tell) -> tuple[int, Any, dict] | None:
    """Restores the newest good checkpoint: (step, state, meta), or None if there is none.

    Args:
      abstract_state: the shapes of the state, as `jax.eval_shape` returns them under the mesh to restore onto.
      log: called with a line about every damaged checkpoint, which is moved to `<folder>_damaged`.

    Raises:
      UserError: the checkpoint is of another model. The message names arrays that are missing, extra or
        misshapen.
    """
    target = hosts.on_mesh(abstract_state)
    for step in sorted(self.manager.all_steps(), reverse=True):
      self._check_same_model(step, target)
      items = ocp.args.Composite(
        state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
      )
      try:
        restored = self.manager.restore(step, args=items)
        expected = restored.meta.pop('checksums')
        actual = checksums(restored.state)
        bad = [name for name, value in expected.items() if actual.get(name) != value]
      except (ValueError, OSError, KeyError) as error:
        bad = [in_a_line(error)[:200]]
      # All hosts must fall back together, or they would continue from different steps.
      if not self._anywhere(bool(bad)):
        return step, restored.state, restored.meta
      why = bad[0] if bad else 'on another host'
      log(f'checkpoint at step {step} is damaged ({why}); falling back to the one before it')
      self._set_aside(step)
    return None

  def _check_same_model(self, step: int, target) -> None:
    try:
      saved = names(self.manager.item_metadata(step)['state'].tree)
    except (ValueError, OSError, KeyError, AttributeError, TypeError):
      return  # unreadable: the restore reports it
    saved = {k: tuple(v.shape) for k, v in saved.items()}
    wanted = {k: tuple(v.shape) for k, v in names(target).items()}
    saved = _parameters_first(saved)
    wanted = _parameters_first(wanted)
    problems = [f'{k} is missing' for k in wanted if k not in saved]
    problems += [f'{k} is not in this model' for k in saved if k not in wanted]
    problems += [
      f'{k} is {saved[k]} and this model has {wanted[k]}'
      for k in wanted
      if k in saved and saved[k] != wanted[k]
    ]
    if saved and _are_parameters(saved) and not _are_parameters(wanted):
      raise UserError(
        f'{self.folder / str(step)} has only the parameters of a model, as conversion writes them, and no '
        'state of a run to resume; give this run a workdir of its own, and name that folder in '
        'Run.init = @starts.Checkpoint() to start from its parameters.'
      )
    if problems:
      more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
      raise UserError(
        f'{self.folder / str(step)} was saved by another model: {"; ".join(problems[:3])}{more}; '
        'give this run a workdir of its own.'
      )

  @staticmethod
  def _anywhere(flag: bool) -> bool:
    """Returns whether `flag` is True on any host."""
    return (
      bool(np.any(multihost_utils.process_allgather(flag))) if jax.process_count() > 1 else flag
    )

  def _set_aside(self, step: int) -> None:
    if jax.process_index() == 0:
      damaged = self.folder.parent / f'{self.folder.name}_damaged'
      damaged.mkdir(exist_ok=True)
      if storage.is_bucket(damaged):
        folders.copy_checkpoint(self.folder / str(step), damaged / f'{step}.{time.time():.0f}')
        (self.folder / str(step)).rmtree()
      else:
        shutil.move(self.folder / str(step), damaged / f'{step}')
    self._anywhere(False)  # a barrier: no host lists the steps before the folder is moved
    self.manager.reload()

  @contextlib.contextmanager
  def _full_disk_as_error(self):
    """Turns the error of a full disk into one sentence, and removes the files of the unfinished checkpoint."""
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise it as various types
      if cli.machine_fault(error) is None:
        raise
      self._remove_unfinished()
      steps = folders.saved_steps(self.folder)
      remaining = f'the one of step {steps[-1]:,} is kept' if steps else 'there is none before it'
      raise UserError(
        f'{self.folder}: the disk has no room for a checkpoint, and {remaining}; free some space, and start '
        'the same command again to continue.'
      ) from error

  def _remove_unfinished(self) -> None:
    if jax.process_index() == 0 and not storage.is_bucket(self.folder):
      for folder in self.folder.iterdir():
        if 'orbax-checkpoint-tmp' in folder.name:
          shutil.rmtree(folder, ignore_errors=True)

  def wait(self) -> None:
    """Waits until every save is on disk."""
    with self._full_disk_as_error():
      self.manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and closes the manager."""
    with self._full_disk_as_error():
      self.manager.close()


def _parameters_first(shapes: dict) -> dict:
  """Sorts by name, with parameters before the optimizer's copies of them: messages name the first few."""

  def order(name):
    return not name.startswith('params'), name

  return {name: shapes[name] for name in sorted(shapes, key=order)}
