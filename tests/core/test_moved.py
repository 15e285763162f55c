"""What the version before wrote is still read: its gin files, config.gin and config.txt."""

import importlib
import importlib.util

import pytest

from research.core import configs, moved
from research.core.errors import UserError
from research.data.mixtures import Mixture
from research.model import heads, mlp, residual
from research.parallel.mesh import Mesh

# A config.gin as the version before wrote it into the workdir of a run, from a user's gin file over
# gin/runs/tiny.gin and two bindings of the command line.
CONFIG_GIN = """\
from __gin__ import dynamic_registration
from research import run
from research import sharding
from research import streams
from research.model import attention
from research.model import layers
from research.model import models
from research.model import moe
from research.model import ssm
# The smallest real run: a 0.15M LLaMA on the embedded Python sources, in bytes, about a minute on a laptop.
#   python -m research.train --gin_file=gin/runs/tiny.gin --workdir=/tmp/tiny
from __gin__ import dynamic_registration
from research import run
from research import streams
# A LLaMA for a laptop, on bytes; layers written out and nothing recomputed, which is faster when small.
from __gin__ import dynamic_registration
from research.model import stack
# LLaMA (Touvron et al. 2023, arXiv:2302.13971): pre-RMSNorm, rotary positions, SwiGLU, no biases, untied head.
# Set: EMBED, LAYERS, HEADS, MLP; KV_HEADS groups the queries.
from __gin__ import dynamic_registration
import jax.nn
from research.model import attention
from research.model import layers
from research.model import models
from research.model import positions
from research.model import stack

MODEL = @models.LanguageModel
VOCAB = 32000
HEAD_DIM = 128
KV_HEADS = None  # as many as HEADS
models.LanguageModel:
  vocab = %VOCAB
  embed = %EMBED
  embedder = @models.Embedder
  stack = @stack.Stack
  head = @models.UntiedHead
stack.Stack:
  parts = (@attention.Attention, @layers.Mlp)
  residual = @stack.PreNorm
  repeats = %LAYERS
  norm = @layers.RMSNorm
stack.PreNorm.norm = @layers.RMSNorm
attention.Attention:
  heads = %HEADS
  kv_heads = %KV_HEADS
  head_dim = %HEAD_DIM
  rotary = @positions.rotary
layers.Mlp:
  mlp = %MLP
  activations = (@jax.nn.silu, @jax.nn.identity)

VOCAB = 384
EMBED = 64
LAYERS = 2
HEADS = 4
HEAD_DIM = 16
MLP = 192
stack.Stack:
  scan = False
  remat = 'none'
# AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), decaying matrices only; warm-up, then a cosine to a tenth.
# Set: LEARNING_RATE.
from __gin__ import dynamic_registration
import optax
from research.training import optimizers
from research.training import schedules

OPTIMIZER = @optax.adamw
SCHEDULE = @schedules.warmup_cosine
optax.adamw:
  b1 = 0.9
  b2 = 0.95
  weight_decay = 0.1
  mask = @optimizers.matrices
schedules.warmup_cosine.peak = %LEARNING_RATE
LEARNING_RATE = 3e-3

RUN = @run.Run
run.Run:
  model = %MODEL
  train = @train/streams.Stream()
  validation = @validation/streams.Stream()
  optimizer = %OPTIMIZER
  schedule = %SCHEDULE
  steps = 500
  batch_size = 16
  eval_every = 250
  checkpoint_every = 250
streams.Stream:
  task = 'causal_lm'
  lengths = {'targets': 256}
train/streams.Stream:
  split = 'train'
  examples = 16384
validation/streams.Stream:
  split = 'validation'
  examples = 256

run.Run.train = @mixed/streams.Mixture()
mixed/streams.Mixture:
  streams = {'code': @train/streams.Stream()}
  rates = {'code': 1.0}
run.Run.mesh = @sharding.Mesh()
models.LanguageModel.head = @models.UntiedHead
import research.run
research.run.Run.steps = 20
LEARNING_RATE = 1e-3
"""


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


@pytest.mark.parametrize('old', sorted(moved.NAMES))
def test_no_module_of_today_is_taken_for_an_old_name(old):
  with pytest.raises(ModuleNotFoundError):
    importlib.import_module(old)


def test_a_config_gin_of_the_version_before_builds_and_says_so_in_a_line(tmp_path, capsys):
  path = tmp_path / 'config.gin'
  path.write_text(CONFIG_GIN)
  run = configs.load(str(path)).build()
  model = run.model.keywords
  assert run.steps == 20
  assert isinstance(run.train, Mixture)
  assert isinstance(run.mesh, Mesh)
  assert model['head'] is heads.UntiedHead
  assert model['stack'].keywords['residual'].func is residual.PreNorm
  assert model['stack'].keywords['parts'][1].func is mlp.Mlp
  assert run.schedule.keywords == {'peak': 1e-3}
  (line,) = capsys.readouterr().err.splitlines()
  assert 'config.gin: read 8 names of an earlier version as the present ones' in line


def test_an_old_file_over_a_present_one_is_written_out_as_one_that_reads_the_same(tmp_path):
  old = tmp_path / 'old.gin'
  old.write_text(
    'from __gin__ import dynamic_registration\n'
    'from research import run\n'
    'from research import streams\n'
    "include 'gin/runs/tiny.gin'\n"
    'run.Run.train = @mixed/streams.Mixture()\n'
    "mixed/streams.Mixture.streams = {'a': @train/streams.Stream()}\n"
  )
  config = configs.load(str(old), ['Run.steps=7'])
  written = tmp_path / 'config.gin'
  written.write_text(config.text)
  again = configs.load(str(written))
  assert again.build().identity() == config.build().identity()
  assert isinstance(again.build().train, Mixture)


def test_an_old_name_that_is_no_more_is_refused_in_a_sentence(tmp_path):
  path = tmp_path / 'old.gin'
  path.write_text('from research import streams\nstreams.Streams.split = 1\n')
  with pytest.raises(
    UserError, match=r"old\.gin:2: .*streams has no 'Streams'\. Did you mean Stream"
  ):
    configs.load(str(path))


def test_an_argument_that_became_another_class_s_is_told():
  with pytest.raises(UserError, match=r'there is no Run\.z_loss; it is CrossEntropy\.z_loss now'):
    configs.load('gin/runs/tiny.gin', ['Run.z_loss=1e-4'])
