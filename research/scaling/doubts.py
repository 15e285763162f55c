"""Checks a table before a fit: impossible units are errors, and what only looks wrong is a sentence."""

import collections
import math

import numpy as np

from research.scaling.cells import PF_DAYS, RowError
from research.scaling.laws.published import published
from research.scaling.rows import Observations

# Names of columns of the passes over the data, of the unique tokens, and of the step of a checkpoint.
EPOCHS = ('epochs', 'total_epochs', 'num_epochs', 'n_epochs')
UNIQUE = ('unique_tokens', 'unique', 'n_unique_tokens', 'u')
STEPS = ('step', 'steps', '_step', 'current_steps', 'global_step', 'iteration', 'train/step')
# A gap of so many powers of ten within one column means two units: no sweep leaves a gap that wide.
DECADES = 2.5
# The largest plausible median losses in nats per token. ln of a vocabulary of 1e6 is 13.8, which an untrained
# model has; a trained one is below 7.5.
UNTRAINED_LOSS = 20
TRAINED_LOSS = 7.5


def check_units(rows: Observations) -> None:
  """Raises RowError for numbers that only make sense in other units.

  The thresholds are orders of magnitude beyond any run: nothing plausible is refused.
  """
  names = rows.columns
  if np.median(rows.loss) > UNTRAINED_LOSS:
    raise RowError(
      f'Column {names["loss"]!r} has a median of {np.median(rows.loss):.3g}: is it a perplexity? '
      'A fit needs nats per token, the logarithm of the perplexity; pass --loss_unit=perplexity.'
    )
  if 'tokens' in names and 'flops' in names:
    _check_cost(rows)
  for quantity in ('params', 'tokens', 'flops'):
    if quantity in names:
      _check_gap(rows, quantity)
  if 'flops' in names and rows.flops.max() < 1e9:
    raise RowError(
      f'Column {names["flops"]!r} has no value above {rows.flops.max():.3g}, too few FLOPs for any '
      f'run: if it is in PF-days pass --flops_unit={PF_DAYS:g}, if in 1e18 FLOPs --flops_unit=1e18.'
    )
  for quantity, least in (('params', 1e3), ('tokens', 1e5)):
    if quantity in names and getattr(rows, quantity).max() < least:
      raise RowError(
        f'Column {names[quantity]!r} has no value above {getattr(rows, quantity).max():.4g}: is it '
        f'in millions or billions? Pass {quantity}_unit=1e6 or 1e9.'
      )


def _check_cost(rows: Observations) -> None:
  """Raises RowError where C / (6 N D) is a power of a thousand, PF-days, or different in a few rows."""
  names = rows.columns
  log_ratio = np.log10(rows.flops / (6 * rows.params * rows.tokens))
  typical = float(np.median(log_ratio))
  # Within a factor of two, as conventions of C differ from each other.
  if abs(typical + math.log10(PF_DAYS)) < 0.3:
    raise RowError(
      f'{names["flops"]} is 6 {names["params"]} {names["tokens"]} in PF-days: pass --flops_unit={PF_DAYS:g}.'
    )
  # A power of a thousand, up to a factor of six: units go by thousands, and conventions of C by less than six.
  thousands = round(typical / 3)
  if thousands and abs(typical - 3 * thousands) < 0.8:
    raise RowError(
      f'{names["flops"]} is {10**typical:.1e} times 6 {names["params"]} {names["tokens"]}: one of '
      'them is in other units; pass params_unit, tokens_unit or flops_unit '
      f'(1e{abs(3 * thousands)}).'
    )
  odd = np.flatnonzero(np.abs(log_ratio - typical) > 1)
  if len(odd):
    i = int(odd[0])
    raise RowError(
      f'{len(odd)} of {len(rows)} rows, such as {rows.run[i]} (N {rows.params[i]:.4g}, D '
      f'{rows.tokens[i]:.4g}, C {rows.flops[i]:.4g}), have another C / (6 N D) than the rest, by a '
      f'factor of {10 ** abs(log_ratio[i] - typical):.2g}: they are in other units; write all rows in one.'
    )


def _check_gap(rows: Observations, quantity: str) -> None:
  """Raises RowError where the values of a quantity fall into two groups that are decades apart."""
  values = np.log10(np.unique(getattr(rows, quantity)))
  if len(values) < 2 or np.diff(values).max() < DECADES:
    return
  k = int(np.argmax(np.diff(values)))
  # The smaller of the two groups is more likely to be the one in another unit.
  low = np.log10(getattr(rows, quantity)) <= values[k] + 1e-9
  few = low if low.sum() <= (~low).sum() else ~low
  i = int(np.flatnonzero(few)[0])
  raise RowError(
    f'Column {rows.columns[quantity]!r} mixes units: {few.sum()} of {len(rows)} rows, such as '
    f'{rows.run[i]} ({getattr(rows, quantity)[i]:.6g}), lie a factor of '
    f'{10 ** np.diff(values)[k]:.1e} from the others. Write all rows in one unit.'
  )


