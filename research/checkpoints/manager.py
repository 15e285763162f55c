"""Checkpoints that are verified on load: Orbax, behind one small class.

Orbax restores a flipped byte as NaN without an error, so every checkpoint carries a checksum of each array,
and a restore that does not match falls back to the previous good step and says so.
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
from research.core.errors import UserError
from research.core.text import tell
from research.parallel import hosts


def names(tree) -> dict[str, Any]:
  """The leaves of nested dicts by path, 'params/embedder/tokens'."""
  flat, _ = jax.tree.flatten_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


@jax.jit
def _checksums(tree):
  def one(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x = jax.random.key_data(x)
    size = x.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size])
    bits, place, stride = bits.astype(jnp.uint32), jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
      place += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * np.uint32(stride % 2**32)
      stride *= x.shape[axis]
    # Odd weights: no single flipped bit can vanish modulo 2^32. Integer sums do not depend on the mesh.
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

  return jax.tree.map(one, tree)


def checksums(tree) -> dict[str, int]:
  """A 32-bit checksum of every array, by name; the same on every mesh."""
  if all(_at_hand(x) for x in jax.tree.leaves(tree)):  # nothing to compile
    return {name: partial_checksum(np.asarray(x), 0) for name, x in names(tree).items()}
  return {name: int(value) for name, value in names(_checksums(tree)).items()}


def _at_hand(x) -> bool:
  """Whether an array lies in this process's own memory."""
  if not isinstance(x, jax.Array):
    return isinstance(x, np.ndarray)
  on_cpu = all(device.platform == 'cpu' for device in x.devices())
  return on_cpu and x.is_fully_addressable and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


_WEIGHTS = np.arange(1, 2**20, 2, dtype=np.uint32)


def partial_checksum(x: np.ndarray, start: int) -> int:
  """What contiguous values on the host add to the checksum of the array they begin at place `start` of.

  The checksum of an array is the sum of those of its pieces, modulo 2^32.
  """
  bits, total, step = x.reshape(-1).view(f'u{x.dtype.itemsize}'), 0, _WEIGHTS.size
  for i in range(0, bits.size, step):
    part = bits[i : i + step].astype(np.uint32, copy=False)
    # At place `start + i + j` the weight is 2 (start + i) more than at place j.
    total += int(part @ _WEIGHTS[: part.size])
    total += 2 * (start + i) * int(np.sum(part, dtype=np.uint32))
  return total % 2**32


def _are_parameters(paths: Iterable[str]) -> bool:
  """Whether nothing but parameters has these names: no optimizer's state, no step."""
  return all(path.startswith('params/') for path in paths)


class _NotOfFullDisk(logging.Filter):
  """Leaves out the hundreds of lines that Orbax and asyncio log about a full disk: `Checkpoints` says it."""

  def filter(self, record: logging.LogRecord) -> bool:
    errors = [Exception(record.getMessage()), record.exc_info and record.exc_info[1]]
    return not any(error and cli.machine_fault(error) for error in errors)


_NOT_OF_FULL_DISK = _NotOfFullDisk()


