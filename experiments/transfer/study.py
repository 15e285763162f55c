"""From code to prose: what is a head start on another text worth, and does a law tell it for a larger model?

    python experiments/transfer/study.py --workdir=runs/transfer_study

Parents learn Python code without words. Models that start from them learn prose, and the same sizes learn
prose from scratch. The laws of Hernandez et al. and of Zhang et al. are fitted to the smaller sizes, and
their forecasts are registered before the larger one starts.
"""

import dataclasses
import operator
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import study_runs  # noqa: E402
import text  # noqa: E402

from research.designs.transfer import SCRATCH, tokens_for  # noqa: E402
from research.scaling import laws  # noqa: E402
from research.scaling.report.figure import MARKERS, new_figure  # noqa: E402

RUN = 'experiments/transfer/run.gin'
START = 'gin/tuning/start.gin'
COLUMNS = (
  'run', 'way', 'stage', 'width', 'params_with_head', 'pretraining', 'tokens', 'loss', 'data_transferred',
  'init/loss', 'learning_rate', 'batch_size', 'steps', 'seed', 'seconds',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Design:
  """What is trained; all but widths are in tokens.

  Attributes:
    widths: of the sizes that the laws are fitted to; every one is tuned from the largest pretraining.
    larger: the width that tests them.
    pretraining: of the parents; the second width is tuned from each.
    longer: pretraining of the parents that test the law of pretraining.
    tuning: D_F. The last is that of the tests.
    scratch: D of runs from scratch; the last two are those of the larger width.
    seeds: of the tests.
  """

  widths: tuple[int, ...] = (16, 24, 40)
  larger: int = 64
  pretraining: tuple[float, ...] = (5e4, 2e5, 8e5)
  longer: float = 1.6e6
  tuning: tuple[float, ...] = (1.2e4, 3.6e4, 1.08e5, 3.24e5)
  scratch: tuple[float, ...] = (2.5e4, 6e4, 1.5e5, 4e5, 1e6)
  seeds: tuple[int, ...] = (0, 1)


QUICK = Design(
  widths=(16, 24), larger=32, pretraining=(1e4, 2e4), longer=4e4, tuning=(5e3, 1e4), scratch=(6e3, 8e3, 3e4)
)  # fmt: skip


def parent(width: int, tokens: float, seed: int) -> study_runs.StudyRun:
  """A model that learns code."""
  bindings = (
    *study_runs.size(width),
    *study_runs.length_of(tokens, 4),
    f'LEARNING_RATE={study_runs.rate(width)}',
    f'Run.seed={seed}',
  )
  facts = {'way': 'parent', 'width': width}
  name = f'parent-{width}-{tokens:.2e}-{seed}'.replace('+', '')
  return study_runs.StudyRun(name=name, files=(RUN,), bindings=bindings, facts=facts)


def scratch(width: int, tokens: float, stage: str) -> study_runs.StudyRun:
  """A model that learns prose from scratch."""
  bindings = (
    *study_runs.size(width),
    *study_runs.length_of(tokens, 2),
    *text.PROSE,
    f'LEARNING_RATE={study_runs.rate(width)}',
  )
  facts = {'way': SCRATCH, 'stage': stage, 'width': width}
  name = f'scratch-{width}-{tokens:.2e}'.replace('+', '')
  return study_runs.StudyRun(name=name, files=(RUN,), bindings=bindings, facts=facts)


def tuned(
  start: study_runs.StudyRun, tokens: float, stage: str, seed: int, workdir: pathlib.Path
) -> study_runs.StudyRun:
  """A model that learns prose and starts from a parent, at half of its rate."""
  width = start.facts['width']
  folder = study_runs.folder_of(workdir, start.name)
  bindings = (
    *study_runs.size(width), *study_runs.length_of(tokens, 2), *text.PROSE, f'BASE={str(folder)!r}',
    f'LEARNING_RATE={study_runs.rate(width) / 2}', f'Run.seed={seed}',
  )  # fmt: skip
  facts = {'way': 'tuned', 'stage': stage, 'width': width}
  name = f'tuned-{tokens:.2e}-of-{start.name.removeprefix("parent-")}-{seed}'.replace('+', '')
  return study_runs.StudyRun(
    name=name, files=(RUN, START), bindings=bindings, needs=(start.name,), facts=facts
  )


def plan(design: Design, workdir: pathlib.Path) -> tuple[list, list]:
  """(the runs of the fits and all parents, the runs that test the laws)."""
  most = design.pretraining[-1]
  middle = design.widths[1]
  parents = [parent(width, most, 0) for width in reversed(design.widths)]
  parents += [parent(middle, tokens, 0) for tokens in design.pretraining[:-1]]
  fits = [tuned(start, tokens, 'fit', 0, workdir) for start in parents for tokens in design.tuning]
  alone = [scratch(width, tokens, 'fit') for width in design.widths for tokens in design.scratch]
  tests, tested = [], []
  for seed in design.seeds:
    starts = parent(design.larger, most, seed), parent(middle, design.longer, seed)
    tested += starts
    tests += [tuned(start, design.tuning[-1], 'test', seed, workdir) for start in starts]
  tests += [scratch(design.larger, tokens, 'test') for tokens in design.scratch[-2:]]
  # What learns code is not forecast, so that it need not wait.
  return [*tested, *parents, *fits, *alone], tests


def with_transfer(rows: list[dict]) -> list[dict]:
  """The rows, those of tuned runs with their pretraining and the effective data transferred."""
  for row in rows:
    if row['way'] != 'tuned':
      continue
    alone = [r for r in rows if r['way'] == SCRATCH and r['width'] == row['width']]
    needed = tokens_for(row['loss'], [(r['tokens'], r['loss']) for r in alone])
    row['pretraining'] = row['init/tokens']
    row['data_transferred'] = None if needed is None else needed - row['tokens']
  return rows


def at_most_pretraining(rows: list[dict], design: Design) -> list[dict]:
  """The tuned rows whose parents have the most tokens of the fits, to a step."""
  most = design.pretraining[-1]
  of_tuned = [row for row in rows if row['way'] == 'tuned']
  return [row for row in of_tuned if abs(row['pretraining'] / most - 1) < 0.05]


def forecasts(rows: list[dict], design: Design) -> dict:
  """Fits the laws; {name: forecast} of the tests."""
  sizes = at_most_pretraining(rows, design)
  helped = [row for row in sizes if (row['data_transferred'] or 0) > 0]
  middle = [row for row in rows if row['way'] == 'tuned' and row['width'] == design.widths[1]]
  tuning = {'tuning_data': 'tokens'}
  holds = [{}, {'E': study_runs.E_OF_PYTHON}]
  zhang = laws.MultiplicativeTuning()
  transferred = study_runs.fit(helped, laws.DataTransferred(), tuning, [{}])
  of_size = study_runs.fit(sizes, zhang, {**tuning, 'scale': 'params_with_head'}, holds)
  of_pretraining = study_runs.fit(middle, zhang, {**tuning, 'scale': 'pretraining'}, holds)
  params = study_runs.params(parent(design.larger, design.pretraining[-1], 0))
  tokens = design.tuning[-1]
  return {
    'data transferred, larger model': transferred.forecast(params=params, tuning_data=tokens),
    'loss, larger model': of_size.forecast(scale=params, tuning_data=tokens),
    'loss, longer pretraining': of_pretraining.forecast(scale=design.longer, tuning_data=tokens),
  }


def outcomes(rows: list[dict], design: Design) -> dict[str, list[float]]:
  """{name of a forecast: what its runs measured}."""
  tests = [row for row in rows if row['way'] == 'tuned' and row['stage'] == 'test']
  larger = [row for row in tests if row['width'] == design.larger]
  longer = [row for row in tests if row['width'] != design.larger]
  moved = [row['data_transferred'] for row in larger if row['data_transferred'] is not None]
  return {
    'data transferred, larger model': moved,
    'loss, larger model': [row['loss'] for row in larger],
    'loss, longer pretraining': [row['loss'] for row in longer],
  }


def line(rows: list[dict], column: str) -> tuple[list[float], list[float]]:
  """(tokens, a column) of rows, in the order of their tokens."""
  rows = sorted(rows, key=operator.itemgetter('tokens'))
  return [row['tokens'] for row in rows], [row[column] for row in rows]


def draw(rows: list[dict], design: Design, path: pathlib.Path) -> None:
  """Losses of the sizes against the tokens of prose, tuned and from scratch; and the data transferred."""
  figure, (losses, moved) = new_figure(2)
  sizes = at_most_pretraining(rows, design)
  for i, width in enumerate((*design.widths, design.larger)):
    style = {'color': f'C{i}', 'marker': MARKERS[i % len(MARKERS)], 'markersize': 5}
    alone = [row for row in rows if row['way'] == SCRATCH and row['width'] == width]
    from_code = [row for row in sizes if row['width'] == width]
    helped = [row for row in from_code if (row['data_transferred'] or 0) > 0]
    losses.plot(*line(alone, 'loss'), linestyle='--', linewidth=1, **style)
    losses.plot(*line(from_code, 'loss'), label=f'width {width}', **style)
    moved.plot(*line(helped, 'data_transferred'), label=f'width {width}', **style)
  labels = {losses: 'loss on prose, nats per byte', moved: 'data transferred, tokens'}
  for axes, label in labels.items():
    axes.set_xscale('log')
    axes.set_xlabel('tokens of prose')
    axes.set_ylabel(label)
    axes.legend(frameon=False, loc='upper right' if axes is losses else 'lower right')
  losses.set_title('after code (lines), from scratch (dashes)', fontsize=10)
  moved.set_title('what the head start is worth', fontsize=10)
  moved.set_yscale('log')
  moved.set_xlim(losses.get_xlim())  # less than a decade of its own has too many labels
  figure.savefig(path, dpi=120)


def main() -> None:
  flags = study_runs.flags(__doc__.splitlines()[0], 'runs/transfer_study')
  design = QUICK if flags.quick else Design()
  flags.workdir.mkdir(parents=True, exist_ok=True)
  text.make()
  fits, tests = plan(design, flags.workdir)
  study_runs.freeze([*fits, *tests])
  if flags.freeze:
    return
  rows = with_transfer(study_runs.finish(fits, flags.workdir, flags.workers))
  study_runs.write_rows(flags.workdir / 'results.csv', rows, COLUMNS)
  forecast = study_runs.register(flags.workdir, {'forecasts': forecasts(rows, design)})
  rows = with_transfer([*rows, *study_runs.finish(tests, flags.workdir, flags.workers)])
  study_runs.write_rows(flags.workdir / 'results.csv', rows, COLUMNS)
  study_runs.compare(flags.workdir, forecast, outcomes(rows, design))
  draw(rows, design, flags.workdir / 'transfer.png')


if __name__ == '__main__':
  main()
