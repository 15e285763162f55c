"""Imports point down only, and TensorFlow stays in its two places."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A module may import the rooms below its own and its neighbours in the same room; commands stand on top.
ROOMS = [
  {'errors'},
  {'cli', 'corpora', 'objectives', 'vocabularies'},
  {'streams'},
  {'sharding'},
  {'model.layers'},
  {'model.positions', 'model.kernels'},
  {'model.attention', 'model.moe', 'model.ssm', 'model.mla'},
  {'model.stack'},
  {'model.models'},
  {'model.counts', 'model.hf'},
  {'configs'},
  {'run'},
]
COMMANDS = {'train', 'evaluate', 'infer', 'sweep', 'fit', 'compile', 'convert', 'freeze', 'data'}
HEAVY = {'tensorflow', 'seqio', 't5', 'tensorflow_datasets', 'tensorflow_text'}


def modules() -> dict[str, ast.Module]:
  paths = sorted((ROOT / 'research').rglob('*.py'))
  name = lambda path: '.'.join(path.relative_to(ROOT / 'research').with_suffix('').parts)
  return {name(path): ast.parse(path.read_text()) for path in paths if path.name != '__init__.py'}


def imported(tree: ast.Module) -> set[str]:
  names = set()
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      names |= {node.module} | {f'{node.module}.{alias.name}' for alias in node.names}
  return names


ALL = modules()


def internal(name: str) -> set[str]:
  return {
    m.removeprefix('research.') for m in imported(ALL[name]) if m.startswith('research.')
  } & set(ALL)


@pytest.mark.parametrize('name', sorted(ALL))
def test_only_freezing_and_tasks_import_tensorflow(name):
  heavy = {m for m in imported(ALL[name]) if m.split('.')[0] in HEAVY | {'tasks'}}
  assert name == 'freeze' or not heavy


@pytest.mark.parametrize('level', range(len(ROOMS)))
def test_imports_point_down(level):
  below = set().union(*ROOMS[: level + 1])
  for name in ROOMS[level] & set(ALL):
    assert internal(name) <= below, f'{name} imports {internal(name) - below}'


def test_training_knows_no_model_and_no_configuration():
  for name in (n for n in ALL if n.startswith('training.')):
    allowed = {'errors'} | {n for n in ALL if n.startswith('training.')}
    assert internal(name) <= allowed, name


def test_scaling_knows_only_rows():
  for name in (n for n in ALL if n.startswith('scaling.')):
    allowed = {'errors', 'model.counts'} | {n for n in ALL if n.startswith('scaling.')}
    assert internal(name) <= allowed, name


def test_nothing_imports_a_command_but_a_command():
  for name in set(ALL) - COMMANDS:
    assert not internal(name) & (COMMANDS - {'freeze', 'data'}), name


def test_gin_is_read_in_one_place():
  users = {name for name in ALL if any(m.split('.')[0] == 'gin' for m in imported(ALL[name]))}
  assert users == {'configs'}


@pytest.mark.parametrize('command', ['train', 'sweep', 'fit'])
def test_help_imports_nothing_heavy(command):
  code = (
    f'import sys, runpy; sys.argv = ["x", "--help"]\n'
    f'try: runpy.run_module("research.{command}", run_name="__main__")\n'
    f'except SystemExit as e: assert not e.code\n'
    f'assert not {{"jax", "tensorflow", "numpy"}} & set(sys.modules), sorted(sys.modules)'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert '--' in done.stdout
