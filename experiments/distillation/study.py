"""Students with and without a teacher: where does a teacher help, and does a law tell it for a larger student?

    python experiments/distillation/study.py --workdir=runs/distillation_study

Teachers of three sizes learn the code of experiments/transfer, each on more tokens than the one before.
Students of several sizes learn the same text for several lengths, from each teacher and without one.
Chinchilla's law is fitted to the runs without a teacher and Busbridge's to the others, and their forecasts are
registered before the larger student starts.
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

ALONE = 'experiments/transfer/run.gin'
DISTILLED = 'experiments/distillation/run.gin'
COLUMNS = (
  'run', 'way', 'stage', 'width', 'teacher_width', 'params_with_head', 'tokens', 'loss', 'divergence',
  'teacher_loss', 'supervised_loss', 'loss_without_teacher', 'learning_rate', 'batch_size', 'steps', 'seed',
  'seconds',
)  # fmt: skip
NO_TEACHER = 'no teacher'
# What Busbridge's law holds, until the rows determine the rest: first the width of its bend, then the bend at
# the loss of the student, then no bend at all (c_1 near 0), no outer exponent, and the usual power of N.
HOLDS = (
  {'f_1': 0.1},
  {'f_1': 0.1, 'd_1': 1.0},
  {'f_1': 0.1, 'd_1': 1.0, 'c_1': 1e-6},
  {'f_1': 0.1, 'd_1': 1.0, 'c_1': 1e-6, 'gamma': 1.0},
  {'f_1': 0.1, 'd_1': 1.0, 'c_1': 1e-6, 'gamma': 1.0, 'alpha': 0.35},
)


@dataclasses.dataclass(frozen=True)
class Design:
  """What is trained.

  Attributes:
    teachers: (width, tokens) of each teacher, the weakest first.
    widths: of the students of the fit.
    tokens: of the students of the fit.
    larger: the width of the students that test the laws.
    tests: (teacher, tokens) of these, a teacher by its place.
    seeds: of the tests.
  """

  teachers: tuple[tuple[int, float], ...] = ((16, 1e5), (32, 4e5), (96, 1.5e6))
  widths: tuple[int, ...] = (12, 24, 48)
  tokens: tuple[float, ...] = (2e4, 6e4, 1.8e5, 5.4e5)
  larger: int = 64
  tests: tuple[tuple[int, float], ...] = ((2, 6e4), (2, 5.4e5), (1, 5.4e5))
  seeds: tuple[int, ...] = (3, 4)


QUICK = Design(
  teachers=((16, 1e4), (24, 2e4)), widths=(16,), tokens=(3e3, 6e3), larger=24, tests=((1, 6e3),)
)


def run_of(
  width: int,
  tokens: float,
  seed: int,
  way: str,
  stage: str,
  teacher: study_runs.StudyRun | None,
  workdir: pathlib.Path,
) -> study_runs.StudyRun:
  """A teacher, a student without one, or a student of `teacher`."""
  bindings = [
    *study_runs.size(width),
    *study_runs.length_of(tokens, 4 if way == 'teacher' else 2),
    f'LEARNING_RATE={study_runs.rate(width)}',
    f'Run.seed={seed}',
  ]
  facts = {'way': way, 'stage': stage, 'width': width}
  name = f'{way}-{width}-{tokens:.2e}-{seed}'.replace('+', '').replace(' ', '_')
  if teacher is None:
    return study_runs.StudyRun(name=name, files=(ALONE,), bindings=tuple(bindings), facts=facts)
  folder = study_runs.folder_of(workdir, teacher.name)
  bindings.append(f'TEACHER={str(folder)!r}')
  facts['teacher_width'] = teacher.facts['width']
  return study_runs.StudyRun(
    name=f'{name}-of-{teacher.facts["width"]}', files=(DISTILLED,), bindings=tuple(bindings),
    needs=(teacher.name,), facts=facts,
  )  # fmt: skip


def plan(design: Design, workdir: pathlib.Path) -> tuple[list, list]:
  """(the runs of the fits, the runs that test them)."""
  teachers = [
    run_of(width, tokens, 0, 'teacher', 'fit', None, workdir) for width, tokens in design.teachers
  ]
  students = []
  for tokens in reversed(design.tokens):
    for width in design.widths:
      students.append(run_of(width, tokens, 1, NO_TEACHER, 'fit', None, workdir))
      for teacher in teachers:
        students.append(run_of(width, tokens, 1, 'distilled', 'fit', teacher, workdir))
  tests = {}
  for seed in design.seeds:
    for place, tokens in design.tests:
      alone = run_of(design.larger, tokens, seed, NO_TEACHER, 'test', None, workdir)
      taught = run_of(design.larger, tokens, seed, 'distilled', 'test', teachers[place], workdir)
      tests |= {alone.name: alone, taught.name: taught}
  # The largest teacher takes longest, and most students can start before it is over.
  return [*reversed(teachers), *students], list(tests.values())


def supervised(rows: list[dict]) -> study_runs.Fitted:
  """Chinchilla's law of the runs without a teacher, teachers among them."""
  alone = [row for row in rows if row['way'] != 'distilled']
  holds = [{}, {'E': study_runs.E_OF_PYTHON}, {'E': study_runs.E_OF_PYTHON, 'alpha': 0.35}]
  return study_runs.fit(alone, laws.Chinchilla(), {}, holds)


