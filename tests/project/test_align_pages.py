"""What docs/distillation.md and docs/align.md tell a person to type works, in the order of the pages."""

import json
import pathlib
import random
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / 'docs' / name for name in ('distillation.md', 'align.md')]
STEPS = ('--gin.Run.steps=20', '--gin.Run.eval_every=10', '--gin.Run.checkpoint_every=None')


def commands(page: pathlib.Path) -> list[str]:
  blocks = re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL)
  return [line for block in blocks for line in block.strip().splitlines()]


def write_pairs(path: pathlib.Path) -> None:
  """Pairs in which the shorter answer is the better one."""
  draw = random.Random(0)
  lines = []
  for number in range(200):
    answers = sorted(('ab' * draw.randint(1, 3), 'ab' * draw.randint(4, 8)), key=len)
    record = {'prompt': f'Say {number}.', 'chosen': answers[0], 'rejected': answers[1]}
    lines.append(json.dumps(record) + '\n')
  path.write_text(''.join(lines))


def test_every_file_they_name_is_there():
  for page in PAGES:
    for name in re.findall(
      r'(?:gin|docs|research|tests)/[\w./-]+\.(?:gin|md|py)', page.read_text()
    ):
      assert (ROOT / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, tmp_path, text_file, user_environment):
  write_pairs(tmp_path / 'pairs.jsonl')
  for number, command in enumerate(commands(page)):
    words = shlex.split(command)
    assert words[:5] == ['uv', 'run', 'python', '-m', 'research.train'], command
    args = [re.sub(r"(=|')(?=runs/|pairs)", rf'\1{tmp_path}/', word) for word in words[5:]]
    file = args[0].removeprefix('--gin_file=')
    if 'pairs.jsonl' not in command:
      # Local text in place of the packages' sources, which take minutes to freeze.
      small = tmp_path / f'small{number}.gin'
      small.write_text(
        'from __gin__ import dynamic_registration\n'
        'from research.data import corpora\nfrom research.data import streams\n'
        f"include '{file}'\nstreams.Stream.corpus = @corpora.TextFiles()\n"
        f"corpora.TextFiles.files = '{text_file}'\ncorpora.TextFiles.validation_fraction = 0.2\n"
      )
      args[0] = f'--gin_file={small}'
    done = subprocess.run(
      [sys.executable, '-m', 'research.train', *args, *STEPS],
      cwd=ROOT, capture_output=True, text=True, env=user_environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
  rows = {
    path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob('runs/*/run.json')
  }
  if page.stem == 'align':
    assert rows['dpo']['accuracy'] > 0.9
    assert rows['reward']['accuracy'] > 0.9
    curve = (tmp_path / 'runs' / 'dpo' / 'metrics.jsonl').read_text().splitlines()
    assert json.loads(curve[0])['loss'] > rows['dpo']['loss']
  else:
    assert rows['student']['divergence'] > 0
    assert 'leave out' in done.stderr
