"""The runs of a study: several at once, in processes that go on from run to run, only the missing ones.

A study lists its runs, each a set of gin files and bindings, and what each of them needs. `finish` trains them
and returns their rows. `register` writes a forecast down before the runs that test it.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import datetime
import functools
import json
import multiprocessing
import os
import pathlib
import statistics
import threading
import time

from research.core import cli, configs, storage
from research.core.errors import UserError, in_a_line
from research.data import cache
from research.data.mixtures import streams_of
from research.scaling import any_law
from research.scaling.options import Options
from research.scaling.rows import Columns, RowError

E_OF_PYTHON = 0.83  # the irreducible loss of Python sources, of experiments/isoflop_decoder
THREADS = 'PJRT_NPROC'  # threads of a product of jax on a CPU; small products want one


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyRun:
  """One run of a study.

  Attributes:
    name: of its folder.
    files: gin files, read in order.
    bindings: gin bindings, as on a command line.
    needs: names of the runs that must be over before it starts.
    facts: columns to add to its row.
  """

  name: str
  files: tuple[str, ...]
  bindings: tuple[str, ...]
  needs: tuple[str, ...] = ()
  facts: dict = dataclasses.field(default_factory=dict)


def folder_of(workdir: pathlib.Path, name: str) -> pathlib.Path:
  return workdir / 'runs' / name


def parser(description: str, workdir: str) -> argparse.ArgumentParser:
  """The flags of a study; `workdir` is the default of --workdir."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path(workdir))
  parser.add_argument('--workers', type=int, default=2, help='how many runs train at once')
  parser.add_argument('--freeze', action='store_true', help='make and freeze the text, and stop')
  parser.add_argument('--quick', action='store_true', help='a tiny study that shows that it runs')
  return parser


def flags(description: str, workdir: str) -> argparse.Namespace:
  """Parses the flags of a study that has no others."""
  return parser(description, workdir).parse_args()


def freeze(runs: list[StudyRun]) -> None:
  """Freezes every stream that the runs read."""
  streams = {}
  for run in runs:
    built = configs.load(list(run.files), list(run.bindings)).build()
    for stream in (*streams_of(built.train), *streams_of(built.validation)):
      streams[stream.key()] = stream
  cache.open_streams(list(streams.values()))


def finish(runs: list[StudyRun], workdir: pathlib.Path, workers: int) -> list[dict]:
  """Trains the runs that are not over; returns the rows of those that finished, in the order of `runs`.

  A run that fails is told of, and so is every run that needs it; the others go on.
  """
  rows = {run.name: row for run in runs if (row := read_row(workdir, run.name))}
  waiting = [run for run in runs if run.name not in rows]
  if waiting:
    print(f'{len(waiting)} of {len(runs)} runs are to be trained, {workers} at once', flush=True)
    rows |= _train_all(waiting, workdir, workers)
  finished = [run for run in runs if rows.get(run.name, {}).get('status') == 'finished']
  return [{'run': run.name, **run.facts, **rows[run.name]} for run in finished]


def read_row(workdir: pathlib.Path, name: str) -> dict | None:
  """The row of a run that is over; None for another one."""
  path = folder_of(workdir, name) / 'run.json'
  return json.loads(path.read_text()) if path.is_file() else None


def _train_all(waiting: list[StudyRun], workdir: pathlib.Path, workers: int) -> dict:
  """{name: row} of the runs that were trained."""
  needs = {need for run in waiting for need in run.needs}
  over = {n for n in needs if (read_row(workdir, n) or {}).get('status') == 'finished'}
  failed = dict.fromkeys(needs - over - {run.name for run in waiting}, 'it did not finish')
  pool = _pool(workers)
  began = time.monotonic()
  total = len(waiting)
  rows, futures = {}, {}
  while waiting or futures:
    for run in _ready(waiting, rows.keys() | over, failed):
      futures[pool.submit(_train, run, workdir)] = run
    if not futures:
      continue
    done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
    for future in done:
      run = futures.pop(future)
      row = _result(future, run, failed)
      if row:
        rows[run.name] = row
        place = f'{len(rows)} of {total} after {time.monotonic() - began:.0f} s'
        print(f'{place}: {run.name} {row["loss"]:.4f} in {row["seconds"]:.0f} s', flush=True)
  return rows


@functools.cache
def _pool(workers: int) -> concurrent.futures.ProcessPoolExecutor:
  """The worker processes, which live as long as the study."""
  os.environ.setdefault(THREADS, '1')
  for name, value in cli.CPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  spawn = multiprocessing.get_context('spawn')
  return concurrent.futures.ProcessPoolExecutor(
    workers, mp_context=spawn, initializer=_end_with_the_study
  )


def _end_with_the_study() -> None:
  """Ends this worker when the study is killed: started again, the study may train the same run."""

  def watch():
    multiprocessing.parent_process().join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def _ready(waiting: list[StudyRun], over: set[str], failed: dict) -> list[StudyRun]:
  """Takes out of `waiting` and returns what can start. Those that need a run that failed fail."""
  ready = []
  for run in list(waiting):
    lost = [need for need in run.needs if need in failed]
    if lost:
      failed[run.name] = f'it needs {lost[0]}'
      print(f'{run.name} is left out: {failed[run.name]}', flush=True)
      waiting.remove(run)
    elif over.issuperset(run.needs):
      ready.append(run)
      waiting.remove(run)
  return ready


def _result(future, run: StudyRun, failed: dict) -> dict | None:
  """The row of a run that finished; else it is noted among those that failed."""
  try:
    row = future.result()
  except Exception as error:  # whatever it was, the other runs go on
    failed[run.name] = in_a_line(error)
  else:
    if row['status'] == 'finished':
      return row
    failed[run.name] = f'it ended as {row["status"]}'
  print(f'{run.name} failed: {failed[run.name]}', flush=True)
  return None


