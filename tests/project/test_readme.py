"""What the README and docs/runs.md tell a person to type works."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / 'README.md', ROOT / 'docs' / 'runs.md']
TEXT = '\n'.join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r'```bash\n(.*?)```', TEXT, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.strip().splitlines()]
# These two are the whole of CI: .ci/run does them as they stand.
IN_CI = [command for command in COMMANDS if command.startswith('pip install uv')]
# What makes a command small enough for a test, and its data local.
SMALL = {
  'research.train': [
    '--gin.Run.steps=2',
    '--gin.Run.eval_every=None',
    '--gin.Run.checkpoint_every=None',
  ],
}


def test_ci_runs_the_two_commands():
  ci = (ROOT / '.ci' / 'run').read_text()
  assert len(IN_CI) == 2
  for command in IN_CI:
    assert command.removeprefix('pip install uv && ') in ci


def test_every_file_it_names_is_there():
  for name in re.findall(
    r'(?:gin|docs|experiments|research|tests)/[\w./-]+\.(?:gin|md|py|csv|png)', TEXT
  ):
    assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize('command', [c for c in COMMANDS if c not in IN_CI])
def test_a_command_runs(command, tmp_path, text_file, user_environment):
  words = shlex.split(command)
  assert words[:4] == ['uv', 'run', 'python', '-m'], command
  module, args = words[4], words[5:]
  args = [f'--workdir={tmp_path / "run"}' if a.startswith('--workdir') else a for a in args]
  if module == 'research.train':
    (tmp_path / 'small.gin').write_text(
      f"""
from __gin__ import dynamic_registration
from research.data import corpora
from research.data import streams
include '{args[0].removeprefix('--gin_file=')}'
streams.Stream.corpus = @corpora.TextFiles()
corpora.TextFiles.files = '{text_file}'
corpora.TextFiles.validation_fraction = 0.2
"""
    )
    args[0] = f'--gin_file={tmp_path / "small.gin"}'
  args += SMALL.get(module, [])
  command = [sys.executable, '-m', module, *args]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=user_environment)
  assert done.returncode == 0, done.stderr
