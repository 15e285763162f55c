"""What a command says to a person: on Ctrl-C, into a closed pipe, on a poor terminal, on a broken machine."""

import ast
import errno
import os
import pathlib
import re
import subprocess
import sys

import pytest

from research.core import cli
from research.core.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def run(code: str, shell: str = '', **environment) -> subprocess.CompletedProcess:
  """Runs code after `from research.core import cli`, its output piped into `shell` where that is given."""
  env = {**os.environ, 'PYTHONPATH': str(ROOT), **environment}
  program = f'from research.core import cli\n{code}'
  if not shell:
    return subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True)
  line = f'"{sys.executable}" -c "$0" {shell}'
  return subprocess.run(['bash', '-c', line, program], env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
  'code',
  [
    "cli.parser('x', 'What it is.')\nraise KeyboardInterrupt",  # as while modules are imported
    'def main(): raise KeyboardInterrupt\ncli.run(main)',
  ],
)
def test_an_interrupt_is_one_word(code):
  done = run(code)
  assert (done.returncode, done.stderr, done.stdout) == (cli.INTERRUPTED, 'interrupted\n', '')


def test_an_interrupt_that_a_package_catches_while_it_is_imported_ends_the_command():
  code = (
    'import sys\n'
    "sys.argv = ['-m']\n"  # as Python says while it looks for the command
    'import signal\n'
    'signal.signal(signal.SIGINT, signal.default_int_handler)\n'
    'import research, os\n'
    'try: os.kill(os.getpid(), signal.SIGINT)\n'
    'except BaseException: pass\n'
    "print('not reached')"
  )
  env = {**os.environ, 'PYTHONPATH': str(ROOT)}
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  assert (done.returncode, done.stderr, done.stdout) == (cli.INTERRUPTED, 'interrupted\n', '')


def test_every_command_runs_by_the_function_that_catches():
  for path in (ROOT / 'research').glob('[a-z]*.py'):
    assert re.search(r'^  cli\.run\(main', path.read_text(), re.MULTILINE), path


def test_an_interrupt_while_a_command_starts_again_is_one_word():
  """Python starts with Ctrl-C blocked, as `use_huge_pages` leaves it, and meets it when it can say the word."""
  code = (
    'import os, signal, sys\n'
    'if len(sys.argv) == 1:\n'
    '  signal.signal(signal.SIGINT, signal.default_int_handler)\n'  # a job in the background ignores it
    '  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})\n'
    '  os.kill(os.getpid(), signal.SIGINT)\n'
    '  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "again"])\n'
    "cli.parser('x', 'What it is.')\nprint('not reached')"
  )
  done = run(code)
  assert (done.returncode, done.stderr, done.stdout) == (cli.INTERRUPTED, 'interrupted\n', '')


def test_a_failure_that_nobody_can_catch_is_silent_only_after_a_full_disk():
  code = (
    'import threading\n'
    'def fail(text):\n'
    '  thread = threading.Thread(target=lambda: (_ for _ in ()).throw(RuntimeError(text)))\n'
    '  thread.start()\n'
    '  thread.join()\n'
  )
  done = run(f"{code}cli.run(lambda: fail('Event loop is closed'))")
  assert (done.returncode, done.stderr) == (0, '')
  assert 'RuntimeError: another' in run(f"{code}cli.run(lambda: fail('another'))").stderr


@pytest.mark.parametrize('shell', ['| head -1', '2>&1 | head -1', '| true'])
def test_a_closed_pipe_ends_a_command_without_a_word(shell):
  done = run(
    "cli.run(lambda: [print('x' * 100) for _ in range(10000)] and 0)",
    f'{shell}; echo ${{PIPESTATUS[0]}}',
  )
  assert done.stderr == ''
  assert done.stdout.splitlines()[-1] == str(cli.PIPE_CLOSED)


def test_a_broken_pipe_of_something_else_is_no_closed_terminal():
  done = run("def main(): raise BrokenPipeError('a worker went away')\ncli.run(main)")
  assert 'BrokenPipeError: a worker went away' in done.stderr


