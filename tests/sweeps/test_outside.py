"""The recipes of docs/sweeps.md run as they stand: a design and a launcher in modules outside the project."""

import pathlib
import re
import sys

import pytest

from research.core import configs
from research.core.errors import UserError
from research.sweeps.launchers import by_name
from research.sweeps.launchers.job import Job
from research.sweeps.sweep import make_plan

PAGE = pathlib.Path(__file__).resolve().parent.parent.parent / 'docs' / 'sweeps.md'


@pytest.fixture
def outside(tmp_path, monkeypatch):
  """A folder on Python's path with the files of the page, each named in its first line."""
  for block in re.findall(r'```python\n(.*?)```', PAGE.read_text(), flags=re.S):
    if name := re.match(r'# (\w+\.\w+)\n', block):
      (tmp_path / name[1]).write_text(block)
  monkeypatch.syspath_prepend(tmp_path)
  yield tmp_path
  for name in ('my_design', 'my_launcher', 'broken_launcher'):
    sys.modules.pop(name, None)


def test_the_design_of_the_page_plans_and_answers(outside):
  sweep = configs.load(str(outside / 'my_sweep.gin'), root='SWEEP').build()
  _, runs, _ = make_plan(sweep)
  assert [run.settings for run in runs] == 2 * [
    ('adamw.weight_decay=0.05',), ('adamw.weight_decay=0.2',)
  ]  # fmt: skip
  rows = [{'run': run.name, 'loss': 2.0 - i} for i, run in enumerate(runs[:2])]
  assert str(sweep.design.answer(runs, rows)) == f'the best: {runs[1].name}, 1.0000'
  assert str(sweep.design.answer(runs, [])) == 'no run has a loss.'


def test_the_launcher_of_the_page_starts_workers_on_its_hosts(outside):
  (outside / 'shell.sh').write_text('echo "$@" >> $(dirname $0)/started\n')
  binding = f"my_launcher.Hosts.shell = ('sh', '{outside / 'shell.sh'}')\n"
  page = PAGE.read_text()
  (imported,) = re.findall(
    r'```python\n(from research.sweeps import sweep\nimport my_l.*?)```', page, re.S
  )
  (outside / 'launched.gin').write_text(
    f"from __gin__ import dynamic_registration\ninclude 'gin/sweeps/ablation.gin'\n{imported}{binding}"
  )
  sweep = configs.load(str(outside / 'launched.gin'), root='SWEEP').build()
  log = outside / 'started'
  log.touch()
  assert sweep.launcher.run(Job(('--worker',), outside, todo=lambda: len(log.read_text()) < 80))
  started = sorted(log.read_text().splitlines())
  assert started == [
    f'node{i} {sys.executable} -m research.sweep --worker --peers=2' for i in (1, 2)
  ]


def test_a_launcher_is_found_by_its_module(outside):
  assert by_name.named('my_launcher.Hosts').hosts == ('localhost',)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('my_launchers.Hosts', "Python finds no module 'my_launchers'; add its folder to PYTHONPATH"),
    ('my_launcher.Host', r'my_launcher has no Host\. Did you mean Hosts\?'),
    ('broken_launcher.NoRun', r'NoRun has no method run\(job\)'),
    ('broken_launcher.Needs', r'Needs.* missing 1 required .*Bind it in a gin file'),
  ],
)
def test_what_is_no_launcher_is_refused(name, message, outside):
  (outside / 'broken_launcher.py').write_text(
    'class NoRun: pass\nclass Needs:\n  def __init__(self, hosts): pass\n'
  )
  with pytest.raises(UserError, match=message):
    by_name.named(name)