class Checkpoints:
  """The checkpoints of one run, in `folder`/<step>; the newest `keep` of them.

  Saving is asynchronous; an error of a save is raised by the next `save` or by `close`.
  """

  def __init__(self, folder: pathlib.Path, *, keep: int = 2):
    self.folder = folder if storage.is_bucket(folder) else folder.absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    handlers = {'state': ocp.StandardCheckpointHandler(), 'meta': ocp.JsonCheckpointHandler()}
    for logger in ('absl', 'asyncio'):
      logging.getLogger(logger).addFilter(_NOT_OF_FULL_DISK)  # the same one is added once
    plain = storage.plain_path(self.folder)
    self.manager = ocp.CheckpointManager(plain, options=options, item_handlers=handlers)

  def save(self, step: int, state, meta: dict[str, Any]) -> None:
    """Starts to save `state` (arrays may be donated after this) with `meta` (JSON) beside it."""
    if step in self.manager.all_steps():
      return
    meta = {**meta, 'checksums': checksums(state)}
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
    with self._told_if_full():
      self.manager.save(step, args=items)

  def restore(self, abstract_state, log=tell) -> tuple[int, Any, dict] | None:
    """The newest good checkpoint: (step, state, meta), or None where there is none.

    Args:
      abstract_state: what is wanted, as `jax.eval_shape` gives it under the mesh to restore onto.
      log: told of every damaged checkpoint, which is moved to `<folder>_damaged`.

    Raises:
      UserError: the checkpoint holds another model: names what is missing, extra or misshapen.
    """
    target = hosts.on_mesh(abstract_state)
    for step in sorted(self.manager.all_steps(), reverse=True):
      self._check_same_model(step, target)
      items = ocp.args.Composite(
        state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore()
      )
      try:
        restored = self.manager.restore(step, args=items)
        saved, read = restored.meta.pop('checksums'), checksums(restored.state)
        bad = [name for name, value in saved.items() if read.get(name) != value]
      except (ValueError, OSError, KeyError) as error:
        bad = [f'{type(error).__name__}: {str(error).splitlines()[0][:200]}']
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
      return  # unreadable: the restore will say so
    saved = {k: tuple(v.shape) for k, v in saved.items()}
    wanted = {k: tuple(v.shape) for k, v in names(target).items()}
    # Parameters before the optimizer's copies of them.
    saved, wanted = (
      {k: d[k] for k in sorted(d, key=lambda k: (k[:6] != 'params', k))} for d in (saved, wanted)
    )
    problems = [f'{k} is missing' for k in wanted if k not in saved]
    problems += [f'{k} is not in this model' for k in saved if k not in wanted]
    problems += [
      f'{k} is {saved[k]} and this model has {wanted[k]}'
      for k in wanted
      if k in saved and saved[k] != wanted[k]
    ]
    if saved and _are_parameters(saved) and not _are_parameters(wanted):
      raise UserError(
        f'{self.folder / str(step)} holds the parameters of a model alone, as conversion writes them, and '
        'nothing of a run that could go on; give this run a workdir of its own, and name that folder in '
        'Run.init = @starts.Checkpoint() to start from its parameters.'
      )
    if problems:
      more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
      raise UserError(
        f'{self.folder / str(step)} was saved by another model: {"; ".join(problems[:3])}{more}; '
        'give this run a workdir of its own.'
      )

  # A host alone may read a checkpoint wrongly; all must fall back to the same step.
  @staticmethod
  def _anywhere(flag: bool) -> bool:
    """Whether it is so on any host."""
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
    self._anywhere(False)  # nobody looks before it is moved
    self.manager.reload()

  @contextlib.contextmanager
  def _told_if_full(self):
    """A disk without room becomes one sentence that says what was kept; what was half written is removed."""
    try:
      yield
    except Exception as error:  # Orbax and TensorStore raise it as various types
      if cli.machine_fault(error) is None:
        raise
      self._remove_unfinished()
      kept = folders.saved_steps(self.folder)
      left = f'the one of step {kept[-1]:,} is kept' if kept else 'there is none before it'
      raise UserError(
        f'{self.folder}: the disk has no room for a checkpoint, and {left}; free some space, and start '
        'the same command again to go on.'
      ) from error

  def _remove_unfinished(self) -> None:
    if jax.process_index() == 0 and not storage.is_bucket(self.folder):
      for folder in self.folder.iterdir():
        if 'orbax-checkpoint-tmp' in folder.name:
          shutil.rmtree(folder, ignore_errors=True)

  def wait(self) -> None:
    """Returns when what was saved is on disk."""
    with self._told_if_full():
      self.manager.wait_until_finished()

  def close(self) -> None:
    """Waits for the last save and ends."""
    with self._told_if_full():
      self.manager.close()
