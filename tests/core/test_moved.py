import importlib
import importlib.util

import pytest

from research.core import moved


@pytest.mark.parametrize('old', sorted(moved.MODULES))
def test_a_moved_module_left_its_old_place(old):
  assert importlib.util.find_spec(moved.MODULES[old]), 'the table names a module that is gone'
  with pytest.raises(ModuleNotFoundError):
    importlib.import_module(old)


@pytest.mark.parametrize('old', sorted(moved.NAMES))
def test_a_moved_name_is_where_the_table_says(old):
  module, _, name = moved.NAMES[old].rpartition('.')
  value = getattr(importlib.import_module(module), name)
  assert value.__module__ == module


def test_paths_of_the_old_layout_and_of_the_present_one():
  assert moved.current_path('research.run.Run') == 'research.training.run.Run'
  assert moved.current_path('research.model.models.UntiedHead') == 'research.model.heads.UntiedHead'
  assert moved.current_path('research.model.models') == 'research.model.models'
  assert moved.current_path('research.model.ssm.Mamba2') == 'research.model.mamba2.Mamba2'
  for path in ('research.training.run.Run', 'jax.nn.silu', 'research.runner.Run', 'run.Run'):
    assert moved.current_path(path) == path


def test_a_config_text_is_rewritten_where_it_names_classes_and_nowhere_else():
  old = (
    'Run\n'
    '  name = None\n'
    '  model = research.model.models.LanguageModel\n'
    '    head = research.model.models.UntiedHead\n'
    '    parts = [\n'
    '      research.model.attention.LatentAttention\n'
    '      research.model.layers.Mlp\n'
    '        activation = jax.nn.silu\n'
    '    ]\n'
    "  files = 'research.run.Run'\n"
  )
  new = moved.current_paths(old)
  assert new == old.replace('models.UntiedHead', 'heads.UntiedHead').replace(
    'attention.LatentAttention', 'latent.LatentAttention'
  ).replace('layers.Mlp', 'mlp.Mlp')
  assert moved.current_paths(new) == new
