"""The page of a sweep: for somebody who has seen neither the code nor the runs."""

import contextlib
import pathlib
import statistics
import subprocess

from research.core import configs
from research.core.errors import UserError
from research.core.text import clock
from research.designs.base import Answer
from research.designs.isoflop import IsoFlop
from research.designs.plan import Planned
from research.scaling import Analysis, Forecast, observe
from research.sweeps import findings
from research.sweeps.findings import Refused
from research.sweeps.folder import Folder
from research.sweeps.forecast import outcomes
from research.sweeps.sweep import Sweep

# `research.scaling.report` imports matplotlib, so this module imports it where it draws.


def write(
  folder: Folder,
  sweep: Sweep,
  finding: Analysis | Answer | Refused,
  forecast: dict | None = None,
) -> pathlib.Path:
  """Writes report.html, for a reader who has not seen the code, and its figures as PNG files.

  Args:
    finding: as `findings.conclude` gives it.
    forecast: as `register_forecast` gives it.

  Returns:
    The path of the page.
  """
  from research.scaling.report import page, sections

  runs = folder.plan()
  rows = folder.rows(runs)
  findings.write_results(folder, rows, finding)  # the run of a forecast has a row by now
  design = _design(sweep, runs) + _endings(runs, rows)
  excluded = ()
  if isinstance(finding, Analysis):
    body, figures = _law_sections(folder, sweep, finding, forecast, design)
    excluded = finding.rows.excluded
  else:
    body, figures = _answer_sections(sweep, finding, rows, design)
  for name, figure in figures.items():
    with (folder.path / f'{name}.png').open('wb') as file:
      figure.savefig(file, format='png', dpi=150)
  body += [
    sections.training_curves(*_curves(folder, runs)),
    sections.rows(rows, excluded),
    sections.facts('What it cost', _cost(sweep, runs, rows)),
    _reproduction(folder, forecast),
  ]
  return page.write(folder.path / 'report.html', sweep.question, body)


def _law_sections(folder, sweep, analysis, forecast, design) -> tuple[list[str], dict]:
  """(the sections of a page about a law, its figures by name)."""
  from research.scaling.report import page, sections

  expected, outcome = _outcome(folder, forecast)
  figures = _figures(sweep, analysis, expected, outcome)
  sizes = page.image(figures['sizes'], _SIZES) if 'sizes' in figures else ''
  return sections.law(analysis, expected, outcome, after=design + sizes), figures


def _answer_sections(sweep, finding, rows, design) -> tuple[list[str], dict]:
  """(the sections of a page about a design's answer or a refusal, its figures by name)."""
  from research.scaling.report import page

  refused = isinstance(finding, Refused)
  shown = _raw(sweep, rows) if refused else finding.figures
  text = f'No law: {finding.reason}' if refused else str(finding)
  body = [f'<pre class="headline">{page.text(text)}</pre>', design]
  body += [page.image(*figure) for figure in shown.values()]
  return body, {name: figure for name, (figure, _) in shown.items()}


_SIZES = (
  'Each point is a run; lines on the left are the law, on the right they join the runs of a size.'
)


def _figures(sweep, analysis, expected, outcome) -> dict:
  """The figures of a law, by name."""
  from research.scaling.report import charts, plots

  isoflop = isinstance(sweep.design, IsoFlop)
  figures = {} if isoflop else {'sizes': charts.sizes(analysis.rows, analysis)}
  if isoflop or analysis.approach2 is not None:
    figures['isoflop'] = plots.isoflop(analysis)
  if isoflop or analysis.approach3 is not None:
    figures['surface'] = plots.surface(analysis)
  figures['allocation'] = plots.allocation(analysis)
  if expected:
    figures['forecast'] = plots.forecast(analysis, expected, outcome)
  return figures


def _raw(sweep, rows) -> dict[str, tuple]:
  """A figure of the runs themselves, where no law was fitted to them."""
  from research.scaling.report import charts

  try:
    observed = observe(rows, findings.columns(sweep))
  except UserError:  # not one run with a loss
    return {}
  return {'sizes': (charts.sizes(observed), 'Each point is a run; lines join the runs of a size.')}