def with_losses(rows: list[dict], law: study_runs.Fitted) -> list[dict]:
  """The rows, those of distilled students with L_T, L_S by the law and the loss without a teacher."""
  alone = {(r['width'], r['tokens'], r['seed']): r['loss'] for r in rows if r['way'] == NO_TEACHER}
  for row in rows:
    if row['way'] == 'distilled':
      row['teacher_loss'] = row['teacher/loss']
      row['loss_without_teacher'] = alone.get((row['width'], row['tokens'], row['seed']))
      if law.fit is not None:
        at = {'params': row['params_with_head'], 'tokens': row['tokens']}
        row['supervised_loss'] = law.fit.value_at(**at)[0]
  return rows


def name_of(teacher_width: int | None, tokens: float) -> str:
  """The name of a forecast of the larger student."""
  who = f'teacher of width {teacher_width}' if teacher_width else NO_TEACHER
  return f'{who}, {tokens:.3g} tokens'


def forecasts(
  rows: list[dict], law: study_runs.Fitted, design: Design, workdir: pathlib.Path
) -> dict:
  """Fits Busbridge's law; {name: forecast} of the tests, with and without a teacher."""
  distilled = [row for row in rows if row['way'] == 'distilled']
  inputs = {'teacher_loss': 'teacher_loss', 'supervised_loss': 'supervised_loss'}
  taught = study_runs.Fitted(None, {}, ('there is no law of students without a teacher.',))
  if law.fit is not None:
    taught = study_runs.fit(distilled, laws.Distillation(), inputs, list(HOLDS))
  params = study_runs.params(run_of(design.larger, 1e5, 0, NO_TEACHER, 'test', None, workdir))
  teacher_loss = {row['width']: row['loss'] for row in rows if row['way'] == 'teacher'}
  found = {}
  for place, tokens in design.tests:
    alone = law.forecast(params=params, tokens=tokens)
    found[name_of(None, tokens)] = alone
    width = design.teachers[place][0]
    if alone['value'] is None or width not in teacher_loss:
      found[name_of(width, tokens)] = {'value': None, 'why': 'a law or the teacher is missing.'}
      continue
    found[name_of(width, tokens)] = taught.forecast(
      params=params, tokens=tokens, teacher_loss=teacher_loss[width], supervised_loss=alone['value']
    )
  return found


def helps(found: dict, design: Design) -> dict[str, bool | None]:
  """Whether the laws say that the teacher helps, for each test; None where a law is missing."""
  sides = {}
  for place, tokens in design.tests:
    name = name_of(design.teachers[place][0], tokens)
    taught = found[name]['value']
    alone = found[name_of(None, tokens)]['value']
    sides[name] = None if taught is None or alone is None else taught < alone
  return sides


def outcomes(rows: list[dict], design: Design) -> dict[str, list[float]]:
  """{name of a forecast: what its runs measured}."""
  measured = {}
  tokens = [tokens for _, tokens in design.tests]
  for row in rows:
    if row['stage'] == 'test':
      nearest = min(tokens, key=lambda value: abs(value - row['tokens']))
      measured.setdefault(name_of(row.get('teacher_width'), nearest), []).append(row['loss'])
  return measured