def _train(run: StudyRun, workdir: pathlib.Path) -> dict:
  """Trains a run in a worker process; its log is in its folder."""
  from research.training.loop import train

  folder = folder_of(workdir, run.name)
  folder.mkdir(parents=True, exist_ok=True)
  config = configs.load(list(run.files), list(run.bindings))
  with (folder / 'log.txt').open('a') as log:
    return train(config.build(), folder, config.text, stream=log)


def register(workdir: pathlib.Path, forecast: dict) -> dict:
  """Writes a forecast with the time in UTC to forecast.json. One that was registered before is kept.

  Returns:
    The forecast that counts.
  """
  path = workdir / 'forecast.json'
  if path.is_file():
    return json.loads(path.read_text())
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  forecast = {'registered': now, **forecast}
  write_json(path, forecast)
  print(f'forecast registered at {now}: {path}', flush=True)
  return forecast


def write_json(path: pathlib.Path, value: dict) -> None:
  storage.write_atomic(path, json.dumps(value, indent=1) + '\n')


def write_rows(path: pathlib.Path, rows: list[dict], columns: tuple[str, ...]) -> None:
  """Writes these columns of rows as CSV, floats to six significant digits."""
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, columns, extrasaction='ignore', lineterminator='\n')
    writer.writeheader()
    for row in rows:
      short = {k: f'{v:.6g}' if isinstance(v, float) else v for k, v in row.items()}
      writer.writerow(short)


def size(width: int) -> tuple[str, ...]:
  """The bindings of a LLaMA of two layers, as the ladder of the quickstart makes them."""
  mlp = 8 * max(1, round(width / 3))
  return f'EMBED={width}', 'LAYERS=2', 'HEADS=2', f'HEAD_DIM={width // 2}', f'MLP={mlp}'


def rate(width: int) -> float:
  """The learning rate from scratch: .008 (N / 1e5)^(-1/3), where N is about 28 width^2."""
  return float(f'{0.008 * (width / 60) ** (-2 / 3):.3g}')


def length_of(tokens: float, batch: int) -> tuple[str, str]:
  """The bindings of a run of so many tokens, in batches of so many rows of 128."""
  return f'Run.batch_size={batch}', f'Run.steps={max(1, round(tokens / (batch * 128)))}'


def params(run: StudyRun) -> int:
  """N of a run, with its head and without its token vectors; it need not have been trained."""
  from research.training.checks import count_of

  built = configs.load(list(run.files), list(run.bindings)).build()
  return count_of(built).params_with_head


@dataclasses.dataclass(frozen=True)
class Fitted:
  """The first fit that the rows determine.

  Attributes:
    fit: None where they determine none.
    held: the parameters that it holds.
    refused: why each fit before it was refused.
  """

  fit: any_law.FittedLaw | None
  held: dict
  refused: tuple[str, ...]

  def forecast(self, **inputs) -> dict:
    """The law's value and 90% interval at a point, which has no scatter of a run; or why there is none."""
    if self.fit is None:
      return {'value': None, 'why': ' '.join(self.refused)}
    value, low, high = self.fit.value_at(**inputs)
    law = {'law': self.fit.fit.law.name, 'parameters': self.fit.fit.parameters, 'held': self.held}
    return {'value': value, 'low': low, 'high': high, 'at': inputs, **law}


def fit(rows: list[dict], law, inputs: dict[str, str], holds: list[dict]) -> Fitted:
  """Fits a law, holding one set of parameters after the other, until the rows determine the rest.

  Args:
    inputs: the column of each input.
    holds: the sets of parameters to hold, such as [{}, {'E': 0.8}].
  """
  if not rows:
    return Fitted(None, {}, ('none of its runs has finished.',))
  refused = []
  columns = Columns(params='params_with_head', tokens='tokens', inputs=inputs)
  for held in holds:
    options = Options(fixed=held, replicates=400)
    try:
      found = any_law.fit_law(rows, law, columns, role=None, options=options)
    except RowError:  # a mistake of the study, and no fact about its rows
      raise
    except UserError as error:
      refused.append(in_a_line(error))
    else:
      print(f'{found}\n  held: {held or "nothing"}', flush=True)
      return Fitted(found, held, tuple(refused))
  print(f'{law.name}: no law: {" ".join(refused)}', flush=True)
  return Fitted(None, {}, tuple(refused))


def compare(workdir: pathlib.Path, forecast: dict, measured: dict[str, list[float]]) -> None:
  """Prints each forecast beside what was measured, and writes both to outcome.json."""
  outcome = {'registered': forecast['registered']}
  for name, expected in forecast['forecasts'].items():
    values = measured.get(name, [])
    result = {'forecast': expected, 'measured': values}
    if values and expected['value'] is not None:
      mean = statistics.mean(values)
      result['mean'] = mean
      result['difference'] = expected['value'] - mean
      result['error'] = result['difference'] / mean if mean else None  # an accuracy may be 0
      off = f'{result["error"]:+.2%}' if mean else f'{result["difference"]:+.4g}'
      result['inside'] = expected['low'] <= mean <= expected['high']
      interval = f'[{expected["low"]:.5g}, {expected["high"]:.5g}]'
      each = ', '.join(f'{value:.5g}' for value in values)
      print(f'{name}: {expected["value"]:.5g} {interval} was forecast, {mean:.5g} came ({each}): '
            f'off by {off}')  # fmt: skip
    else:
      print(f'{name}: {expected.get("why") or "not measured"}')
    outcome[name] = result
  write_json(workdir / 'outcome.json', outcome)
