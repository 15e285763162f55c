"""Starts a run from the parameters of a checkpoint instead of its seed: `Run.init`.

    run.Run.init = @starts.Checkpoint()
    starts.Checkpoint.folder = 'runs/base'

Parameters are matched by name. A module that replaces another one has it under the name `base`
(`weights.Weight`, `adapters.After`). So 'query/kernel/base' takes the values of 'query/kernel' in the
checkpoint, and parameters beside a `base` are new.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from research.checkpoints.manager import partial_checksum
from research.checkpoints.pretrained import Pretrained
from research.core.errors import Invalid, UserError, did_you_mean

LISTED = 6  # the most parameters that a message names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Pretrained):
  """The parameters of another run, or of a converted model, as the start of a run.

  Model and checkpoint must have the same parameters in the same shapes, unless these patterns allow a
  difference. A pattern is a regular expression that matches the whole name, such as 'head/.*'.

  Attributes:
    folder: the folder of a run, or of a model that `research.convert` wrote.
    step: the step of the checkpoint; None for the newest.
    new: parameters that only the model has. They are drawn from the run's seed.
    unused: parameters that only the checkpoint has.
    resized: parameters whose sizes may differ, such as those of a vocabulary that has grown. The common part is
      taken from the checkpoint, and the rest is drawn from the seed.
    rename: pairs (pattern of a name in the model, its name in the checkpoint), as for `re.sub`. The first pair
      that matches counts.
  """

  new: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()
  resized: tuple[str, ...] = ()
  rename: tuple[tuple[str, str], ...] = ()

  def __post_init__(self):
    for field in ('new', 'unused', 'resized'):
      patterns = getattr(self, field)
      if isinstance(patterns, str):
        raise Invalid(Checkpoint, field, f'{patterns!r} is a single string; write ({patterns!r},).')
      object.__setattr__(self, field, tuple(patterns))
    if any(isinstance(pair, str) or len(pair) != 2 for pair in self.rename):
      raise Invalid(
        Checkpoint, 'rename', 'must have pairs (name in the model, name in the checkpoint).'
      )
    object.__setattr__(self, 'rename', tuple(map(tuple, self.rename)))
    for field in ('new', 'unused', 'resized', 'rename'):
      for item in getattr(self, field):
        check_pattern(Checkpoint, field, item if isinstance(item, str) else item[0])

  def described(self) -> dict:
    """Returns its part of a run's identity: the content of the checkpoint, not its folder, and the patterns."""
    more = {name: getattr(self, name) for name in ('new', 'unused', 'resized', 'rename')}
    return super().described() | {name: value for name, value in more.items() if value}

  def sources(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Returns the name in the checkpoint of every parameter that is not new.

    Args:
      wanted: the shape of every parameter of the model.

    Raises:
      UserError: a parameter is missing, left over or misshapen; all are named.
      Invalid: a pattern matches nothing.
    """
    shapes = self.checkpoint.shapes()
    for field, names in (('new', wanted), ('resized', wanted), ('unused', shapes)):
      for pattern in getattr(self, field):
        if not any(re.fullmatch(pattern, name) for name in names):
          hint = did_you_mean(pattern, names)
          raise Invalid(Checkpoint, field, f'{pattern!r} matches no parameter.{hint}')
    sources = {}
    problems = []
    for name, shape in wanted.items():
      if matches(name, self.new):
        continue
      source = self._source(name, shapes)
      if source in shapes:
        sources[name] = source
        problems += self._misfit(name, shape, shapes[source])
      elif not _beside_base(name, wanted):
        problems.append(f'{source} is missing')
    used = set(sources.values())
    extra = (name for name in shapes if name not in used and not matches(name, self.unused))
    problems += [f'{name} is not in this model' for name in extra]
    if problems:
      more = f'; and {len(problems) - LISTED} more' if len(problems) > LISTED else ''
      raise UserError(
        f'{self.folder} does not fit this model: {"; ".join(problems[:LISTED])}{more}. Allow the differences '
        'by starts.Checkpoint.new, unused, resized or rename.'
      )
    return sources

  def _source(self, name: str, shapes: Mapping) -> str:
    """Returns the name that a parameter of the model has in the checkpoint, which may lack it."""
    for pattern, replacement in self.rename:
      if re.fullmatch(pattern, name):
        return re.sub(pattern, replacement, name)
    return next((candidate for candidate in _without_base(name) if candidate in shapes), name)

  def _misfit(self, name: str, shape: tuple[int, ...], saved: tuple[int, ...]) -> list[str]:
    """Returns what is wrong with the shapes of a parameter in the model and in the checkpoint, if anything."""
    if shape == saved or (matches(name, self.resized) and len(shape) == len(saved)):
      return []
    return [f'{name} is {saved} and this model has {shape}']

  def load(self, wanted: Mapping[str, jax.ShapeDtypeStruct], sources: Mapping[str, str]) -> dict:
    """Returns the values of parameters, on the mesh in use.

    Args:
      wanted: shapes and shardings, by name.
      sources: as `sources` returns them.

    Returns:
      {name: {'value': array}} for those of `wanted` that are not new. Of a resized one also 'mask', which is
      True where the checkpoint has a value.

    Raises:
      UserError: the checkpoint is damaged.
    """
    values = {}
    for name, place in wanted.items():
      if name not in sources:
        continue
      value = self._read(sources[name])
      parts = {'value': value}
      if value.shape != place.shape:
        common = tuple(slice(min(a, b)) for a, b in zip(value.shape, place.shape, strict=True))
        parts = {'value': np.zeros(place.shape, value.dtype), 'mask': np.zeros(place.shape, bool)}
        parts['value'][common] = value[common]
        parts['mask'][common] = True
      values[name] = {key: _placed(x, place, key) for key, x in parts.items()}
    return values

  def _read(self, name: str) -> np.ndarray:
    """Reads a parameter of the checkpoint to the host, and verifies its checksum."""
    params = self.checkpoint
    value = np.ascontiguousarray(params.piece(tuple(name.split('/')), ()))
    params.forget()
    total = params.checksums().get(f'params/{name}')
    if total is not None and partial_checksum(value, 0) != total:
      raise UserError(
        f'{self.folder}: the checkpoint at step {params.step} is damaged ({name}); name another step.'
      )
    return value

  def reference(self, sources: Mapping[str, str]) -> dict:
    """Returns where the parameters are that a run's own checkpoints lack; `streamed.Params` reads it."""
    return {
      'folder': str(self.checkpoint.folder),
      'step': self.checkpoint.step,
      'signature': self.signature,
      'sources': dict(sources),
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
  """Returns whether one of the patterns matches the whole name."""
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def check_pattern(owner: type, field: str, pattern: str) -> None:
  """Raises `Invalid` if a pattern is not a regular expression."""
  try:
    re.compile(pattern)
  except (re.error, TypeError) as error:
    raise Invalid(owner, field, f'{pattern!r} is not a regular expression ({error}).') from None


def _without_base(name: str) -> list[str]:
  """Returns the name, and all names with some of its components `base` left out, the longest first."""
  parts = name.split('/')
  places = [i for i, part in enumerate(parts) if part == 'base']
  names = []
  for count in range(len(places) + 1):
    for left_out in itertools.combinations(places, count):
      names.append('/'.join(part for i, part in enumerate(parts) if i not in left_out))
  return names


def _beside_base(name: str, names: Iterable[str]) -> bool:
  """Returns whether a parameter is an addition: it is beside, and not in, the `base` of one of its parents."""
  parts = name.split('/')
  for i, part in enumerate(parts):
    parent = '/'.join([*parts[:i], 'base'])
    if part != 'base' and any(other == parent or other.startswith(parent + '/') for other in names):
      return True
  return False


def _placed(x: np.ndarray, place: jax.ShapeDtypeStruct, key: str) -> jax.Array:
  """Puts a 'value' or a 'mask' on the devices of a parameter; every device gets its own part only."""
  dtype = place.dtype if key == 'value' else x.dtype
  x = x.astype(dtype, copy=False)
  return jax.make_array_from_callback(x.shape, place.sharding, lambda index: x[index])
