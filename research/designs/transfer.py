"""Fine-tuning after pre-training: what a head start on another text is worth.

Parents are trained on one text. From each of them runs go on with another text, and the same sizes learn that
text from scratch, for comparison.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import ClassVar

from research.core.errors import Invalid, UserError
from research.designs.base import Answer, Picked, positive
from research.designs.plan import Planned, Rule, Size
from research.scaling import any_law, laws
from research.scaling.fitting import Options
from research.scaling.rows import CONVENTIONS, Columns

SCRATCH = 'from scratch'
# The columns of D_F, of D_T and of the tokens of a run's parent.
TUNING_DATA, TRANSFERRED, PRETRAINING = 'tokens', 'data_transferred', 'init/tokens'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Transfer(Picked):
  """Sizes x pre-training tokens x methods x fine-tuning tokens, and the same sizes from scratch.

  The row of a fine-tuned run (of role 'fit') has its parent's N, D and loss as `init/...`, and the effective
  data transferred (Hernandez et al. 2021, arXiv:2102.01293): the tokens of fine-tuning text that the size would
  need from scratch for the same loss, less those that it was tuned on.

  Attributes:
    before: gin bindings of the parents, which say what they read.
    after: gin bindings of the runs that are tuned and of those from scratch.
    pretraining: tokens of the parents.
    tuning: D_F, tokens of fine-tuning.
    scratch: tokens of the runs from scratch; they should reach beyond what the tuned runs are worth. () for
      none.
    methods: a gin file of gin/tuning and its bindings each, as in ('gin/tuning/lora.gin', 'RANK=4').
    tuning_rate: the rule of the learning rate of tuned runs; None for that of the others.
  """

  before: tuple[str, ...]
  after: tuple[str, ...]
  pretraining: tuple[float, ...]
  tuning: tuple[float, ...]
  scratch: tuple[float, ...] = ()
  methods: tuple[tuple[str, ...], ...] = (('gin/tuning/start.gin',),)
  tuning_rate: Rule | None = None
  law: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    positive(self, pretraining=self.pretraining, tuning=self.tuning)
    if self.scratch:
      positive(self, scratch=self.scratch)
    for field in ('before', 'after'):
      if isinstance(getattr(self, field), str):
        raise Invalid(
          Transfer, field, 'must be bindings in parentheses, such as (\'FILES="a.txt"\',).'
        )
    if self.before == self.after:
      raise Invalid(
        Transfer, 'after', 'is the same as before: tuned runs would read what parents read.'
      )
    if not self.methods or any(isinstance(method, str) or not method for method in self.methods):
      why = "each method is a gin file and its bindings, such as ('gin/tuning/lora.gin', 'RANK=4')."
      raise Invalid(Transfer, 'methods', why)

  def plan(self, rungs: list[Size], length: int) -> list[Planned]:
    runs = []
    for size in self.sizes(rungs):
      parents = [
        self.train_for(
          tokens, size, length, f'parent-{size.name}-{tokens:.2e}', 'parent', settings=self.before
        )
        for tokens in self.pretraining
      ]
      parents = self.long_enough(parents, 'pretraining')
      scratch = [
        self.train_for(
          tokens, size, length, f'scratch-{size.name}-{tokens:.2e}', 'scratch', settings=self.after
        )
        for tokens in self.scratch
      ]
      tuned = [run for parent in parents for run in self._tuned(parent, length)]
      runs += [*parents, *self.long_enough(tuned, 'tuning')]
      runs += self.long_enough(scratch, 'scratch') if scratch else []
    return runs

  def _tuned(self, parent: Planned, length: int) -> list[Planned]:
    """The runs that start from one parent."""
    runs = []
    for name, (method, *bindings) in zip(self._names(), self.methods, strict=True):
      for tokens in self.tuning:
        knobs = {'settings': (*self.after, *bindings), 'parent': parent.name, 'method': method}
        if self.tuning_rate:
          facts = {'params': parent.size.params, 'tokens': tokens}
          knobs['learning_rate'] = self.tuning_rate(
            **facts, flops=tokens * parent.size.flops_per_token
          )
        name_of_run = f'{name}-{tokens:.2e}-of-{parent.name.removeprefix("parent-")}'
        runs.append(self.train_for(tokens, parent.size, length, name_of_run, **knobs))
    return runs

  def _names(self) -> list[str]:
    """A name for each method: its file's, and its number where a file has several."""
    stems = [pathlib.PurePath(method).stem for method, *_ in self.methods]
    return [stem if stems.count(stem) == 1 else f'{stem}{i}' for i, stem in enumerate(stems)]

  def answer(self, runs: list[Planned], rows: list[dict]) -> Answer:
    return transfer(runs, rows, self.flops)


