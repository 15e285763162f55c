"""Examples as a person can read them: documents apart, special tokens by name, what carries no loss marked."""

import numpy as np
import seqio

from tasks.preprocessors import mark_id

_LEGEND = (
  '(parts of an example do not see each other; ‹ › carries no loss; '
  'an input that is not shown is its target, one token late)'
)


def render(examples: dict[str, np.ndarray], vocabulary, stream) -> str:
  """Text of a batch of examples, after a line that says how to read it."""
  sides = [s for s in ('encoder', 'decoder') if f'{s}_input_tokens' in examples]
  lines = [_LEGEND]
  for i in range(len(next(iter(examples.values())))):
    row = {k: v[i] for k, v in examples.items()}
    ids = {s: row.get(f'{s}_segment_ids') for s in sides}
    last = max([1, *(v.max() for v in ids.values() if v is not None)])
    used = ', '.join(f'{s} {_used(row, s)} of {len(row[f"{s}_input_tokens"])} used' for s in sides)
    parts = '1 document part' if last == 1 else f'{last} document parts'
    lines.append(f'example {i}: {parts}; {used}')
    for segment in range(1, last + 1):
      lines.append(f' part {segment}')
      for side in sides:
        lines += _side(row, side, ids[side], segment, vocabulary, stream)
  return '\n'.join(lines)


def _used(row, side) -> int:
  if f'{side}_segment_ids' in row:
    return int((row[f'{side}_segment_ids'] > 0).sum())
  return int(_filled(row, side).sum())


def _filled(row, side) -> np.ndarray:
  """(length,) bool: what an unpacked row holds, up to its last token that is not 0 or carries a loss."""
  tokens = row.get(f'{side}_target_tokens', row[f'{side}_input_tokens'])
  used = (tokens > 0) | (row.get(f'{side}_loss_weights', 0) > 0)
  return np.arange(len(tokens)) <= np.max(np.flatnonzero(used), initial=-1)


def _side(row, side, ids, segment, vocabulary, stream):
  here = ids == segment if ids is not None else _filled(row, side)
  targets = row.get(f'{side}_target_tokens')
  if targets is None or side == 'encoder' or stream.name == 'masked_lm':
    yield f'  {side} input   {text(row[f"{side}_input_tokens"][here], vocabulary, stream)}'
  if targets is None:
    return
  tokens, weights = targets[here], row[f'{side}_loss_weights'][here]
  shown, start = '', 0
  for at in range(1, len(tokens) + 1):
    if at == len(tokens) or (weights[at] > 0) != (weights[start] > 0):
      part = text(tokens[start:at], vocabulary, stream)
      shown += part if weights[start] > 0 else f'‹{part}›'
      start = at
  yield f'  {side} target  {shown}'
  if 'decoder_causal_attention' in row and side == 'decoder':
    prefix = int(row['decoder_causal_attention'][here].sum())
    yield f'  {side} prefix  the first {prefix} inputs see each other both ways'


def text(tokens: np.ndarray, vocabulary, stream) -> str:
  """Tokens as one line of text; padding is left out."""
  first = mark_id(vocabulary, 0) if vocabulary.extra_ids else vocabulary.vocab_size
  marks = () if stream.registered else stream.task.mark_names
  out, held = '', []
  for t in [*tokens.tolist(), None]:
    special = t is None or t == 0 or t == vocabulary.eos_id or t >= first
    if not special:
      held.append(t)
      continue
    out += _plain(held, vocabulary)
    held = []
    if t == vocabulary.eos_id:
      out += '<eos>'
    elif t and first <= t < first + len(marks):
      out += marks[t - first]
    elif t:
      out += f'<extra_id_{vocabulary.vocab_size - 1 - t}>'
  return out.replace('\r', '\\r').replace('\n', '\\n').replace('\t', '\\t')


def _plain(tokens: list[int], vocabulary) -> str:
  """Text of tokens that are not special; bytes that are half a character as \\xNN."""
  if isinstance(vocabulary, seqio.ByteVocabulary):
    return bytes(t - 3 for t in tokens if t >= 3).decode(errors='backslashreplace')
  return str(vocabulary.decode(tokens)) if tokens else ''