def _design(sweep: Sweep, runs: list[Planned]) -> str:
  """The section on the design: a sentence, and a table of its sizes."""
  from research.scaling.report import page

  design = sweep.design
  about = (type(design).__doc__ or '').split('\n\n')[0].replace('\n', ' ')
  groups = {}
  for run in runs:
    groups.setdefault((run.role, run.size.name), []).append(run)
  head = ('runs', 'width x layers', 'N', 'D', 'C', 'steps', 'examples a batch', 'learning rate')
  table = [
    (
      f'{len(members)} {role}', size, f'{members[0].size.params:,}',
      _span([m.tokens for m in members]), _span([m.flops for m in members]),
      _span([m.steps for m in members]), _span([m.batch_size for m in members]),
      _span([m.learning_rate for m in members]),
    )
    for (role, size), members in groups.items()
  ]  # fmt: skip
  more = f'<p class="small">and {len(table) - 60} more sizes</p>' if len(table) > 60 else ''
  name = page.text(f'{type(design).__name__}: {about}')
  return f'<h2>What was done</h2><p>{name}</p>' + page.table(head, table[:60]) + more


def _span(values: list[float]) -> str:
  low, high = f'{min(values):.4g}', f'{max(values):.4g}'
  return low if low == high else f'{low} to {high}'


def _endings(runs, rows) -> str:
  """How many runs finished, and why each of the others failed."""
  from research.scaling.report import page

  states = [row['status'] for row in rows]
  counted = ', '.join(f'{states.count(s)} {s}' for s in dict.fromkeys(states)) or 'none is over'
  unfinished = [
    (row['run'], row.get('reason') or 'the loss was no number')
    for row in rows
    if row['status'] != 'finished'
  ]
  summary = f'<p>{len(runs)} runs: {page.text(counted)}.</p>'
  return summary + (
    page.table(('run', 'why it did not finish'), unfinished[:100]) if unfinished else ''
  )


def _curves(folder: Folder, runs, most: int = 200) -> tuple[dict, dict]:
  """({run: its training curve}, {run: N}) of at most `most` runs, evenly chosen."""
  # More lines than this cannot be told apart, and would make the page large.
  runs = runs[:: -(-len(runs) // most)]
  curves = {}
  for run in runs:
    curve = [(row['tokens'], row['loss']) for row in folder.curve(run) if 'loss' in row]
    if curve:
      curves[run.name] = curve
  return curves, {run.name: run.size.params for run in runs}


def _cost(sweep: Sweep, runs, rows) -> dict:
  """The cost of the runs that are over, as lines of a table."""
  seconds = {row['run']: row.get('seconds') or 0.0 for row in rows}
  flops = sum(run.cost for run in runs if seconds.get(run.name))
  return {
    'training FLOPs': f'{flops:.3g} by {sweep.design.flops}',
    'time of training, summed over processes': clock(sum(seconds.values())),
    'devices of a run': _span([row['devices'] for row in rows if 'devices' in row] or [1]),
  }


def _reproduction(folder: Folder, forecast: dict | None) -> str:
  """The section on how to reproduce the sweep: its command, its version, its gin file."""
  from research.scaling.report import page, sections

  facts = {'command': 'python -m research.sweep --gin_file=sweep.gin', 'project': _version()}
  facts['rows'] = 'results.csv beside this page; python -m research.fit --results=results.csv'
  if forecast:
    facts['forecast registered'] = f'{forecast["registered"]}, before its run started'
  section = sections.facts('How to reproduce it', facts)
  gin = folder.path / 'sweep.gin'
  text = page.text(gin.read_text()) if gin.exists() else ''
  return section + (page.details('sweep.gin', f'<pre>{text}</pre>') if text else '')


def _version() -> str:
  """The version of the project: its commit, or the installed release."""
  try:
    command = ['git', '-C', str(configs.ROOT), 'describe', '--always', '--dirty']
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
      return f'isoflop {metadata.version("isoflop")}'
    return 'unknown'


def _outcome(folder: Folder, forecast: dict | None):
  """(the registered Forecast, the mean loss of its runs), each None while there is none."""
  if not forecast:
    return None, None
  losses = outcomes(folder, forecast)
  return Forecast(**forecast['forecast']), statistics.mean(losses) if losses else None
