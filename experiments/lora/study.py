"""LoRA's rank against data: does a law of both tell the loss at a larger rank and on more data?

    python experiments/lora/study.py --workdir=runs/lora_study

A model that has learned Python code learns prose (the texts of experiments/transfer): by LoRA of several ranks,
and by tuning all of its parameters. The law of Zhang et al. is fitted, and its forecasts are registered before
the larger rank and the longer runs start. Then a second size repeats the grid.
"""

import dataclasses
import operator
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / 'transfer')]

import study_runs  # noqa: E402
import text  # noqa: E402

from research.scaling import laws  # noqa: E402
from research.scaling.report.figure import MARKERS, new_figure  # noqa: E402

RUN = 'experiments/transfer/run.gin'
LORA = 'gin/tuning/lora.gin'
FULL = 'gin/tuning/start.gin'
COLUMNS = (
  'run', 'way', 'stage', 'width', 'params_with_head', 'params_learned', 'rank', 'tokens', 'loss', 'init/tokens',
  'init/loss', 'learning_rate', 'batch_size', 'steps', 'seed', 'seconds',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Design:
  """What is trained.

  Attributes:
    width: of the model that the tests are of.
    second: the width that repeats the grid; None for none.
    pretraining: tokens of code.
    ranks: of the fit. The last is also tested on more data.
    larger: the rank that tests the law.
    tuning: tokens of prose. The last is also that of the test of the larger rank.
    longer: tokens that test the law.
    seeds: of the tests.
  """

  width: int = 48
  second: int | None = 24
  pretraining: float = 8e5
  ranks: tuple[int, ...] = (1, 2, 4, 8)
  larger: int = 16
  tuning: tuple[float, ...] = (1.2e4, 3.6e4, 1.08e5, 3.24e5)
  longer: float = 6.48e5
  seeds: tuple[int, ...] = (0, 1)


QUICK = Design(
  width=16, second=None, pretraining=1e4, ranks=(1, 2), larger=4, tuning=(3e3, 6e3), longer=1e4
)  # fmt: skip


def base(width: int, tokens: float) -> study_runs.StudyRun:
  """The model that learns code."""
  bindings = (
    *study_runs.size(width),
    *study_runs.length_of(tokens, 4),
    f'LEARNING_RATE={study_runs.rate(width)}',
  )
  facts = {'way': 'base', 'width': width}
  return study_runs.StudyRun(name=f'base-{width}', files=(RUN,), bindings=bindings, facts=facts)


def tuned(
  start: study_runs.StudyRun, rank: int | None, tokens: float, stage: str, seed: int, workdir: pathlib.Path
) -> study_runs.StudyRun:  # fmt: skip
  """A model that learns prose by LoRA of a rank, or with all of its parameters where there is none."""
  width = start.facts['width']
  folder = study_runs.folder_of(workdir, start.name)
  rate = study_runs.rate(width) / 2
  method = ()
  if rank:
    # A trial at ranks 1 and 8 (README.md) was best near .02 and .015.
    rate = float(f'{0.02 * rank**-0.25:.3g}')
    method = (f'RANK={rank}', 'ALPHA=4.0', 'LoRA.rank_stabilized=True')
  bindings = (
    *study_runs.size(width),
    *study_runs.length_of(tokens, 2),
    *text.PROSE,
    *method,
    f'BASE={str(folder)!r}',
    f'LEARNING_RATE={rate}',
    f'Run.seed={seed}',
  )
  way = 'lora' if rank else 'full'
  name = f'{way}{rank or ""}-{width}-{tokens:.2e}-{seed}'.replace('+', '')
  facts = {'way': way, 'stage': stage, 'width': width, 'rank': rank}
  files = (RUN, LORA if rank else FULL)
  return study_runs.StudyRun(
    name=name, files=files, bindings=bindings, needs=(start.name,), facts=facts
  )


def grid(
  design: Design, width: int, stage: str, workdir: pathlib.Path
) -> list[study_runs.StudyRun]:
  """The base of a width, and every rank and the tuning of all parameters on all of the data."""
  start = base(width, design.pretraining)
  ways = [(tokens, rank) for tokens in reversed(design.tuning) for rank in (*design.ranks, None)]
  return [start, *(tuned(start, rank, tokens, stage, 0, workdir) for tokens, rank in ways)]


def tests(design: Design, workdir: pathlib.Path) -> list[study_runs.StudyRun]:
  """The larger rank, the longest runs, and both at once; all parameters on as much."""
  start = base(design.width, design.pretraining)
  cells = cells_of_tests(design)
  return [tuned(start, *cell, 'test', seed, workdir) for seed in design.seeds for cell in cells]


def cells_of_tests(design: Design) -> list[tuple[int | None, float]]:
  """(rank, None for all parameters; tokens) of each test."""
  return [
    (design.larger, design.longer),
    (None, design.longer),
    (design.ranks[-1], design.longer),
    (design.larger, design.tuning[-1]),
  ]


def of_way(rows: list[dict], way: str, width: int, stage: str | None = None) -> list[dict]:
  rows = [row for row in rows if row['way'] == way and row['width'] == width]
  return [row for row in rows if stage in (None, row['stage'])]


def name_of(rank: int | None, tokens: float) -> str:
  """The name of a forecast."""
  return f'{f"rank {rank}" if rank else "all parameters"}, {tokens:.3g} tokens'


def forecasts(rows: list[dict], design: Design) -> dict:
  """Fits the laws of LoRA and of the tuning of all parameters; {name: forecast} of the tests."""
  holds = [{}, {'E': study_runs.E_OF_PYTHON}]
  inputs = {'tuning_data': 'tokens', 'scale': 'rank'}
  of_lora = of_way(rows, 'lora', design.width)
  of_all = of_way(rows, 'full', design.width)
  lora = study_runs.fit(of_lora, laws.MultiplicativeTuning(), inputs, holds)
  # One size has no X. With D_0 at one token, Lin's law is a power law of the data alone.
  all_parameters = study_runs.fit(
    of_all,
    laws.RectifiedTuning(),
    {'tuning_data': 'tokens'},
    [{'D_0': 1.0}, {'D_0': 1.0, 'E': study_runs.E_OF_PYTHON}],
  )
  cells = [cell for cell in cells_of_tests(design) if cell[0]]
  found = {name_of(*cell): lora.forecast(scale=cell[0], tuning_data=cell[1]) for cell in cells}
  longest = all_parameters.forecast(tuning_data=design.longer)
  return {**found, name_of(None, design.longer): longest}


def outcomes(rows: list[dict], design: Design) -> dict[str, list[float]]:
  """{name of a forecast: what its runs measured}."""
  measured = {}
  for row in rows:
    if row.get('stage') == 'test':
      target = min((*design.tuning, design.longer), key=lambda tokens: abs(tokens - row['tokens']))
      measured.setdefault(name_of(row['rank'], target), []).append(row['loss'])
  return measured


def draw(rows: list[dict], design: Design, path: pathlib.Path) -> None:
  """The loss against the tokens of prose, for each rank and for all parameters; a panel a size."""
  widths = [width for width in (design.width, design.second) if width]
  figure, panels = new_figure(len(widths), sharex=True)
  for axes, width in zip(panels, widths, strict=True):
    for i, rank in enumerate((*design.ranks, design.larger, None)):
      of_rank = [
        r for r in rows if r['width'] == width and r['way'] != 'base' and r['rank'] == rank
      ]
      points = sorted(of_rank, key=operator.itemgetter('tokens'))
      label = f'rank {rank}' if rank else 'all parameters'
      marker = MARKERS[i % len(MARKERS)]
      tokens = [row['tokens'] for row in points]
      losses = [row['loss'] for row in points]
      if points:
        axes.plot(tokens, losses, marker=marker, markersize=5, color=f'C{i}', label=label)
    axes.set_xscale('log')
    axes.set_xlabel('tokens of prose')
    axes.set_ylabel('loss on prose, nats per byte')
    axes.set_title(f'width {width}', fontsize=10)
    axes.legend(frameon=False)
  figure.savefig(path, dpi=120)


def exponents(rows: list[dict], design: Design) -> dict:
  """The exponents of rank and data at each width, by the same law on the same grid."""
  inputs = {'tuning_data': 'tokens', 'scale': 'rank'}
  found = {}
  for width in (design.width, design.second):
    of_width = of_way(rows, 'lora', width, 'fit') if width else []
    if of_width:
      fitted = study_runs.fit(
        of_width, laws.MultiplicativeTuning(), inputs, [{}, {'E': study_runs.E_OF_PYTHON}]
      )
      found[str(width)] = fitted.fit.fit.parameters if fitted.fit else ' '.join(fitted.refused)
  return found


def main() -> None:
  flags = study_runs.flags(__doc__.splitlines()[0], 'runs/lora_study')
  design = QUICK if flags.quick else Design()
  workdir = flags.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  text.make()
  fits = grid(design, design.width, 'fit', workdir)
  tested = tests(design, workdir)
  repeated = grid(design, design.second, 'fit', workdir) if design.second else []
  study_runs.freeze([*fits, *tested, *repeated])
  if flags.freeze:
    return
  rows = study_runs.finish(fits, workdir, flags.workers)
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  forecast = study_runs.register(workdir, {'forecasts': forecasts(rows, design)})
  rows += study_runs.finish(tested, workdir, flags.workers)
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  study_runs.compare(workdir, forecast, outcomes(rows, design))
  rows += study_runs.finish(repeated, workdir, flags.workers)
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  draw(rows, design, workdir / 'lora.png')
  study_runs.write_json(workdir / 'exponents.json', exponents(rows, design))


if __name__ == '__main__':
  main()