def tokens_for(loss: float, curve: Sequence[tuple[float, float]]) -> float | None:
  """The tokens at which a curve first comes down to a loss, by lines between the logarithms of its points.

  Args:
    curve: (tokens, loss) of runs.

  Returns:
    None where the curve does not come from above that loss to below it.
  """
  curve = sorted(curve)
  for (d, above), (more, below) in itertools.pairwise(curve):
    if above >= loss >= below and above > below:
      part = math.log(above / loss) / math.log(above / below)
      return d * (more / d) ** part
  return None


def transfer(runs: list[Planned], rows: list[dict], flops: str) -> Answer:
  """The effective data transferred of every tuned run, and the laws of Hernandez et al. and Zhang et al."""
  from research.designs.charts import transfers

  row_of = {row['run']: row for row in rows if row.get('loss') is not None}
  tuned = [run for run in runs if run.method and run.name in row_of]
  if not tuned:
    return Answer('no run was tuned to its end.')
  curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
  for run in runs:
    if run.role != 'parent' and run.name in row_of:
      row = row_of[run.name]
      start = f'{_method(run)} after {row[PRETRAINING]:.2g}' if run.method else SCRATCH
      curve = curves.setdefault(run.size.name, {}).setdefault(start, [])
      curve.append((row['tokens'], row['loss']))
  columns, lines = {}, []
  for run in tuned:
    row = row_of[run.name]
    needed = tokens_for(row['loss'], curves[run.size.name].get(SCRATCH, ()))
    columns[run.name] = {TRANSFERRED: None if needed is None else needed - row['tokens']}
    lines.append(f'{run.name}: {row["loss"]:.4f}, {_worth(needed, row["tokens"])}')
  fits = _fits(tuned, [row_of[run.name] | columns[run.name] for run in tuned], flops)
  lines += [str(fit) for fit in fits.values()]
  found = {name: fit.fit.parameters for name, fit in fits.items() if not isinstance(fit, str)}
  caption = 'Loss on the fine-tuning text. A method stands before the tokens of the parent.'
  return Answer(
    '\n'.join(lines), {'transfer': (transfers(curves), caption)}, found or None, columns
  )


def _method(run: Planned) -> str:
  """The name of a tuned run's method."""
  return run.name.partition('-')[0]


def _worth(needed: float | None, tokens: float) -> str:
  if needed is None:
    return 'and no run from scratch brackets that loss'
  if needed < tokens:
    return f'a loss that {needed:.3g} tokens give from scratch: pre-training did harm'
  return f'worth {needed - tokens:.3g} tokens more from scratch'


def _fits(
  tuned: list[Planned], table: list[dict], flops: str
) -> dict[str, any_law.FittedLaw | str]:
  """Each law that the rows of one method may determine, by name; or why there is none."""
  params = CONVENTIONS[flops]
  fits = {}
  for method in dict.fromkeys(map(_method, tuned)):
    rows = [row for run, row in zip(tuned, table, strict=True) if _method(run) == method]
    # A power law has no place for what pre-training made worse.
    helped = [row if (row[TRANSFERRED] or 0) > 0 else row | {TRANSFERRED: None} for row in rows]
    asked = {f'{method}, data transferred': (laws.DataTransferred(), {}, helped)}
    for scale in (params, PRETRAINING):
      if len({row[scale] for row in rows}) > 1:
        law = laws.MultiplicativeTuning()
        asked[f'{method}, loss by {scale}'] = law, {'scale': scale}, rows
    for name, (law, inputs, of_law) in asked.items():
      columns = Columns(params=params, inputs={'tuning_data': TUNING_DATA, **inputs})
      try:
        fits[name] = any_law.fit_law(of_law, law, columns, options=Options(replicates=400))
      except UserError as error:
        fits[name] = f'{name}: no law: {error}'
  return fits
