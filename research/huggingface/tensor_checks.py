"""Compares the tensors of a Hugging Face folder with those that its config.json asks for."""

import re
from typing import Any

from research.core.errors import UserError
from research.huggingface.fields import Family
from research.huggingface.files import Tensors
from research.huggingface.names import Tensor
from research.huggingface.settings import Settings

# Names that older versions of transformers gave to the same tensors.
RENAMED = {
  r'LayerNorm\.gamma$': 'LayerNorm.weight', r'LayerNorm\.beta$': 'LayerNorm.bias',
  r'^backbone\.embedding\.weight$': 'backbone.embeddings.weight',
}  # fmt: skip
LISTED = 12  # tensors named in one message
# The keys for the number of layers or experts. Each of these has a tensor, or a slice of one, in the files.
COUNTS = (
  'num_hidden_layers', 'n_layer', 'n_layers', 'num_layers', 'num_decoder_layers',
  'num_experts', 'num_local_experts', 'n_routed_experts',
)  # fmt: skip
MANY = 10_000  # layers or experts that a model may have, however few tensors its files hold


def check_counts(folder, config: dict[str, Any], given: Tensors) -> None:
  """Refuses more layers or experts than there are tensors, before anything of that length is built."""
  for key in COUNTS:
    count = config.get(key)
    if isinstance(count, int | float) and count > max(MANY, len(given)):
      raise UserError(
        f'{folder}: {key} = {count} of config.json is more than the {len(given)} tensors of the files can '
        'hold; correct the key, or download the missing files.'
      )


def canonical_names(family: Family, given: Tensors) -> dict[str, str]:
  """Maps old names, and names without the family's prefix, to the names in the tables."""
  outside = tuple(
    name.split('.')[0] + '.' for name in family.top.values() if not name.startswith(family.prefix)
  )
  bare = family.prefix and not any(name.startswith(family.prefix) for name in given)
  names = {}
  for name in given:
    new = name if not bare or name.startswith(outside) else family.prefix + name
    for old, ending in RENAMED.items():
      new = re.sub(old, ending, new)
    if new != name and new not in given:
      names[name] = new
  return names


def check_tensors(
  folder, family: Family, settings: Settings, wanted: list[Tensor], given: Tensors
) -> None:
  """Refuses tensors that are unknown, missing or misshapen, and copies that differ from their original."""
  names = {tensor.name for tensor in wanted}
  ignored = [*family.ignore, *_extra_layers(settings)]
  unknown = [n for n in given if n not in names and not any(re.fullmatch(i, n) for i in ignored)]
  for name, original in family.copies.items():
    if name in unknown and given.same(name, original):
      unknown.remove(name)
    elif name in unknown and original in given:
      raise UserError(f'{folder}: {name} is not the copy of {original} that it should be.')
  # If the model has no head of its own, the head in the file equals the token vectors: `heads` compared them.
  unknown = [name for name in unknown if name != family.top.get('head.kernel')]
  missing = sorted(names - given.keys())
  _check_head(folder, family, missing)
  problems = [f'{name} is missing' for name in missing]
  problems += [f'{name} is unknown' for name in sorted(unknown)]
  problems += [
    f'{t.name} is {given.shapes[t.name]} and should be {t.shape}'
    for t in wanted
    if given.shapes.get(t.name, t.shape) != t.shape
  ]
  if problems:
    more = f'; and {len(problems) - LISTED} more' if len(problems) > LISTED else ''
    raise UserError(
      f'{folder}: the tensors do not fit config.json: {"; ".join(problems[:LISTED])}{more}.'
    )


def _check_head(folder, family: Family, missing: list[str]) -> None:
  """Refuses a model that was saved without its head: it gives feature vectors, but no logits."""
  head = tuple(name for member, name in family.top.items() if member.startswith('head.'))
  if missing and all(name.startswith(head) for name in missing):
    raise UserError(
      f'{folder}: the files hold a model without its head ({missing[0]} is missing), which has no logits; '
      f'save it with its head, as {family.architecture} of transformers does.'
    )


def _extra_layers(settings: Settings) -> list[str]:
  """Expressions for the layers behind the last one, which predict further tokens (DeepSeek-V3)."""
  if 'num_nextn_predict_layers' not in settings.defaults:
    return []
  first = settings['num_hidden_layers']
  count = settings.get('num_nextn_predict_layers') or 0
  return [rf'model\.layers\.{i}\..*' for i in range(first, first + min(count, 100))]
