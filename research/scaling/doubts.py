"""Doubts about a table before any answer: wrong units are errors, what only looks wrong is a sentence."""

import collections
import math

import numpy as np

from research.scaling.cells import PF_DAYS, RowError
from research.scaling.laws.published import published
from research.scaling.rows import Observations

# Names of columns that say how often the data were gone through, or how many tokens differ.
EPOCHS = ('epochs', 'total_epochs', 'num_epochs', 'n_epochs')
UNIQUE = ('unique_tokens', 'unique', 'n_unique_tokens', 'u')
STEPS = ('step', 'steps', '_step', 'current_steps', 'global_step', 'iteration', 'train/step')
DECADES = 2.5  # a gap of so many powers of ten within one column is two units


def check_units(rows: Observations) -> None:
  """Raises RowError for numbers that only make sense in other units."""
  names = rows.columns
  if np.median(rows.loss) > 20:
    raise RowError(
      f'Column {names["loss"]!r} has a median of {np.median(rows.loss):.3g}: is it a perplexity? '
      'A fit wants nats per token, the logarithm of the perplexity; pass --loss_unit=perplexity.'
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
  names = rows.columns
  log_ratio = np.log10(rows.flops / (6 * rows.params * rows.tokens))
  typical = float(np.median(log_ratio))
  if abs(typical + math.log10(PF_DAYS)) < 0.3:
    raise RowError(
      f'{names["flops"]} is 6 {names["params"]} {names["tokens"]} in PF-days: pass --flops_unit={PF_DAYS:g}.'
    )
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
  values = np.log10(np.unique(getattr(rows, quantity)))
  if len(values) < 2 or np.diff(values).max() < DECADES:
    return
  k = int(np.argmax(np.diff(values)))
  low = np.log10(getattr(rows, quantity)) <= values[k] + 1e-9
  few = low if low.sum() <= (~low).sum() else ~low
  i = int(np.flatnonzero(few)[0])
  raise RowError(
    f'Column {rows.columns[quantity]!r} mixes units: {few.sum()} of {len(rows)} rows, such as '
    f'{rows.run[i]} ({getattr(rows, quantity)[i]:.6g}), lie a factor of '
    f'{10 ** np.diff(values)[k]:.1e} from the others. Write all rows in one unit.'
  )


def last_of_each_run(seen: Observations) -> tuple[Observations, str | None]:
  """Only the last row of every run where rows are its checkpoints, and the sentence that says so.

  A checkpoint within a schedule is no run of its own: its learning rate has not decayed, and its loss lies
  above that of a run of its length (Hoffmann et al. 2022, section 3.1).
  """
  column = seen.columns.get('run')
  known = column is not None and (
    'run' in column.lower() or any(name.lower() in STEPS for name in seen.extra)
  )
  if not known:
    return seen, None
  groups = collections.defaultdict(list)
  for i, key in enumerate(zip(seen.run, seen.params, strict=True)):
    groups[key].append(i)
  last = {key: max(members, key=lambda i: seen.tokens[i]) for key, members in groups.items()}
  several = [m for m in groups.values() if len({seen.tokens[i] for i in m}) > 1]
  if not several:
    return seen, None
  leave_out = np.ones(len(seen), bool)
  leave_out[list(last.values())] = False
  # Seeds of one run at its last D all count.
  for i in np.flatnonzero(leave_out):
    final = last[seen.run[i], seen.params[i]]
    leave_out[i] = seen.tokens[i] < seen.tokens[final]
  sentence = (
    f'{len(several)} runs (column {column!r}) have several rows, checkpoints before the schedule '
    f'ends: only the last of each counts, {len(seen) - leave_out.sum()} of {len(seen)} rows. '
    '--pick=all takes every row.'
  )
  return seen.without(
    leave_out, ['an earlier checkpoint of its run'] * int(leave_out.sum())
  ), sentence


def about(seen: Observations) -> list[str]:
  """Sentences about what may be wrong with the table, each with what to do."""
  sentences = []
  swapped = float((seen.tokens < seen.params).mean())
  if swapped > 0.9:
    share = 'every row' if swapped == 1 else f'{swapped:.0%} of the rows'
    sentences.append(
      f'D is below N in {share}: are the columns swapped? Language models are trained on some 20 '
      f'tokens a parameter; if so pass --params={seen.columns.get("tokens", "D")} '
      f'--tokens={seen.columns.get("params", "N")}.'
    )
  sentences += _about_losses(seen) if swapped <= 0.9 else []
  copies = [
    run
    for run, why in seen.excluded
    if why.startswith('it repeats ') and why != f'it repeats {run}'
  ]
  if copies:
    sentences.append(
      f'{len(copies)} {"row" if len(copies) == 1 else "rows"}, such as {copies[0]}, with the N, D '
      'and loss of another row to every digit: taken for copies and left out, since counted again '
      'they would make every interval too narrow.'
    )
  return sentences + _about_epochs(seen)


def _about_losses(rows: Observations) -> list[str]:
  middle = float(np.median(rows.loss))
  if middle > 7.5:
    return [
      f'the losses have a median of {middle:.3g}, more than a model that has learnt anything: are '
      'they perplexities? If so pass --loss_unit=perplexity.'
    ]
  if np.median(rows.params) < 1e7 or np.median(rows.tokens) < 1e8:
    return []  # Hoffmann et al.'s law says nothing of smaller runs
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
  told = []
  for name, values in rows.extra.items():
    if name.lower() in EPOCHS and (many := np.nan_to_num(values) > 1.5).any():
      told.append((name, int(many.sum()), float(np.nanmax(values))))
    elif (
      name.lower() in UNIQUE
      and (many := rows.tokens > 1.5 * np.nan_to_num(values, nan=np.inf)).any()
    ):
      told.append((name, int(many.sum()), float(np.nanmax(rows.tokens / values))))
  return [
    f'{count} of {len(rows)} rows go through their data more than once, up to {most:.3g} times '
    f'(column {name!r}), and a law of N and D takes every token for a new one: leave them out '
    f'(--where="{name}<=1"), or fit --law=DataConstrained with the number of unique tokens.'
    for name, count, most in told[:1]
  ]