def last_of_each_run(rows: Observations) -> tuple[Observations, str | None]:
  """(the rows without earlier checkpoints of their runs, the sentence that says so or None).

  A checkpoint within a schedule does not count as a run: its learning rate has not decayed, so that its loss is
  above that of a run of this length (Hoffmann et al. 2022, section 3.1). Rows of a run are checkpoints where a
  column names the run and either that column is called so or there is a column of steps.
  """
  column = rows.columns.get('run')
  are_checkpoints = column is not None and (
    'run' in column.lower() or any(name.lower() in STEPS for name in rows.extra)
  )
  if not are_checkpoints:
    return rows, None
  groups = collections.defaultdict(list)
  for i, key in enumerate(zip(rows.run, rows.params, strict=True)):
    groups[key].append(i)
  last = {key: max(members, key=rows.tokens.__getitem__) for key, members in groups.items()}
  several = [m for m in groups.values() if len({rows.tokens[i] for i in m}) > 1]
  if not several:
    return rows, None
  leave_out = np.ones(len(rows), bool)
  leave_out[list(last.values())] = False
  # Several seeds of a run at its last D all count.
  for i in np.flatnonzero(leave_out):
    final = last[rows.run[i], rows.params[i]]
    leave_out[i] = rows.tokens[i] < rows.tokens[final]
  sentence = (
    f'{len(several)} runs (column {column!r}) have several rows, checkpoints before the schedule '
    f'ends: only the last of each counts, {len(rows) - leave_out.sum()} of {len(rows)} rows. '
    '--pick=all takes every row.'
  )
  return rows.without(
    leave_out, ['an earlier checkpoint of its run'] * int(leave_out.sum())
  ), sentence


def about(rows: Observations) -> list[str]:
  """Sentences on what may be wrong with the table, each with what to do."""
  sentences = []
  swapped = float((rows.tokens < rows.params).mean())
  if swapped > 0.9:
    share = 'every row' if swapped == 1 else f'{swapped:.0%} of the rows'
    sentences.append(
      f'D is below N in {share}: are the columns swapped? Language models are trained on some 20 '
      f'tokens a parameter; if so pass --params={rows.columns.get("tokens", "D")} '
      f'--tokens={rows.columns.get("params", "N")}.'
    )
  # Swapped columns make every loss look wrong, so that one sentence is enough.
  sentences += _about_losses(rows) if swapped <= 0.9 else []
  copies = [
    run
    for run, why in rows.excluded
    if why.startswith('it repeats ') and why != f'it repeats {run}'
  ]
  if copies:
    sentences.append(
      f'{len(copies)} {"row" if len(copies) == 1 else "rows"}, such as {copies[0]}, with the N, D '
      'and loss of another row to every digit: they are left out as copies, which would make every '
      'interval too narrow.'
    )
  return sentences + _about_epochs(rows)


def _about_losses(rows: Observations) -> list[str]:
  """A sentence where the losses may be perplexities, bits, or nats of another unit of text."""
  median = float(np.median(rows.loss))
  if median > TRAINED_LOSS:
    return [
      f'the losses have a median of {median:.3g}, above that of any trained model: are they '
      'perplexities? If so pass --loss_unit=perplexity.'
    ]
  if np.median(rows.params) < 1e7 or np.median(rows.tokens) < 1e8:
    return []  # far below the runs of Hoffmann et al., so that their law says nothing
  law, values = published('hoffmann 2022')
  ratio = float(np.median(rows.loss / law(values, params=rows.params, tokens=rows.tokens)))
  if 1.3 < ratio < 1.6:
    return [
      f'the losses are {ratio:.2f} times those of Hoffmann et al. 2022 at the same N and D, and '
      '1.44 would be bits: if they are bits per token pass --loss_unit=bits.'
    ]
  if ratio < 0.5:
    return [
      f'the losses are {ratio:.2f} times those of Hoffmann et al. 2022 at the same N and D: are '
      'they per byte or per character? The law of N and D holds per token; multiply by the bytes '
      'of a token (about 4).'
    ]
  return []


def _about_epochs(rows: Observations) -> list[str]:
  """A sentence where rows repeat their data, by a column of epochs or of unique tokens."""
  for name, values in rows.extra.items():
    if name.lower() in EPOCHS:
      passes = np.nan_to_num(values)
      cure = f'leave them out (--where="{name}<=1"), or fit --law=DataConstrained'
    elif name.lower() in UNIQUE:
      passes = np.where(values > 0, rows.tokens / np.where(values > 0, values, 1.0), 0.0)
      cure = f'fit --law=DataConstrained --input unique_tokens={name}'
    else:
      continue
    repeated = passes > 1.5  # a little over one pass is how a stream ends
    if repeated.any():
      return [
        f'{repeated.sum()} of {len(rows)} rows go through their data more than once, up to {passes.max():.3g} '
        f'times (column {name!r}), and a law of N and D takes every token for a new one: {cure}.'
      ]
  return []
