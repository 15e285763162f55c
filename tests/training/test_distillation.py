"""Distillation equals float64 references, however the batch is cut, and its frozen form the online one."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.checkpoints.pretrained import Pretrained
from research.core import configs
from research.core.errors import Invalid, UserError
from research.data import batches, cache
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.training import loop, population
from research.training.distillation import Distillation
from research.training.program import make_program
from research.training.scores import TopTokens

# Quick to compile.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
BATCH, LENGTH, EMBED, VOCAB = 4, 8, 6, 11


class Toy:
  """A head alone: features are given."""

  vocab = VOCAB

  def __init__(self, kernel, given=None):
    self.kernel, self.given = kernel, jnp.asarray(given) if given is not None else None

  def features(self, batch):
    return self.given, {}

  def readout(self):
    return lambda x: x @ self.kernel


def drawn(seed=0):
  """(features, kernel) of a student and of a teacher, and a batch."""
  random = np.random.default_rng(seed)
  normal = lambda *shape: random.normal(size=shape).astype(np.float32)
  batch = {
    'decoder_target_tokens': random.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32),
    'decoder_loss_weights': random.integers(0, 2, (BATCH, LENGTH)).astype(np.int32),
  }
  student = normal(BATCH, LENGTH, EMBED), normal(EMBED, VOCAB)
  teacher = normal(BATCH, LENGTH, EMBED), normal(EMBED, VOCAB)
  return student, teacher, batch


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(student, teacher, batch, temperature, mix, direction):
  """The loss and its gradients by the student's features and kernel, in float64 by torch."""
  torch = pytest.importorskip('torch')
  double = lambda x: torch.tensor(np.asarray(x, np.float64), requires_grad=True)
  x, kernel = map(double, student)
  logits = x @ kernel
  theirs = torch.tensor(np.asarray(teacher[0], np.float64) @ np.asarray(teacher[1], np.float64))
  q = torch.log_softmax(logits / temperature, -1)
  p = torch.log_softmax(theirs / temperature, -1)
  pairs = (q, p) if direction == 'forward' else (p, q)
  # torch's kl_div(input, target) is KL(target || input).
  kl = torch.nn.functional.kl_div(*pairs, reduction='none', log_target=True).sum(-1)
  targets = torch.tensor(batch['decoder_target_tokens'], dtype=torch.long)
  nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction='none')
  weights = torch.tensor(batch['decoder_loss_weights'], dtype=torch.float64)
  loss = (weights * (mix * temperature**2 * kl + (1 - mix) * nll)).sum()
  loss.backward()
  return loss.item(), x.grad.numpy(), kernel.grad.numpy()


def ours(loss, student, batch, chunks, teacher=None):
  batch = {key: jnp.asarray(value) for key, value in batch.items()}

  def total(x, kernel):
    others = {} if teacher is None else {'teacher': teacher}
    terms, counts = loss(Toy(kernel), x, batch, chunks, **others)
    return sum(terms.values()), counts

  gradient = jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
  (value, counts), gradients = gradient(*student)
  return value, counts, gradients


@pytest.mark.parametrize('direction', ['forward', 'reverse'])
@pytest.mark.parametrize(('temperature', 'mix', 'chunks'), [(1.0, 1.0, 1), (2.5, 0.7, 4)])
def test_loss_and_gradient_are_the_references(direction, temperature, mix, chunks):
  student, teacher, batch = drawn()
  expected = reference(student, teacher, batch, temperature, mix, direction)
  loss = Distillation(temperature=temperature, mix=mix, direction=direction)
  toy = Toy(teacher[1], teacher[0])
  value, counts, gradients = ours(loss, student, batch, chunks, toy)
  np.testing.assert_allclose(value, expected[0], rtol=1e-5)
  for got, wanted in zip(gradients, expected[1:], strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
  assert counts['weight'] == batch['decoder_loss_weights'].sum()


@pytest.mark.parametrize('direction', ['forward', 'reverse'])
def test_frozen_tokens_become_the_teacher_as_they_become_the_vocabulary(direction):
  """What the k tokens miss only shrinks, by the chain rule; at k = vocabulary nothing is missed."""
  student, teacher, batch = drawn(1)
  loss = Distillation(temperature=1.5, direction=direction)
  online = ours(loss, student, batch, 2, Toy(teacher[1], teacher[0]))
  log_probs = log_softmax((teacher[0] @ teacher[1]) / 1.5)
  order = np.argsort(-log_probs, -1)
  gaps = []
  for k in (2, 5, VOCAB):
    rows = {
      'decoder_teacher_tokens': order[..., :k].astype(np.int32),
      'decoder_teacher_log_probs': np.take_along_axis(log_probs, order[..., :k], -1),
    }
    frozen = ours(loss, student, batch | rows, 2)
    gaps.append(float(online[0] - frozen[0]))
  assert gaps[0] > gaps[1] > 0
  np.testing.assert_allclose(gaps[2], 0, atol=1e-4)
  for got, wanted in zip(frozen[2], online[2], strict=True):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def load(text_file, *bindings):
  more = [f"FILES='{text_file}'", 'Run.steps=6', 'Run.checkpoint_every=3', 'Run.log_every=1']
  return configs.load('tests/gin/decoder.gin', [*more, *bindings])


def train(run, workdir):
  with open(os.devnull, 'w') as silence:
    return loop.train(run, workdir, '', stream=silence)


@pytest.fixture(scope='module')
def teacher(text_file, tmp_path_factory):
  """The folder of a teacher of another size."""
  folder = tmp_path_factory.mktemp('teacher')
  config = load(text_file, 'EMBED=24', 'LAYERS=1')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    with open(os.devnull, 'w') as silence:
      loop.train(config.build(), folder, config.text, stream=silence)
  return folder


def student(text_file, loss, *bindings):
  return dataclasses.replace(load(text_file, *bindings).build(), loss=loss)


def measured(run, frozen, mesh, devices):
  """The loss and the gradient's norm of the first step."""
  with mesh.use(jax.local_devices()[:devices]):
    program = make_program(run)
    batch = hosts.place(batches.batch_at(frozen, run.batches, 0, 0))
    state = jax.jit(program.init)(jax.random.key(0))
    _, scalars = jax.jit(program.step)(state, batch, 1e-3, program.fixed())
  return [float(scalars[name]) for name in ('loss', 'divergence', 'grad_norm')]


@pytest.mark.slow
@pytest.mark.parametrize('online', [True, False])
def test_the_step_does_not_depend_on_how_the_batch_is_cut(online, text_file, teacher):
  other = Pretrained(folder=str(teacher))
  run = student(
    text_file, Distillation(teacher=other if online else None, temperature=2.0, mix=0.5)
  )
  if not online:
    scores = TopTokens(model=other, tokens=12, temperature=2.0, batch_size=8)
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, scores=scores))
  frozen = cache.open_stream(run.train, log=lambda line: None)
  whole = measured(run, frozen, Mesh(), 1)
  cut = dataclasses.replace(run, microbatches=2, logits_chunks=4)
  np.testing.assert_allclose(measured(cut, frozen, Mesh(), 1), whole, rtol=2e-5)
  spread = Mesh(data=1, fsdp=2, tensor=2)
  np.testing.assert_allclose(measured(cut, frozen, spread, 4), whole, rtol=2e-5)


