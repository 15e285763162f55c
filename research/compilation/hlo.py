"""Reads the text of a compiled program: its loops, its collectives and its arrays, on one device."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'ragged-all-to-all', 'collective-permute',
)  # fmt: skip
_SHAPE = re.compile(r'\b(pred|bf16|[suf]\d+|f8\w+)\[([\d,]*)\]')
_KIND = re.compile(rf' ({"|".join(KINDS)})(-start)?\(')
# Between slices a TPU sends to its host, which sends to the other hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_TRANSFERS = {'ONE_TO_ONE': 'collective-permute'}
_CALL = re.compile(
  r'(?:calls|body|condition|to_apply|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))'
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Equal collectives of a device.

  Attributes:
    kind: one of `KINDS`.
    count: how many there are in a step.
    bytes: the size of the result of one of them (the operand of a reduce-scatter).
    group: the flattened places in the mesh of the devices that one of them joins. Of a collective between
      slices, the slices.
    dcn: whether it is between slices, over the network of their hosts.
  """

  kind: str
  count: int
  bytes: int
  group: tuple[int, ...]
  dcn: bool = False

  @property
  def wire_bytes(self) -> float:
    """The bytes that a device sends in a step by the best algorithm, a ring."""
    n = max(len(self.group), 1)
    share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1.0}
    return self.count * self.bytes * share.get(self.kind, (n - 1) / n)


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns every array type in a piece of HLO, such as ('bf16', (8, 128))."""
  return [(t, tuple(int(n) for n in dims.split(',') if n)) for t, dims in _SHAPE.findall(text)]


def size(kind: str, dims: tuple[int, ...]) -> int:
  """Returns the bytes of an array of this type."""
  digits = re.search(r'\d+', kind)  # bf16, s32; pred has none
  return math.prod(dims) * (int(digits[0]) // 8 if digits else 1)


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns {name: its instructions} of every computation, and the name of the entry."""
  result = {}
  entry = ''
  name = None
  for line in text.splitlines():
    head = re.match(r'(ENTRY )?(%?[\w.\-]+) .*\{$', line)
    if head and not line.startswith(' ') and '=' not in line.split('(')[0]:
      name = head[2].lstrip('%')
      result[name] = []
      entry = name if head[1] else entry
    elif line.rstrip() == '}':
      name = None
    elif name:
      result[name].append(line)
  return result, entry


def trip_counts(text: str) -> dict[str, int]:
  """Returns how often a step runs every computation: the product of the trip counts of the loops around it."""
  lines_of, entry = computations(text)
  times = Counter()
  stack = [(entry, 1)]
  while stack:
    name, n = stack.pop()
    times[name] += n
    for line in lines_of.get(name, ()):
      trips = _trips(line, lines_of) if ' while(' in line else 1
      names = (name for pair in _CALL.findall(line) for name in (pair[0] or pair[1]).split(','))
      for called in {name.strip().lstrip('%') for name in names}:
        if called in lines_of:
          stack.append((called, n * trips))
  return dict(times)


def _trips(line: str, lines_of: dict[str, list[str]]) -> int:
  """Returns the trip count of a while loop: the compiler's, or the constant in the loop's condition."""
  known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', line)
  if known:
    return int(known[1])
  condition = re.search(r'condition=%?([\w.\-]+)', line)
  if not condition:
    return 1
  lines = '\n'.join(lines_of.get(condition[1], ()))
  bounds = re.findall(r'constant\((\d+)\)', lines)
  return max(map(int, bounds), default=1)


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a step, equal ones as one with their count."""
  lines_of, _ = computations(text)
  times = trip_counts(text)
  total = Counter()
  overlapped = set()
  for name, line in ((name, line) for name, lines in lines_of.items() for line in lines):
    if not times.get(name):
      continue
    if ' send(' in line and (type_ := _BETWEEN_SLICES.search(line)):
      n = size(*shapes(line.split(' = ', 1)[1])[0])
      kind = _TRANSFERS.get(type_[1], type_[1].lower().replace('_', '-'))
      group = slice_group(line)
      total[kind, n * (len(group) if kind == 'all-gather' else 1), group, True] += times[name]
      continue
    match = _KIND.search(line)
    if not match:
      continue
    kind = match[1]
    # On a TPU a collective that overlaps several products appears in each of their fusions.
    channel = re.search(r'channel_id=(\d+)', line)
    if channel and 'fus' in name:
      if (kind, channel[1]) in overlapped:
        continue
      overlapped.add((kind, channel[1]))
    # On a TPU a reduce-scatter is a fusion of this name around an all-reduce.
    if 'reduce-scatter' in name:
      kind = 'reduce-scatter'
    result = line[: match.start()].split(' = ', 1)[1]
    arrays = [size(*shape) for shape in shapes(result)]
    n = sum(arrays) if not match[2] else max(arrays)
    group = tuple(replica_group(line))
    if kind == 'reduce-scatter' and match[1] == kind:
      n *= max(len(group), 1)
    total[kind, n, group, False] += times[name]
  return [Collective(kind, count, *rest) for (kind, *rest), count in total.items()]


def slice_group(line: str) -> tuple[int, ...]:
  """Returns the slices, from 0, that a transfer between slices joins.

  HLO writes pairs of devices, numbered 100,000 (slice + 1) + device, or ranges of slices, from 1.
  """
  if pair := re.search(r'_xla_megascale_target=\{\{(\d+)->(\d+)\}', line):
    return tuple(int(device) // 100_000 - 1 for device in pair.groups())
  listed = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', line)
  spans = [[int(n) for n in span.split(':')] for span in (listed[1].split(',') if listed else ())]
  return tuple(i - 1 for span in spans for i in range(span[0], span[-1] + 1))


def replica_group(line: str) -> list[int]:
  """Returns the first group of devices of a collective, in any of the notations of HLO."""
  if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', line):
    return [int(pairs[1]), int(pairs[2])]
  if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\](?: device_ids=\S+)? ?\{([^}]*)\}', line):
    axes = [(name, int(n)) for name, n in re.findall(r"'(\w+)'=(\d+)", mesh[1])]
    over = re.findall(r"'(\w+)'", mesh[2])
    grid = np.arange(math.prod(n for _, n in axes)).reshape([n for _, n in axes])
    return [int(i) for i in grid[tuple(slice(None) if a in over else 0 for a, _ in axes)].ravel()]
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    groups, dims = ([int(n) for n in iota[i].split(',')] for i in (1, 2))
    ids = np.arange(math.prod(dims)).reshape(dims)
    ids = ids.transpose([int(n) for n in iota[3].split(',')]) if iota[3] else ids
    return [int(i) for i in ids.reshape(groups)[0].ravel()]
  listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
  return [int(n) for n in listed[1].split(',')] if listed else []


def axes_of(group: tuple[int, ...], mesh_shape: dict[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ."""
  places = np.array(np.unravel_index(np.array(group, int), tuple(mesh_shape.values())))
  return tuple(
    axis for axis, row in zip(mesh_shape, places, strict=True) if len(set(row.tolist())) > 1
  )


def arrays(text: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
  """Yields (computation, type, shape) of every result that a program writes to memory.

  The results within a fusion do not reach memory.
  """
  lines_of, _ = computations(text)
  for name, lines in lines_of.items():
    if 'fus' in name:
      continue
    for line in lines:
      if ' = ' in line:
        result = re.split(r' [\w\-]+\(', line.split(' = ', 1)[1], maxsplit=1)[0]
        yield from ((name, *shape) for shape in shapes(result))
