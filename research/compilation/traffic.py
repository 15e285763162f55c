"""The bytes that a compiled program moves to and from a device's memory, from its text."""

import dataclasses
import re

from research.compilation import hlo

_FREE = (
  'parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant', 'while', 'conditional', 'iota',
  'opt-barrier', 'after-all',
)  # fmt: skip
# Operations that update a part of their first operand, and the number of the operand that has the part.
_IN_PLACE = {'dynamic-update-slice': 1, 'scatter': 2}


@dataclasses.dataclass(frozen=True)
class _Instruction:
  """A line of HLO: result's type, operation, operands, what it calls, and the bytes a kernel says to move."""

  type: str
  operation: str
  operands: tuple[str, ...]
  calls: str | None
  kernel_bytes: int = 0
  in_place: bool = False

  @property
  def bytes(self) -> int:
    return sum(hlo.size(*shape) for shape in hlo.shapes(self.type))


def moved_bytes(text: str) -> int:
  """Returns the bytes to and from a device's memory in a step, if every result is written once and read once.

  An update in place (a slice of a stacked array, an entry of a cache) counts only the bytes that it writes. If
  XLA cannot update in place, it writes a `copy` first, which counts as a whole. Results within fusions count
  nothing, and neither do the program's arguments. A kernel that says what it reads and writes, tile by tile
  (Pallas's `CostEstimate`), counts that, and its results are read once if it does not update them in place.
  """
  lines_of, _ = hlo.computations(text)
  times = hlo.trip_counts(text)
  total = 0
  parsed = {name: _instructions(lines) for name, lines in lines_of.items()}
  for name, (instructions, _) in parsed.items():
    if 'fus' in name or not times.get(name):
      continue
    for instruction in instructions.values():
      if instruction.operation not in _FREE and not instruction.operation.endswith('-done'):
        total += times[name] * _moved(instruction, instructions, parsed)
  return total


def _moved(instruction: _Instruction, siblings: dict[str, _Instruction], parsed) -> int:
  """Returns the bytes that an instruction writes and others read of it; of a kernel, also what it reads."""
  if instruction.kernel_bytes:
    return instruction.kernel_bytes + (0 if instruction.in_place else instruction.bytes)
  written = _written(instruction, siblings, parsed)
  # What starts a copy may have its operands in its result too.
  if instruction.operation.endswith('-start'):
    operands = sum(siblings[x].bytes for x in instruction.operands if x in siblings)
    written = written - operands if written > operands else written
  return 2 * written


def _instructions(lines: list[str]) -> tuple[dict[str, _Instruction], _Instruction | None]:
  """Returns {name: instruction} of a computation, and its root."""
  instructions = {}
  root = None
  for line in lines:
    match = re.match(r'\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\(', line)
    if not match:
      continue
    # The operands end at the closing bracket; attributes follow.
    depth = 1
    end = match.end()
    while depth and end < len(line):
      depth += {'(': 1, ')': -1}.get(line[end], 0)
      end += 1
    operands = tuple(re.findall(r'%([\w.\-]+)', line[match.end() : end]))
    calls = re.search(r'calls=%?([\w.\-]+)', line[end:])
    moves = re.search(r'"bytes_accessed":"?(\d+)', line[end:])
    kernel = int(moves[1]) if moves else 0
    in_place = 'output_to_operand_aliasing' in line[end:]
    instruction = _Instruction(match[3], match[4], operands, calls and calls[1], kernel, in_place)
    instructions[match[2]] = instruction
    if match[1]:
      root = instruction
  return instructions, root


def _written(
  instruction: _Instruction, siblings: dict[str, _Instruction], parsed, fused=False
) -> int:
  """Returns the bytes that an instruction writes.

  Args:
    instruction: the instruction.
    siblings: the instructions of its computation, by name.
    parsed: `_instructions` of every computation.
    fused: whether it is within a fusion.
  """
  if fused and instruction.operation in ('bitcast', 'tuple'):
    results = [siblings[name] for name in instruction.operands if name in siblings]
    return sum(_written(result, siblings, parsed, fused) for result in results)
  inside, root = parsed.get(instruction.calls or '', ({}, None))
  if instruction.operation == 'fusion' and root is not None:
    return _written(root, inside, parsed, fused=True)
  place = _IN_PLACE.get(instruction.operation)
  if place is None or len(instruction.operands) <= place:
    return instruction.bytes
  whole, part = (siblings.get(instruction.operands[i]) for i in (0, place))
  while fused and whole is not None and whole.operation == 'bitcast':
    whole = siblings.get(whole.operands[0])
  # A fusion that computes the array that it updates writes all of it.
  if part is None or (fused and (whole is None or whole.operation != 'parameter')):
    return instruction.bytes
  return part.bytes