def test_an_ascii_terminal_gets_question_marks():
  done = run("cli.run(lambda: print('1 — 2'))", PYTHONIOENCODING='ascii')
  assert (done.returncode, done.stdout) == (0, '1 ? 2\n')


def test_a_name_that_is_not_utf8_is_printed():
  done = run("cli.run(lambda: print('a\\udcffb'))")
  assert (done.returncode, done.stdout) == (0, 'a?b\n')


@pytest.mark.parametrize('platform', ['cuda', 'tpu', 'nonsense'])
def test_a_platform_that_is_not_here_is_one_sentence(platform):
  done = run('import jax\ncli.run(lambda: print(jax.devices()))', JAX_PLATFORMS=platform)
  if done.returncode == 0:
    pytest.skip(f'this machine has {platform}')
  last = done.stderr.splitlines()[-1]
  assert done.returncode == 2
  assert last.startswith(f'error: JAX_PLATFORMS={platform}: this machine has no such platform')
  assert 'Traceback' not in done.stderr


@pytest.mark.parametrize(
  ('error', 'says'),
  [
    (
      OSError(errno.ENOSPC, 'No space left on device', '/d/x'),
      'the disk is full (/d/x): free some',
    ),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'the quota of the disk is used up: free some'),
    (ValueError('RESOURCE_EXHAUSTED: writing: No space left on device'), 'the disk is full: free'),
    (
      OSError(errno.EROFS, 'Read-only file system', '/d/x'),
      '/d/x is on a read-only disk',
    ),
    (
      OSError(errno.EROFS, 'Read-only file system'),
      'a folder that Python needs is read-only (/dev/shm or the temporary folder)',
    ),
  ],
)
def test_a_disk_that_takes_no_more_is_one_sentence(error, says):
  assert cli.machine_fault(error).startswith(says)


def test_a_full_disk_is_found_behind_the_errors_that_were_raised_from_it():
  full = ValueError(f'writing: {os.strerror(errno.ENOSPC)}')
  middle = RuntimeError('the save failed')
  middle.__cause__ = full
  outer = UserError('no checkpoint')
  outer.__cause__ = middle
  assert cli.machine_fault(outer).startswith('the disk is full: free')


def test_a_fault_of_our_own_is_no_fault_of_the_machine():
  assert cli.machine_fault(ValueError('shapes do not match')) is None


def arguments_of(tree: ast.Module) -> dict[str, set[str]]:
  """The fields and arguments of every class and function of a module, and the names of its bases."""
  named = {}
  for node in tree.body:
    if isinstance(node, ast.ClassDef):
      made = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == '__init__']
      fields = {
        f.target.id
        for f in node.body
        if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
      }
      bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
    elif isinstance(node, ast.FunctionDef):
      made, fields, bases = [node], set(), set()
    else:
      continue
    for function in made:
      fields |= {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
    named[node.name] = fields, bases
  return named


def test_a_command_that_reads_no_gin_refuses_it(capsys):
  parser = cli.parser('generate', 'Generates.', gin=False)
  with pytest.raises(SystemExit):
    cli.parse(parser, ['--gin.Sampling.top_k=3'])
  assert 'no flag --gin.Sampling.top_k=3: this command reads no gin.' in capsys.readouterr().err


def test_every_binding_that_help_and_docs_name_exists():
  named = {}
  for path in sorted((ROOT / 'research').rglob('*.py')):
    named.update(arguments_of(ast.parse(path.read_text())))

  def has(owner, argument):
    fields, bases = named.get(owner, (set(), set()))
    return argument in fields or any(has(base, argument) for base in bases)

  pages = [*(ROOT / 'research').glob('*.py'), *(ROOT / 'research' / 'core').glob('*.py')]
  pages += [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
  missing = {
    f'{path.name}: --gin.{owner}.{argument}'
    for path in pages
    for owner, argument in re.findall(
      r'--gin\.(?:\w+/)*(?!Class)([A-Z]\w+)\.(\w+)=', path.read_text()
    )
    if not has(owner, argument)
  }
  # The docs show what a misspelt name is answered with.
  assert {name.partition(': ')[2] for name in missing} <= {'--gin.Run.stesp'}
