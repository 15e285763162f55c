"""Shrinking removes the parts that matter least. Without parts that add nothing, the model is the same."""

import argparse
import functools
import json
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from research import shrink
from research.core.errors import UserError
from research.huggingface import inwards
from research.model import counts
from research.parallel.mesh import Mesh
from research.tuning import shrinking
from tests.families import tiny
from tests.huggingface.test_convert import write_llama

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / 'docs' / 'shrinking.md').read_text()
VOCAB = 64
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@pytest.fixture(autouse=True)
def one_device_in_use():
  with Mesh().use(jax.local_devices()[:1]):
    yield


def random_params(model) -> dict:
  """Parameters large enough that every layer matters, on the host."""

  @jit
  def init(key):
    return nnx.to_pure_dict(nnx.state(model(rngs=nnx.Rngs(params=key))))

  params = jax.tree.map(np.array, jax.device_get(init(jax.random.key(0))))
  params['embedder']['tokens'] *= 50
  return params


def logits(model, params, batch) -> np.ndarray:
  graphdef = nnx.graphdef(counts.abstract(model))
  return np.asarray(jit(lambda params: nnx.merge(graphdef, params)(batch)[0])(params))


def batch_of(model, params) -> dict:
  """Random tokens, with the model's own likeliest tokens as targets."""
  tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 12)).astype(np.int32)
  batch = {'decoder_input_tokens': tokens, 'decoder_loss_weights': np.ones_like(tokens)}
  batch['decoder_target_tokens'] = logits(model, params, batch).argmax(-1).astype(np.int32)
  return batch


def shrunk(model, smaller, params, batch, log=lambda line: None):
  return shrinking.shrink(counts.abstract(model), counts.abstract(smaller), params, [batch], log)


def part(params: dict, number: int) -> dict:
  """The attention (0) or the MLP (1) of all layers of a LLaMA."""
  return params['stack']['sublayers'][number]['parts'][0]


def test_what_adds_nothing_goes_first():
  """A layer goes; of each other layer go different units, and a key head with its queries."""
  model = tiny('llama2', ['LAYERS=3'])
  smaller = tiny('llama2', ['MLP=24', 'HEADS=2', 'KV_HEADS=1'])
  params = random_params(model)
  for number in (0, 1):
    part(params, number)['output']['kernel'][1] = 0
  dead_units = [[0, *range(10, 16), 31], [5, 6, *range(20, 26)]]
  for layer, units, key in zip((0, 2), dead_units, (0, 1), strict=True):
    part(params, 1)['inputs'][0]['kernel'][layer][:, units] = 0
    part(params, 0)['value']['kernel'][layer][:, key] = 0
  batch = batch_of(model, params)
  lines = []
  new, kept = shrunk(model, smaller, params, batch, lines.append)
  assert kept.layers == {('stack',): [0, 2]}
  assert [line[:24] for line in lines] == ['without layer 1 of stack']
  attention, mlp = (('stack', 'sublayers', number, 'parts', 0) for number in (0, 1))
  units = kept.units[mlp, 'mlp'].tolist()
  assert [sorted({*range(32)} - {*row}) for row in units] == dead_units
  assert kept.units[attention, 'kv_heads'].tolist() == [[1], [0]]
  assert kept.units[attention, 'heads'].tolist() == [[2, 3], [0, 1]]
  expected = logits(model, params, batch)
  np.testing.assert_allclose(logits(smaller, new, batch), expected, atol=1e-4)
  assert kept.losses[1] == pytest.approx(kept.losses[0], abs=1e-5)


def test_of_every_key_head_the_largest_queries_stay():
  kernel = shrinking.Parameter(('heads', 'head_dim', 'embed'), (6, 8, 16), (4, 8, 16))
  size = np.array([3.0, 1.0, 2.0, 0.1, 0.3, 0.2])
  kept = shrinking._heads(size, (2, 2), kernel, ('part',))
  assert kept['heads'].tolist() == [0, 2, 4, 5]
  assert kept['kv_heads'].tolist() == [0, 1]
  with pytest.raises(UserError, match='4 heads over 1 key heads are more for each than the 3 now'):
    shrinking._heads(size, (2, 1), kernel, ('part',))


@pytest.mark.slow
def test_channels_that_nothing_writes_to_go():
  model = tiny('llama2')
  smaller = tiny('llama2', ['EMBED=12'])
  params = random_params(model)
  dead = [1, 2, 8, 15]
  params['embedder']['tokens'][:, dead] = 0
  for number in (0, 1):
    part(params, number)['output']['kernel'][..., dead] = 0
  batch = batch_of(model, params)
  new, kept = shrunk(model, smaller, params, batch)
  assert sorted({*range(16)} - {*kept.channels.tolist()}) == dead

  def rescaled(path, x):
    # The mean of a norm is over 12 channels now.
    return x * np.sqrt(16 / 12) if path[-1].key == 'scale' else x

  new = jax.tree.map_with_path(rescaled, new)
  expected = logits(model, params, batch)
  np.testing.assert_allclose(logits(smaller, new, batch), expected, atol=1e-4)


