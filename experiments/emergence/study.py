"""Does a skill emerge? Two-digit sums by LLaMAs of eight sizes, and a forecast of the two largest.

    python experiments/emergence/study.py --workdir=runs/emergence

Each size reads Python sources and sums (sums.py), and is asked for sums that it never saw: with the answer
at once or after its columns, and after 0, 1 and 4 solved ones. From the smaller sizes the accuracy of the
larger ones is forecast before they start, by two steps and by one.
"""

import dataclasses
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import figure  # noqa: E402
import forecasts  # noqa: E402
import study_runs  # noqa: E402
import sums  # noqa: E402

from research.core import configs  # noqa: E402
from research.core.errors import UserError  # noqa: E402
from research.data import cache  # noqa: E402

RUN = 'experiments/emergence/run.gin'
LENGTH = 256  # of a row, as run.gin has it
CODE = 0.25  # the share of the rows that is code; and of sums without columns
COLUMNS = (
  'run', 'stage', 'width', 'params_with_head', 'tokens', 'flops', 'mode', 'shots', 'accuracy', 'nats',
  'nats_per_token', 'loss', 'code/loss', 'direct/loss', 'chain/loss', 'learning_rate', 'batch_size', 'steps',
  'seed', 'seconds',
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Design:
  """What is trained.

  Attributes:
    fit: the widths that the laws are fitted to.
    test: the larger widths that test them.
    ratio: tokens per parameter, of every run.
    seeds: of every width.
    examples: sums that an accuracy is of.
    again: widths of which more seeds are trained after the test: how many runs have the skill?
    more: these seeds.
  """

  fit: tuple[int, ...] = (8, 12, 16, 20, 24, 32)
  test: tuple[int, ...] = (40, 48)
  ratio: float = 40.0
  seeds: tuple[int, ...] = (0, 1)
  examples: int = 500
  again: tuple[int, ...] = (32, 48)
  more: tuple[int, ...] = (2, 3, 4, 5)


# For an accelerator: four decades of compute, to 4.5e14 FLOPs.
LARGE = Design(fit=(16, 24, 32, 48, 64, 96), test=(128, 192), again=())
QUICK = Design(fit=(4, 8, 12), test=(16,), ratio=2.0, again=(8,), more=(2,), examples=50)


def size(width: int) -> tuple[str, ...]:
  """The bindings of a LLaMA of three layers, otherwise as those of the other studies."""
  return (*study_runs.size(width), 'LAYERS=3')


def count(width: int) -> int:
  """About N with the head: twelve matrices of width x width a layer, and the head of 264 rows."""
  return 36 * width**2 + 264 * width


def rows_of_batch(tokens: float) -> int:
  """Rows of a batch: a power of two that grows as the square root of the tokens."""
  return 2 ** max(1, round(tokens**0.5 / 110).bit_length() - 1)


def planned(design: Design, width: int, seed: int, stage: str) -> study_runs.StudyRun:
  """The run of a width and a seed."""
  tokens = design.ratio * count(width)
  batch = rows_of_batch(tokens)
  most = design.ratio * count(max(design.test))
  bindings = (
    *size(width),
    f'LEARNING_RATE={study_runs.rate(width)}',
    f'Run.batch_size={batch}',
    f'Run.steps={max(1, round(tokens / (batch * LENGTH)))}',
    f'Run.seed={seed}',
    # A sum has nine bytes, and a quarter of the rows has no columns.
    f'LINES={max(2000, round(most / 30))}',
    f'code/Stream.examples={max(64, round(1.1 * CODE * most / LENGTH))}',
    f'HeldOutSums.examples={design.examples}',
  )
  facts = {'stage': stage, 'width': width}
  return study_runs.StudyRun(
    name=f'{stage}-{width}-seed{seed}', files=(RUN,), bindings=bindings, facts=facts
  )


def runs_of(design: Design, stage: str) -> list[study_runs.StudyRun]:
  """The runs of a stage ('fit', 'test' or 'again'), the longest first so that the last ones are short."""
  widths = {'fit': design.fit, 'test': design.test, 'again': design.again}[stage]
  seeds = design.more if stage == 'again' else design.seeds
  return [
    planned(design, width, seed, stage) for width in sorted(widths, reverse=True) for seed in seeds
  ]


def check_text(run: study_runs.StudyRun) -> dict[str, tuple[int, int]]:
  """{stream: (sums in its rows, those that are held out)} of all text that a run may read.

  Raises:
    UserError: a sum of the test is in the text.
  """
  built = configs.load(list(run.files), list(run.bindings)).build()
  (mixture,) = cache.open_streams([built.train])
  found = {}
  for name, frozen in mixture.parts.items():
    tokens = frozen.examples(range(len(frozen)))['decoder_target_tokens']
    # Bytes are three ids above themselves. The end of a document becomes a line's end.
    text = (tokens.clip(13, 258) - 3).astype('uint8').tobytes()
    found[name] = sums.count_in_text(text)
    print(
      f'{name}: {found[name][0]:,} two-digit sums, {found[name][1]} of those held out', flush=True
    )
  if any(held for _, held in found.values()) or not found['direct'][0]:
    raise UserError(f'the training text has sums of the test, or none at all: {found}')
  return found


def rows_of(rows: list[dict]) -> list[dict]:
  """A row for each run, mode and number of shots."""
  long = []
  for row in rows:
    for mode in sums.MODES:
      for shots in sums.SHOTS:
        label = f'eval/addition-2digits-{shots}shot-{mode}'
        measured = {name: row[f'{label}/{name}'] for name in ('accuracy', 'nats', 'nats_per_token')}
        flops = {'flops': row['flops_6n_with_head']}
        long.append({**row, **flops, 'mode': mode, 'shots': shots, **measured})
  return long


def main() -> None:
  parser = study_runs.parser(__doc__.splitlines()[0], 'runs/emergence')
  parser.add_argument('--large', action='store_true', help='larger sizes, for an accelerator')
  flags = parser.parse_args()
  design = QUICK if flags.quick else LARGE if flags.large else Design()
  workdir = flags.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  fits = runs_of(design, 'fit')
  tests = runs_of(design, 'test')
  study_runs.freeze([*fits, *tests])
  study_runs.write_json(workdir / 'text.json', check_text(tests[0]))
  if flags.freeze:
    return
  rows = rows_of(study_runs.finish(fits, workdir, flags.workers))
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  expected = {width: 6 * params * tokens for width, params, tokens in map(exact, tests)}
  found = forecasts.make(rows, expected, design.examples)
  forecast = study_runs.register(workdir, found)
  rows += rows_of(study_runs.finish(tests, workdir, flags.workers))
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  study_runs.compare(workdir, forecast, forecasts.outcomes(rows))
  rows += rows_of(study_runs.finish(runs_of(design, 'again'), workdir, flags.workers))
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  verdicts = forecasts.judge(rows, design.examples)
  study_runs.write_json(workdir / 'verdicts.json', verdicts)
  figure.draw(rows, forecast, workdir / 'emergence.png')


def exact(run: study_runs.StudyRun) -> tuple[int, int, int]:
  """(width, N with the head, tokens) of a run that need not have been trained."""
  built = configs.load(list(run.files), list(run.bindings)).build()
  return run.facts['width'], study_runs.params(run), built.steps * built.batch_size * LENGTH


if __name__ == '__main__':
  main()
