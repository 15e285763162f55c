"""The rooms stand in one order and import only what lies below; TensorFlow stays in its two places."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# Bottom up: a room may import the rooms before it. The commands of research/ itself stand on top.
ROOMS = (
  'core',
  'parallel',
  'data',
  'scaling',
  'designs',
  'model',
  'checkpoints',
  'training',
  'inference',
  'huggingface',
  'quantisation',
  'tuning',
  'evaluation',
  'reinforcement',
  'sweeps',
  'compilation',
  'serving',
  'commands',
)
HEAVY = {'tensorflow', 'seqio', 't5', 'tensorflow_datasets', 'tensorflow_text'}


def read_modules() -> dict[str, ast.Module]:
  modules = {}
  for path in sorted((ROOT / 'research').rglob('*.py')):
    parts = path.relative_to(ROOT).with_suffix('').parts
    name = '.'.join(parts).removesuffix('.__init__')
    modules[name] = ast.parse(path.read_text())
  return modules


MODULES = read_modules()


def imported(tree: ast.Module) -> set[str]:
  """Every module or name that is imported, wherever the import stands: in a function, under TYPE_CHECKING."""
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, 'imports are absolute'
      names |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return names


def internal(name: str) -> set[str]:
  """The modules of this project that a module imports; a package only where no module of it is named."""
  found = imported(MODULES[name]) & set(MODULES) - {name, 'research'}
  packages = {module for module in found if any(other.startswith(module + '.') for other in found)}
  return found - packages


def room_of(name: str) -> str:
  parts = name.split('.')
  in_a_room = len(parts) > 2 or (ROOT / 'research' / parts[-1]).is_dir()
  return parts[1] if in_a_room else 'commands'


COMMANDS = sorted(name for name in MODULES if name != 'research' and room_of(name) == 'commands')


def test_every_module_stands_in_a_room_of_the_order():
  rooms = {room_of(name) for name in MODULES if name != 'research'}
  assert rooms <= set(ROOMS)


@pytest.mark.parametrize('name', sorted(MODULES))
def test_a_room_imports_only_what_lies_below(name):
  if name == 'research':
    return
  floor = ROOMS.index(room_of(name))
  above = {other for other in internal(name) if ROOMS.index(room_of(other)) > floor}
  assert not above


def test_no_imports_close_a_circle():
  remaining = {name: internal(name) for name in MODULES}
  while remaining:
    free = {name for name, needs in remaining.items() if not needs & set(remaining)}
    assert free, f'a circle among {sorted(remaining)}'
    remaining = {name: needs for name, needs in remaining.items() if name not in free}


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_is_short_and_imported_by_nobody(command):
  path = ROOT / (command.replace('.', '/') + '.py')
  assert len(path.read_text().splitlines()) < 160
  assert not [name for name in MODULES if command in internal(name)]


@pytest.mark.parametrize(
  'path',
  sorted([*(ROOT / 'research').rglob('*.py'), *(ROOT / 'tasks').rglob('*.py')]),
  ids=lambda path: path.name,
)
def test_a_file_is_short(path):
  assert len(path.read_text().splitlines()) <= 300 or path.match('huggingface/tables.py')


@pytest.mark.parametrize('name', sorted(MODULES))
def test_only_freezing_imports_tasks_and_only_tasks_import_tensorflow(name):
  heavy = {
    module for module in imported(MODULES[name]) if module.split('.')[0] in HEAVY | {'tasks'}
  }
  assert name == 'research.freeze' or not heavy


def test_scaling_knows_only_rows():
  for name in (name for name in MODULES if room_of(name) == 'scaling'):
    assert {room_of(other) for other in internal(name)} <= {'core', 'scaling'}, name


def test_training_knows_of_the_model_only_its_parameters_and_counts():
  allowed = {'research.model.counts', 'research.model.parameters'}
  for name in (name for name in MODULES if room_of(name) == 'training'):
    models = {other for other in internal(name) if room_of(other) == 'model'}
    assert models <= allowed, name


def test_gin_is_read_in_one_place():
  users = {
    name for name in MODULES if any(m.split('.')[0] == 'gin' for m in imported(MODULES[name]))
  }
  assert users <= {'research.core.configs', 'research.core.gin_reader'}


@pytest.mark.parametrize('command', COMMANDS)
def test_help_imports_nothing_heavy(command):
  code = (
    f'import sys, runpy; sys.argv = ["x", "--help"]\n'
    f'try: runpy.run_module("{command}", run_name="__main__")\n'
    f'except SystemExit as e: assert not e.code\n'
    f'assert not {{"jax", "tensorflow"}} & set(sys.modules), sorted(sys.modules)'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert '--' in done.stdout


def test_a_run_on_a_cpu_does_not_import_pallas():
  """It takes .35 s, and only accelerators need it."""
  code = (
    'import sys, jax\n'
    'from research.core import configs\n'
    'from research.training.program import make_program, mesh_of\n'
    'run = configs.load("gin/runs/quickstart.gin", []).build()\n'
    'with mesh_of(run, jax.devices()).use():\n'
    '  make_program(run).abstract\n'
    'assert "jax.experimental.pallas" not in sys.modules'
  )
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, env=environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
