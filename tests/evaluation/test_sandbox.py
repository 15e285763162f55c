"""Hostile programs: none of them harms the machine, and each is counted as failed."""

import os
import pathlib
import time

import pytest

from research.core.errors import Invalid
from research.evaluation import sandbox
from research.evaluation.code_problems import CodeProblem, builtin_problems, read_problems
from research.evaluation.code_tasks import passes
from research.evaluation.sandbox import Limits, run_python

SHORT = Limits(seconds=1.5, processes=8)
needs_namespaces = pytest.mark.skipif(
  sandbox.isolation() != 'namespaces', reason='this machine gives this user no namespaces'
)


def test_a_program_runs_with_its_output_and_its_code():
  outcome = run_python('print(6 * 7)\nraise SystemExit(3)')
  assert (outcome.code, outcome.output, outcome.reason) == (3, '42\n', '')
  assert run_python('pass').passed


def test_a_fork_bomb_is_gone_with_its_processes():
  mark = f'fork-bomb-{os.getpid()}'
  outcome = run_python(f'import os\nname = "{mark}"\nwhile True:\n  os.fork()', SHORT)
  assert not outcome.passed
  time.sleep(0.1)
  assert not alive('program.py', mark)


def test_a_child_that_leaves_the_group_is_killed_too():
  program = 'import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(3600)'
  run_python(program, SHORT)
  time.sleep(0.1)
  assert not alive('program.py', 'isoflop-')


def alive(*words: str) -> list[str]:
  """Command lines and folders of processes that have all of these words."""
  texts = []
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      text = (process / 'cmdline').read_text() + str((process / 'cwd').readlink())
    except OSError:
      continue
    texts.append(text)
  return [text for text in texts if all(word in text for word in words)]


def test_endless_output_is_cut():
  outcome = run_python('while True: print("x" * 1000)', SHORT)
  assert (outcome.code, outcome.reason) == (None, 'it printed more than 64 KiB')
  assert len(outcome.output) <= 2000


def test_endless_work_is_ended():
  start = time.monotonic()
  outcome = run_python('while True: pass', Limits(seconds=0.5))
  assert (outcome.code, outcome.reason) == (None, 'it ran longer than 0.5 s')
  assert time.monotonic() - start < 10


def test_the_environment_has_no_secrets(monkeypatch):
  monkeypatch.setenv('MY_TOKEN', 'secret-value')
  outcome = run_python('import os\nprint(sorted(os.environ), os.environ.get("MY_TOKEN"))')
  assert outcome.passed
  assert 'MY_TOKEN' not in outcome.output
  assert 'None' in outcome.output


@needs_namespaces
def test_the_environment_of_the_parent_cannot_be_read(monkeypatch):
  outcome = run_python(f'print(open("/proc/{os.getpid()}/environ").read())')
  assert not outcome.passed


@needs_namespaces
def test_files_cannot_be_deleted_or_written(tmp_path):
  (tmp_path / 'precious').write_text('data')
  program = (
    f'import os, shutil\nshutil.rmtree({str(tmp_path)!r}, ignore_errors=True)\n'
    'open("own", "w").write("fine")\n'
    f'open({str(tmp_path / "new")!r}, "w")'
  )
  outcome = run_python(program)
  assert not outcome.passed
  assert 'Read-only file system' in outcome.output
  assert [path.name for path in tmp_path.iterdir()] == ['precious']


@needs_namespaces
def test_there_is_no_network():
  program = 'import socket\nsocket.create_connection(("127.0.0.1", 9), timeout=1)'
  assert 'unreachable' in run_python(program).output


def test_memory_and_files_are_limited():
  outcome = run_python('x = bytearray(2 * 10**9)', Limits(memory=256))
  assert 'MemoryError' in outcome.output
  outcome = run_python('open("big", "wb").write(b"x" * 10**8)', Limits(file=1))
  assert not outcome.passed


def test_packages_of_this_environment_are_not_there():
  assert 'ModuleNotFoundError' in run_python('import numpy').output


def test_the_answers_of_the_problems_are_right_and_checked():
  for problem in builtin_problems():
    scope = {}
    # This code is the project's own.
    exec(f'{problem.prompt}{problem.solution}\n{problem.test}', scope)
    scope['check'](scope[problem.name])
    with pytest.raises(Exception):  # noqa: B017, PT011  (a wrong answer fails in some way)
      scope['check'](lambda *arguments: 'wrong')


def test_a_completion_passes_by_passing_its_tests():
  problem = builtin_problems()[0]
  assert passes(problem, problem.solution, SHORT)
  assert not passes(problem, '  return a - b\n', SHORT)
  assert not passes(problem, '  return (\n', SHORT)
  # It exits before the tests have run.
  assert not passes(problem, '  return a + b\nimport os\nos._exit(0)\n', SHORT)


def test_problems_of_a_file(tmp_path):
  fields = '{"entry_point": "f", "prompt": "p", "canonical_solution": "s", "test": "t"}'
  (tmp_path / 'a.jsonl').write_text(fields + '\n\n')
  assert read_problems(str(tmp_path / 'a.jsonl')) == [CodeProblem('f', 'p', 's', 't')]
  (tmp_path / 'b.jsonl').write_text(fields + '\n{"prompt": "p"}\n')
  with pytest.raises(Exception, match=r'b\.jsonl:2: not a problem'):
    read_problems(str(tmp_path / 'b.jsonl'))


def test_limits_are_above_zero():
  with pytest.raises(Invalid, match=r'Limits\.seconds: 0 must be above 0'):
    Limits(seconds=0)


def test_the_sandbox_starts_from_a_process_with_threads():
  """jax warns when a process with threads forks Python code, and warnings are errors here."""
  import threading

  ready = threading.Event()
  thread = threading.Thread(target=ready.wait)
  thread.start()
  try:
    assert run_python('pass').passed
  finally:
    ready.set()
    thread.join()
