"""Where a run's parameters come from, where not from its seed alone: `Run.init`.

    run.Run.init = @starts.Checkpoint()
    starts.Checkpoint.folder = 'runs/base'

Names decide what goes where. A part of a model that stands for another one keeps it under the name `base`
(`weights.Weight`, `adapters.After`): so 'query/kernel/base' takes what the checkpoint calls 'query/kernel', and
what stands beside a `base` is new.
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

LISTED = 6  # parameters named in one message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint(Pretrained):
  """Parameters start as another run left them, or as `research.convert` wrote them, by name.

  Every parameter of the model must stand in the checkpoint in its shape, and every one there must have its
  place in the model, except where these patterns say otherwise. A pattern is a regular expression that matches
  the whole name, as 'head/.*'.

  Attributes:
    folder: of a run of ours, or of a model that `research.convert` wrote.
    step: of the checkpoint; None for the newest.
    new: parameters that only the model has. They are drawn from the run's seed.
    unused: parameters that only the checkpoint has.
    resized: parameters whose sizes may differ, as those of a vocabulary that has grown: what both have is
      taken, the rest is drawn from the seed.
    rename: pairs (pattern of a name in the model, its name in the checkpoint), as for `re.sub`. The first that
      matches counts.
  """

  new: tuple[str, ...] = ()
  unused: tuple[str, ...] = ()
  resized: tuple[str, ...] = ()
  rename: tuple[tuple[str, str], ...] = ()

  def __post_init__(self):
    for field in ('new', 'unused', 'resized'):
      patterns = getattr(self, field)
      if isinstance(patterns, str):
        raise Invalid(Checkpoint, field, f'{patterns!r} is one string; write ({patterns!r},).')
      object.__setattr__(self, field, tuple(patterns))
    if any(isinstance(pair, str) or len(pair) != 2 for pair in self.rename):
      raise Invalid(Checkpoint, 'rename', 'must hold pairs (name here, name in the checkpoint).')
    object.__setattr__(self, 'rename', tuple(map(tuple, self.rename)))
    for field in ('new', 'unused', 'resized', 'rename'):
      for item in getattr(self, field):
        check_pattern(Checkpoint, field, item if isinstance(item, str) else item[0])

  def described(self) -> dict:
    """What stands in a run's identity: what the checkpoint holds, not where it lies, and what is made of it."""
    more = {name: getattr(self, name) for name in ('new', 'unused', 'resized', 'rename')}
    return super().described() | {name: value for name, value in more.items() if value}

  def sources(self, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Name in the checkpoint of every parameter that is not new.

    Args:
      wanted: shape of every parameter of the model.

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
    found = {}
    problems = []
    for name, shape in wanted.items():
      if matches(name, self.new):
        continue
      source = self._source(name, shapes)
      if source in shapes:
        found[name] = source
        problems += self._misfit(name, shape, shapes[source])
      elif not _beside_base(name, wanted):
        problems.append(f'{source} is missing')
    used = set(found.values())
    extra = (name for name in shapes if name not in used and not matches(name, self.unused))
    problems += [f'{name} is not in this model' for name in extra]
    if problems:
      more = f'; and {len(problems) - LISTED} more' if len(problems) > LISTED else ''
      raise UserError(
        f'{self.folder} does not fit this model: {"; ".join(problems[:LISTED])}{more}. Say what is meant by '
        'starts.Checkpoint.new, unused, resized or rename.'
      )
    return found

  def _source(self, name: str, shapes: Mapping) -> str:
    """The name in the checkpoint of a parameter of the model (which may be missing there)."""
    for pattern, replacement in self.rename:
      if re.fullmatch(pattern, name):
        return re.sub(pattern, replacement, name)
    return next((each for each in _without_base(name) if each in shapes), name)

  def _misfit(self, name: str, here: tuple[int, ...], there: tuple[int, ...]) -> list[str]:
    if here == there or (matches(name, self.resized) and len(here) == len(there)):
      return []
    return [f'{name} is {there} and this model has {here}']

  def load(self, wanted: Mapping[str, jax.ShapeDtypeStruct], sources: Mapping[str, str]) -> dict:
    """The values of parameters, on the mesh in use.

    Args:
      wanted: shapes and places, by name.
      sources: as `sources` gives them.

    Returns:
      {name: {'value': array}} for those of `wanted` that are not new. Of a resized one also 'kept', which is
      True where the checkpoint has a value.

    Raises:
      UserError: the checkpoint is damaged.
    """
    given = {}
    for name, place in wanted.items():
      if name not in sources:
        continue
      value = self._read(sources[name])
      parts = {'value': value}
      if value.shape != place.shape:
        both = tuple(slice(min(a, b)) for a, b in zip(value.shape, place.shape, strict=True))
        parts = {'value': np.zeros(place.shape, value.dtype), 'kept': np.zeros(place.shape, bool)}
        parts['value'][both] = value[both]
        parts['kept'][both] = True
      given[name] = {key: _placed(x, place, key) for key, x in parts.items()}
    return given

  def _read(self, name: str) -> np.ndarray:
    """A parameter of the checkpoint on the host, checked."""
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
    """What a checkpoint that lacks these parameters says of where they are (`streamed.Params` reads it)."""
    return {
      'folder': str(self.checkpoint.folder),
      'step': self.checkpoint.step,
      'signature': self.signature,
      'sources': dict(sources),
    }


def matches(name: str, patterns: Iterable[str]) -> bool:
  """Whether one of the patterns matches the whole name."""
  return any(re.fullmatch(pattern, name) for pattern in patterns)


def check_pattern(owner: type, field: str, pattern: str) -> None:
  """Raises `Invalid` for what is no regular expression."""
  try:
    re.compile(pattern)
  except (re.error, TypeError) as error:
    raise Invalid(owner, field, f'{pattern!r} is no regular expression ({error}).') from None


def _without_base(name: str) -> list[str]:
  """The name, and what it is without one or more of its components `base`, the longest first."""
  parts = name.split('/')
  places = [i for i, part in enumerate(parts) if part == 'base']
  names = []
  for count in range(len(places) + 1):
    for left_out in itertools.combinations(places, count):
      names.append('/'.join(part for i, part in enumerate(parts) if i not in left_out))
  return names


def _beside_base(name: str, names: Iterable[str]) -> bool:
  """Whether a parameter is an addition: one of its parents also holds a `base`, of which it is no part."""
  parts = name.split('/')
  for i, part in enumerate(parts):
    parent = '/'.join([*parts[:i], 'base'])
    if part != 'base' and any(other == parent or other.startswith(parent + '/') for other in names):
      return True
  return False


def _placed(x: np.ndarray, place: jax.ShapeDtypeStruct, key: str) -> jax.Array:
  dtype = place.dtype if key == 'value' else x.dtype
  x = x.astype(dtype, copy=False)
  return jax.make_array_from_callback(x.shape, place.sharding, lambda index: x[index])