@pytest.mark.parametrize(
  ('family', 'before', 'after', 'why'),
  [
    ('llama2', [], ['MLP=40'], r'larger than .*sizes may only fall'),
    ('llama2', [], ['HEAD_DIM=4'], "falls from 8 to 4 in 'head_dim'"),
    ('llama2', [], ['VOCAB=32'], "in 'vocab'"),
    ('mixtral', [], ['EXPERTS=2'], "in 'expert'"),
    ('mixtral', [], ['MLP=16'], 'nothing says which of its entries stay'),
    ('bloom', [], ['HEADS=2'], 'position biases of their own'),
    ('t5', [], ['MLP=16'], 'not for encoder-decoders'),
    ('olmo2', ['HEADS=2'], ['HEADS=1', 'EMBED=8'], '_norm.* nothing says which'),
  ],
)
def test_what_cannot_be_made_smaller_is_refused(family, before, after, why):
  model = tiny(family, before)
  smaller = tiny(family, [*before, *after])
  with pytest.raises(UserError, match=why):  # before anything is computed
    shrunk(model, smaller, None, None)


def test_a_smaller_model_differs_in_sizes_alone():
  model = tiny('llama2')
  shrink.check_same(model, tiny('llama2', ['MLP=16', 'LAYERS=1', 'HEADS=2', 'EMBED=8']))
  with pytest.raises(
    UserError, match=r"has 'epsilon = 1e-05' where the gin files say 'epsilon = 0.1'"
  ):
    shrink.check_same(model, tiny('llama2', ['RMSNorm.epsilon=0.1']))
  with pytest.raises(UserError, match='change sizes alone'):
    shrink.check_same(model, tiny('gemma'))


@pytest.mark.slow
def test_a_converted_model_keeps_its_tokenizer_and_knows_every_token(text_file, tmp_path):
  def converted(vocab: int) -> pathlib.Path:
    theirs = tmp_path / f'theirs-{vocab}'
    ours = tmp_path / f'ours-{vocab}'
    theirs.mkdir()
    write_llama(theirs, vocab)
    (theirs / 'tokenizer_config.json').write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    inwards.from_hf(theirs, ours)
    return ours

  def shrink_mlp(ours: pathlib.Path, out: pathlib.Path) -> None:
    files = ['tests/gin/decoder.gin', str(ours / 'model.gin')]
    bindings = [f"FILES='{text_file}'", 'MLP=12']
    shrink.main(
      argparse.Namespace(
        checkpoint=str(ours), out=str(out), batches=1, gin_file=files, gin=bindings
      )
    )

  ours = converted(384)
  half = tmp_path / 'half'
  shrink_mlp(ours, half)
  for name in ('tokenizer_config.json', 'special_ids.json'):
    kept = (ours / 'huggingface' / name).read_text()
    assert (half / 'huggingface' / name).read_text() == kept
  # The model has no embeddings for some tokens of the data, so nothing can be measured.
  with pytest.raises(UserError, match=r'vocab.*200 is less than the 384 tokens of the data'):
    shrink_mlp(converted(200), tmp_path / 'none')


@pytest.mark.slow
def test_the_commands_of_the_page_run(text_file, user_environment, tmp_path):
  (tmp_path / 'files.gin').write_text(
    f"""
from __gin__ import dynamic_registration
from research.data import corpora
from research.data import streams
streams.Stream.corpus = @corpora.TextFiles()
corpora.TextFiles.files = '{text_file}'
corpora.TextFiles.validation_fraction = 0.2
"""
  )
  small = [f'--gin_file={tmp_path / "files.gin"}', '--gin.Run.steps=40']
  small += ['--gin.Run.eval_every=None', '--gin.Run.checkpoint_every=None']
  commands = '\n'.join(re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL)).split('\n')
  for command in filter(None, commands):
    words = shlex.split(command.replace('/tmp/', f'{tmp_path}/'))
    assert words[:4] == ['uv', 'run', 'python', '-m'], command
    more = small if words[4] == 'research.train' else []
    done = subprocess.run(
      [sys.executable, '-m', *words[4:], *more],
      cwd=ROOT, env={**user_environment, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if words[4] == 'research.shrink':
      assert re.search(r'parameters became .*nats per token became', done.stdout, re.DOTALL)
  losses = json.loads((tmp_path / 'half' / 'shrunk.json').read_text())['losses']
  base, healed = (
    json.loads((tmp_path / name / 'run.json').read_text()) for name in ('base', 'healed')
  )
  assert healed['params_total'] < base['params_total']
  assert healed['loss'] < losses[1]
  assert healed['teacher/loss'] == base['loss']