@pytest.mark.slow
def test_a_distilled_run_resumes_to_the_bit_and_says_its_teacher(
  text_file, teacher, one_device, tmp_path
):
  run = student(text_file, Distillation(teacher=Pretrained(folder=str(teacher)), mix=0.5))
  row = train(run, tmp_path / 'whole')
  assert row['teacher/tokens'] > 0
  assert row['divergence'] > 0
  stopped = tmp_path / 'stopped'
  train(run, stopped)
  (stopped / 'checkpoints' / '6').rename(tmp_path / 'gone')
  (stopped / 'run.json').unlink()
  again = train(run, stopped)
  same = set(row) - {'seconds'}
  assert {k: again[k] for k in same} == {k: row[k] for k in same}
  # Another teacher is another run.
  other = Pretrained(folder=str(teacher), step=3)
  with pytest.raises(UserError, match='holds a different run'):
    train(student(text_file, Distillation(teacher=other, mix=0.5)), stopped)


@pytest.mark.slow
def test_students_of_a_population_share_a_teacher(text_file, teacher, one_device, tmp_path):
  """Members that differ in how much they listen to it are the runs one by one."""
  other = Pretrained(folder=str(teacher))
  runs = [student(text_file, Distillation(teacher=other, mix=mix)) for mix in (0.25, 0.75)]
  with open(os.devnull, 'w') as silence:
    folders = [tmp_path / 'a', tmp_path / 'b']
    together = population.train_population(runs, folders, streams=[silence, silence])
  alone = train(runs[1], tmp_path / 'alone')
  assert together[0]['loss'] != together[1]['loss']
  for name in ('loss', 'divergence'):
    assert together[1][name] == pytest.approx(alone[name], rel=2e-5)


@pytest.mark.slow
def test_the_mass_that_is_left_out_is_told(text_file, teacher, one_device):
  scores = TopTokens(model=Pretrained(folder=str(teacher)), tokens=4, batch_size=8)
  stream = dataclasses.replace(load(text_file).build().train, scores=scores)
  lines = []
  frozen = cache.open_stream(stream, log=lines.append)
  told = next(line for line in lines if 'leave out' in line)
  rows = frozen.examples(np.arange(len(frozen)))
  left = 1 - np.exp(rows['decoder_teacher_log_probs'].astype(np.float64)).sum(-1)
  share = np.average(left, weights=rows['decoder_loss_weights'])
  assert f'leave out {share:.2%}' in told
  assert rows['decoder_teacher_tokens'].shape == (*rows['decoder_target_tokens'].shape, 4)


@pytest.mark.slow
def test_what_does_not_suit_is_told(text_file, teacher, one_device, tmp_path):
  with pytest.raises(Invalid, match=r'Pretrained\.folder: .*no folder'):
    train(student(text_file, Distillation(teacher=Pretrained(folder='nowhere'))), tmp_path / 'a')
  other = Pretrained(folder=str(teacher))
  wrong = Pretrained(folder=str(teacher), step=4)
  with pytest.raises(Invalid, match=r'steps are \[3, 6\]'):
    train(student(text_file, Distillation(teacher=wrong)), tmp_path / 'b')
  assert not [path for path in tmp_path.rglob('*') if path.is_file()]
  with pytest.raises(Invalid, match=r'Distillation\.teacher: it has 384 logits and the model 400'):
    train(student(text_file, Distillation(teacher=other), 'VOCAB=400'), tmp_path / 'c')
  with pytest.raises(Invalid, match='reads decoder_teacher_tokens'):
    train(student(text_file, Distillation()), tmp_path / 'd')
  with pytest.raises(Invalid, match='temperature'):
    Distillation(teacher=other, temperature=0.0)
