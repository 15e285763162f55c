"""A run: it resumes exactly, keeps its rows whole, says what is wrong before it starts."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from research.checkpoints.manager import Checkpoints
from research.core import configs, storage
from research.core.errors import UserError
from research.data import batches, cache, mixtures
from research.model import counts
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.training import interrupt, loop
from research.training import program as program_module
from research.training.loop import train
from research.training.program import make_program, mesh_of
from research.training.record import Record

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MODELS = ('decoder', 'encoder_decoder')


def bindings(text_file, **more) -> list[str]:
  return [f"FILES='{text_file}'", *(f'{k}={v}' for k, v in more.items())]


def load(model, text_file, **more):
  return configs.load(f'tests/gin/{model}.gin', bindings(text_file, **more))


def run(model, text_file, workdir, **more) -> dict:
  config = load(model, text_file, **more)
  with config.explains(), open(os.devnull, 'w') as silence:
    return train(config.build(), workdir, config.text, stream=silence)


def final_state(config, workdir):
  """The last checkpoint as host arrays."""
  the_run = config.build()
  with mesh_of(the_run, jax.devices()).use():
    program = make_program(the_run)
    abstract = jax.eval_shape(jax.jit(program.init), jax.random.key(0))
    checkpoints = Checkpoints(workdir / 'checkpoints')
    step, state, _ = checkpoints.restore(abstract)
    checkpoints.close()
    return step, jax.tree.map(np.asarray, state)


def loss_rows(workdir):
  return [row for row in storage.read_rows(workdir / 'metrics.jsonl') if 'loss' in row]


@pytest.mark.parametrize(
  'model', ['decoder', pytest.param('encoder_decoder', marks=pytest.mark.slow)]
)
def test_a_run_learns_and_ends_as_one_row(model, text_file, one_device, tmp_path):
  row = run(model, text_file, tmp_path, **{'Run.eval_every': 20})
  assert row['status'] == 'finished'
  losses = [r['loss'] for r in loss_rows(tmp_path)]
  assert losses[-1] < losses[0] - 1
  assert row == json.loads((tmp_path / 'run.json').read_text())
  assert 0 < row['tokens'] <= 40 * 8 * row['length']
  assert row['flops_6n_with_head'] > row['flops_6n_non_embedding'] > 0
  evaluations = [r for r in storage.read_rows(tmp_path / 'metrics.jsonl') if 'validation/loss' in r]
  assert [r['step'] for r in evaluations] == [20, 40]
  assert evaluations[-1]['validation/loss'] == row['loss']
  assert list((tmp_path / 'tensorboard').iterdir())
  # What it saved is re-runnable, and is the same run.
  again = configs.load(str(tmp_path / 'config.gin'))
  assert again.build().identity() == (tmp_path / 'config.txt').read_text()


def test_stopped_by_sigterm_and_resumed_is_bit_identical(text_file, one_device, tmp_path):
  # Batches grow and rows lengthen at step 20: it is stopped before that, and goes on across it.
  more = {'Run.curriculum': ((20, 2, 4),)}
  config = load('decoder', text_file, **more)
  whole, parts = tmp_path / 'whole', tmp_path / 'parts'
  row = run('decoder', text_file, whole, **more)
  log_step = Record.log_step

  def log_and_kill(record, step, scalars):
    if step == 16:
      os.kill(os.getpid(), signal.SIGTERM)
    return log_step(record, step, scalars)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Record, 'log_step', log_and_kill)
    with pytest.raises(interrupt.Interrupted, match=r'stopped at step 1[67] with a checkpoint'):
      run('decoder', text_file, parts, **more)
  resumed = run('decoder', text_file, parts, **more)
  (step, state), (step2, state2) = final_state(config, whole), final_state(config, parts)
  assert step == step2 == 40
  jax.tree.map(np.testing.assert_array_equal, state, state2)
  assert [r['step'] for r in loss_rows(parts)] == [r['step'] for r in loss_rows(whole)]
  assert [r['loss'] for r in loss_rows(parts)][-1] == [r['loss'] for r in loss_rows(whole)][-1]
  # D is what was read, in whichever shape: 200 examples of 32, nearly full. Short rows attend for less.
  assert row['tokens'] == resumed['tokens'] == loss_rows(parts)[-1]['tokens']
  assert 0.9 < row['tokens'] / ((20 * 2 + 20 * 8) * 32) <= 1
  assert row['epochs'] == resumed['epochs']
  # The command once more trains nothing and takes no time.
  assert run('decoder', text_file, parts, **more)['seconds'] <= resumed['seconds']
  model = config.build().model
  per_token = lambda length: counts.count(model, {'targets': length}).flops_attention_full
  mean = (per_token(8) * 40 + per_token(32) * 160) / 200
  np.testing.assert_allclose(row['flops_attention_full'] / row['tokens'], mean, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize('model', MODELS)
def test_killed_and_restarted_is_bit_identical(model, text_file, one_device, tmp_path):
  workdir, whole, steps = tmp_path / 'killed', tmp_path / 'whole', 400
  more = {'Run.steps': steps, 'Run.checkpoint_every': 25}
  command = [sys.executable, '-m', 'research.train', f'--gin_file=tests/gin/{model}.gin']
  command += [f'--gin.{b}' for b in bindings(text_file, **more)]
  # A process as a user starts it: one device, as many threads as there are cores.
  env = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'PJRT_NPROC')}
  subprocess.run(
    [*command, f'--workdir={whole}'], cwd=ROOT, env=env, check=True, capture_output=True
  )
  command.append(f'--workdir={workdir}')
  kill_at, killed = random.Random(model).sample(range(30, steps - 60), 2), 0
  for at in sorted(kill_at):
    process = subprocess.Popen(
      command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
      rows = loss_rows(workdir)
      if rows and rows[-1]['step'] >= at:
        process.send_signal(signal.SIGKILL)
        killed += 1
        break
      time.sleep(0.005)
    process.wait()
  assert killed == 2
  subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
  config = load(model, text_file, **more)
  (step, state), (step2, state2) = (
    final_state(config, tmp_path / 'whole'),
    final_state(config, workdir),
  )
  assert step == step2 == steps
  jax.tree.map(np.testing.assert_array_equal, state, state2)
  wanted = [*range(3, steps, 3), steps]
  assert [r['step'] for r in loss_rows(workdir)] == wanted
  assert [r['step'] for r in loss_rows(whole)] == wanted


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_used(
  text_file, one_device, tmp_path
):
  run('decoder', text_file, tmp_path / 'run')
  steps = sorted(
    int(p.name) for p in (tmp_path / 'run' / 'checkpoints').iterdir() if p.name.isdigit()
  )
  assert steps == [35, 40]
  flip_bytes(tmp_path / 'run' / 'checkpoints' / '40' / 'state')
  lines = []
  the_run = load('decoder', text_file).build()
  with mesh_of(the_run, jax.devices()).use():
    program = make_program(the_run)
    abstract = jax.eval_shape(jax.jit(program.init), jax.random.key(0))
    checkpoints = Checkpoints(tmp_path / 'run' / 'checkpoints')
    step, state, _ = checkpoints.restore(abstract, log=lines.append)
    checkpoints.close()
  assert step == 35
  assert 'checkpoint at step 40 is damaged' in lines[0]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
  assert (tmp_path / 'run' / 'checkpoints_damaged' / '40').is_dir()


def flip_bytes(folder):
  """Flips one byte in the middle of the largest data file."""
  path = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(bytes(data))


def test_a_checkpoint_of_another_model_names_what_differs(text_file, one_device, tmp_path):
  run('decoder', text_file, tmp_path, **{'Run.steps': 2})
  (tmp_path / 'config.txt').unlink()
  with pytest.raises(
    UserError, match=r'params/embedder/tokens is \(384, 32\) and this model has \(384, 48\)'
  ):
    run('decoder', text_file, tmp_path, EMBED=48)


def test_a_run_that_diverges_stops_with_its_last_good_checkpoint(text_file, one_device, tmp_path):
  row = run('decoder', text_file, tmp_path, LEARNING_RATE=1e30, **{'Run.clip': None})
  assert row['status'] == 'nan'
  assert row['loss'] is None
  assert row['steps'] < 40
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  for step in steps:
    assert step < row['steps']


def test_a_last_step_without_a_finite_validation_loss_is_not_saved_or_finished(
  text_file, one_device, tmp_path
):
  # The second moment is negative after the last step alone: no loss of training is NaN.
  row = run('decoder', text_file, tmp_path, LAYERS=1, **{'Run.steps': 2, 'adamw.b2': -0.5})
  assert row['status'] == 'nan'
  assert row['loss'] is None
  assert not [p for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]


def test_a_negative_rate_is_refused(text_file, one_device, tmp_path):
  with pytest.raises(UserError, match=r'schedule: the rate of step \d+ is -[\d.]+; it must be'):
    run('decoder', text_file, tmp_path, LEARNING_RATE=-1.0)


def test_microbatches_are_one_batch(text_file, monkeypatch):
  """Those of `Run.microbatches`, on two devices, and those that a single core makes."""
  config = load('decoder', text_file, LAYERS=1, **{'Run.batch_size': 128})
  frozen = cache.open_stream(config.build().train, log=lambda _: None)
  # Compiling is nearly all of the time here, and most of that is optimising.
  jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
  initial, results = None, []
  for microbatches, size, threads, parts in ((1, 2, 2, 1), (4, 2, 2, 4), (1, 1, 1, 4)):
    monkeypatch.setattr(program_module, 'threads', lambda threads=threads: threads)
    the_run = dataclasses.replace(config.build(), microbatches=microbatches)
    devices = jax.devices()[:size]
    with mesh_of(the_run, devices).use(devices):
      batch = hosts.place(next(batches.batches(frozen, the_run.batches, 0)))
      program = make_program(the_run)
      assert program.parts(batch) == parts
      if initial is None:
        initial = jax.device_get(jit(program.init)(jax.random.key(0)))
      where = jax.tree.map(lambda x: x.sharding, hosts.on_mesh(program.abstract))
      state = jax.device_put(initial, where)
      sums = jit(program.evaluate)(state['params'], batch)
      state, scalars = jit(program.step)(state, batch, 1e-3)
    numbers = scalars['loss'], scalars['grad_norm'], sums['loss'], sums['weight']
    results.append((jax.tree.leaves(jax.device_get(state['params'])), [float(x) for x in numbers]))
  whole, *others = results
  for parameters, numbers in others:
    np.testing.assert_allclose(numbers, whole[1], rtol=1e-5)
    # Adam's first step is lr * sign(gradient): compare where the gradient is not all rounding.
    pairs = zip(parameters, whole[0], strict=True)
    close = [np.mean(np.isclose(x, y, rtol=1e-3, atol=1e-5)) for x, y in pairs]
    assert min(close) > 0.99


def test_a_core_cuts_no_batch_that_experts_see(text_file, one_device, monkeypatch):
  """Their load balance is that of the tokens that they see together."""
  monkeypatch.setattr(program_module, 'threads', lambda: 1)
  batch = {'decoder_input_tokens': np.zeros((64, 32), np.int32)}
  parts = {}
  for model in ('llama/tiny', 'mixtral/tiny'):
    the_run = configs.load(
      ['tests/gin/decoder.gin', f'gin/models/{model}.gin'], bindings(text_file, LEARNING_RATE=1e-3)
    ).build()
    with mesh_of(the_run, jax.devices()).use():
      parts[model] = make_program(the_run).parts(batch)
  assert parts == {'llama/tiny': 2, 'mixtral/tiny': 1}


@pytest.mark.parametrize(
  ('more', 'says'),
  [
    ({'Run.steps': -3}, r'--gin\.Run\.steps=-3: Run\.steps: -3 must be a positive whole number'),
    ({'VOCAB': 100}, r'--gin\.VOCAB=100, by %VOCAB at .*family\.gin:\d+: LanguageModel\.vocab: 100 is less'),
    ({'Run.batch_size': 6}, r'--gin\.Run\.batch_size=6: Run\.batch_size: 6 is not a multiple of 8'),
    ({'Stream.task': "'causal_ml'"}, r"--gin\.Stream\.task='causal_ml': .*Did you mean causal_lm"),
    ({'Attention.kv_heads': 3}, r'--gin\.Attention\.kv_heads=3: Attention\.kv_heads: 3 does not divide'),
    ({'Run.microbatches': 3}, r'--gin\.Run\.microbatches=3: .*3 does not divide the batch of 8'),
    ({'Run.curriculum': ((9, 2, 2),)}, r'Run\.curriculum: 4 is not a multiple of 8'),
    ({'Run.curriculum': ((99, 8, 1),)}, r'Run\.curriculum: its 99 steps are more than the 40 of the run'),
    ({'Run.curriculum': ((9, 8, 3),)}, r'Run\.curriculum: the length 32 cannot be cut into 3'),
    ({'warmup_cosine.warmup': 99}, r'--gin\.warmup_cosine\.warmup=99: .*run of 40 steps'),
  ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_compiled(
  more, says, text_file, tmp_path, monkeypatch
):
  monkeypatch.setattr(loop, 'Loop', None)  # where compiling begins
  with pytest.raises(UserError, match=says) as error:
    run('decoder', text_file, tmp_path, **more)
  assert '\n' not in str(error.value)


def test_a_workdir_of_another_run_is_not_touched(text_file, one_device, tmp_path):
  run('decoder', text_file, tmp_path, **{'Run.steps': 2})
  before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  with pytest.raises(
    UserError, match=r'holds a different run \("steps = 2" there, "steps = 3" here\)'
  ):
    run('decoder', text_file, tmp_path, **{'Run.steps': 3})
  assert before == {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}


def test_a_workdir_that_cannot_be_made(text_file, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'--workdir=.* cannot be written'):
    run('decoder', text_file, tmp_path / 'file' / 'run')


def test_a_mixture_is_evaluated_part_by_part(text_file, one_device, tmp_path):
  the_run = load('decoder', text_file, **{'Run.steps': 5, 'Run.eval_every': 5}).build()
  parts = {'seen': the_run.train, 'held_out': the_run.validation}
  both = mixtures.Mixture(streams=parts, rates={'seen': 3, 'held_out': 1})
  the_run = dataclasses.replace(the_run, train=both, validation=both)
  with open(os.devnull, 'w') as silence:
    row = train(the_run, tmp_path, stream=silence)
  last = storage.read_rows(tmp_path / 'metrics.jsonl')[-1]
  losses = [last[f'validation/{name}/loss'] for name in parts]
  assert min(losses) < last['validation/loss'] < max(losses)
  assert row['loss'] == last['validation/loss']
  assert [row[f'{name}/loss'] for name in parts] == losses
  # Of the five steps' examples three quarters are of the one, a quarter of the other.
  seen, held_out = (row[f'{name}/epochs'] for name in parts)
  sizes = [len(cache.open_stream(part)) for part in parts.values()]
  assert seen * sizes[0] == pytest.approx(3 * held_out * sizes[1])
  assert seen * sizes[0] + held_out * sizes[1] == pytest.approx(5 * the_run.batch_size)
  assert row['epochs'] == max(seen, held_out)


@pytest.mark.parametrize('mesh', [None, Mesh(fsdp=4, tensor=2)])
def test_what_is_compiled_ahead_is_what_is_called(mesh, text_file, tmp_path, compiled):
  """Each of a run's programs is compiled once: no call compiles it again."""
  more = {'Run.steps': 4, 'Run.eval_every': 2}
  the_run = dataclasses.replace(load('decoder', text_file, **more).build(), mesh=mesh)
  with open(os.devnull, 'w') as silence:
    train(the_run, tmp_path, stream=silence)
  assert [compiled(program) for program in ('init', 'step', 'evaluate')] == [1, 1, 1]