def draw(rows: list[dict], design: Design, path: pathlib.Path) -> None:
  """Losses of students against their tokens, a panel a size and a line a teacher."""
  widths = (*design.widths, design.larger)
  figure, panels = new_figure(len(widths), size=(4.4, 3.9), sharex=True)
  for axes, width in zip(panels, widths, strict=True):
    students = [row for row in rows if row['width'] == width and row['way'] != 'teacher']
    for i, teacher in enumerate((None, *(place[0] for place in design.teachers))):
      points = [row for row in students if row.get('teacher_width') == teacher]
      points.sort(key=operator.itemgetter('tokens'))
      label = f'teacher of width {teacher}' if teacher else NO_TEACHER
      tokens = [row['tokens'] for row in points]
      losses = [row['loss'] for row in points]
      line = 'none' if width == design.larger else '-'  # two seeds of a cell
      if points:
        axes.plot(
          tokens,
          losses,
          linestyle=line,
          marker=MARKERS[i],
          markersize=5,
          color=f'C{i}',
          label=label,
        )
    axes.set_xscale('log')
    axes.set_xticks(design.tokens, [f'{tokens / 1000:g}k' for tokens in design.tokens])
    axes.minorticks_off()
    axes.set_xlabel('tokens of the student')
    axes.set_title(f'students of width {width}', fontsize=10)
    axes.legend(frameon=False, fontsize=8)
  panels[0].set_ylabel('loss, nats per byte')
  figure.savefig(path, dpi=120)


def tell_sides(rows: list[dict], expected: dict[str, bool | None], design: Design) -> dict:
  """Prints where students beat their twins without a teacher; the same as a dict, for sides.json."""
  taught = [row for row in rows if row['way'] == 'distilled' and row['loss_without_teacher']]
  cells = []
  for row in taught:
    gain = row['loss_without_teacher'] - row['loss']
    names = ('run', 'width', 'teacher_width', 'tokens')
    cells.append({name: row[name] for name in names} | {'gain': gain})
    print(f'{row["run"]}: {gain:+.4f} nats gained by the teacher')
  tests = {row['run'] for row in taught if row['stage'] == 'test'}
  gains: dict[str, list[float]] = {}
  for cell in (cell for cell in cells if cell['run'] in tests):
    nearest = min((t for _, t in design.tests), key=lambda value: abs(value - cell['tokens']))
    gains.setdefault(name_of(cell['teacher_width'], nearest), []).append(cell['gain'])
  for name, side in expected.items():
    found = [f'{gain:+.4f}' for gain in gains.get(name, [])]
    says = {None: 'no law', True: 'it helps', False: 'it harms'}[side]
    print(f'{name}: forecast {says}; gained {", ".join(found) or "nothing measured"}')
  return {'forecast': expected, 'gains of the tests': gains, 'cells': cells}


def main() -> None:
  flags = study_runs.flags(__doc__.splitlines()[0], 'runs/distillation_study')
  design = QUICK if flags.quick else Design()
  workdir = flags.workdir
  workdir.mkdir(parents=True, exist_ok=True)
  text.make()
  fits, tests = plan(design, workdir)
  study_runs.freeze([*fits, *tests])
  if flags.freeze:
    return
  rows = study_runs.finish(fits, workdir, flags.workers)
  law = supervised(rows)
  rows = with_losses(rows, law)
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  found = forecasts(rows, law, design, workdir)
  forecast = study_runs.register(
    workdir, {'forecasts': found, 'the teacher helps': helps(found, design)}
  )
  rows = with_losses([*rows, *study_runs.finish(tests, workdir, flags.workers)], law)
  study_runs.write_rows(workdir / 'results.csv', rows, COLUMNS)
  study_runs.compare(workdir, forecast, outcomes(rows, design))
  sides = tell_sides(rows, forecast['the teacher helps'], design)
  study_runs.write_json(workdir / 'sides.json', sides)
  draw(rows, design, workdir / 'distillation.png')


if __name__ == '__main__':
  main()
