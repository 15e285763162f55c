"""Rollouts: their log-probabilities are the train step's, and a restart repeats a round to the bit."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from research.core import configs
from research.core.errors import Invalid, UserError
from research.evaluation.generated_tasks import Arithmetic
from research.inference.batch_sampler import draw_answers
from research.inference.engine import Engine
from research.inference.request import Completion, Request
from research.inference.sampling import Sampling
from research.parallel import hosts
from research.parallel.mesh import Mesh
from research.reinforcement import losses
from research.reinforcement.advantages import GAE
from research.reinforcement.penalty import KL
from research.reinforcement.prompts import Problems, Prompt, PromptLines
from research.reinforcement.reward import Reward
from research.reinforcement.sampler import Rows, Sampler
from research.training.losses import CrossEntropy
from research.training.program import make_program
from tests.reinforcement.small import described, load, make_base, saved, train

pytestmark = pytest.mark.usefixtures('one_device')


def rows_of(workdir):
  lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [row for row in lines if 'reward' in row]


def first_round(config):
  """(program, parameters, first batch, its metrics) of a run under the mesh in use."""
  run = config.build()
  program = make_program(run)
  params = jax.jit(program.init)(jax.random.key(1))['params']
  # Larger than at the start, so that probabilities differ.
  params = jax.tree.map(lambda x: 3 * x, params)
  batch, metrics = next(run.train.open(run).batches(program, 0, lambda: params))
  return program, params, batch, metrics


@pytest.mark.parametrize('bindings', [(), ('PolicyGradient.temperature=0.7', 'Rollouts.top_p=0.8')])
def test_the_log_probabilities_of_a_rollout_are_the_steps(text_file, bindings):
  """To 1e-5. So the mean ratio of the first update is 1, with truncated sampling too."""
  with Mesh().use(jax.devices()[:1]):
    program, params, batch, metrics = first_round(load(text_file, *bindings))
    placed = hosts.place(batch)

    @jax.jit
    def read(params, batch):
      model = nnx.merge(program.graphdef, params)
      return model.logits(model.features(batch)[0]), program.loss(params, batch)[1]

    logits, sums = read(params, placed)
    logits = np.asarray(logits, np.float64) / program.run.loss.temperature
  shifted = logits - logits.max(-1, keepdims=True)
  log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
  expected = np.take_along_axis(log_p, batch['decoder_target_tokens'][..., None], -1)[..., 0]
  mask = batch['decoder_loss_weights']
  assert mask.sum() >= 8
  np.testing.assert_allclose(batch[losses.OLD], expected * mask, atol=1e-5)
  assert float(sums['ratio'] / sums['weight']) == pytest.approx(1.0, abs=1e-5)
  if bindings:
    # top_p keeps this part of the policy. A ratio to the truncated probabilities would be this number, not 1.
    assert 0.8 <= metrics['kept_probability'] < 0.97
  else:
    assert metrics['kept_probability'] == pytest.approx(1.0, abs=1e-5)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    assert metrics['entropy'] == pytest.approx((entropy * mask).sum() / mask.sum(), rel=1e-4)


def test_the_rows_of_a_round(text_file):
  """A row has a prompt and its completion up to a stop; only the completion carries loss."""
  with Mesh().use(jax.devices()[:1]):
    _, _, batch, metrics = first_round(load(text_file))
  for row in range(8):
    mask = batch['decoder_loss_weights'][row]
    tokens = batch['decoder_target_tokens'][row]
    start = np.argmax(mask)
    assert bytes(int(t) - 3 for t in tokens[:start]).decode().endswith('=')
    assert mask.sum() == np.argmin(mask[start:]) <= 4
    assert not (tokens[start + mask.sum() :]).any()
    np.testing.assert_array_equal(
      batch['decoder_input_tokens'][row, 1 : start + mask.sum()], tokens[: start + mask.sum() - 1]
    )
    assert len(set(batch[losses.ADVANTAGES][row][mask > 0])) == 1
  assert metrics['completion_length'] == pytest.approx(batch['decoder_loss_weights'].sum() / 8)
  # Two prompts with four completions each, whose advantages have mean 0. A row has one advantage, and zeros.
  advantages = batch[losses.ADVANTAGES].max(1) + batch[losses.ADVANTAGES].min(1)
  np.testing.assert_allclose(advantages.reshape(2, 4).sum(1), 0, atol=1e-5)


@pytest.mark.slow
def test_an_answer_is_that_of_the_engine(text_file):
  """The engine reads prompts one by one and answers in slots; equal seeds give equal tokens."""
  run = load(text_file).build()
  settings = Sampling(temperature=0.9, top_k=20)
  prompts = [(0, 52, 46, 53, 64), (0, 60, 46, 53, 50, 64), (0, 52, 64)]
  seeds = np.arange(6, dtype=np.int32).reshape(3, 2)
  with Mesh().use(jax.devices()[:1]):
    program = make_program(run)
    params = jax.tree.map(lambda x: 3 * x, jax.jit(program.init)(jax.random.key(2))['params'])
    drawn = draw_answers(
      program.graphdef, params, prompts, seeds, settings, most=6, room=16, stops=[1, 90]
    )
    engine = Engine(program.graphdef, params, slots=2, room=16)
    requests = [
      Request(
        prompt=prompts[i // 2], max_tokens=6, stop_tokens=(1, 90),
        sampling=dataclasses.replace(settings, seed=i),
      )
      for i in range(6)
    ]  # fmt: skip
    for row, completion in enumerate(engine.run(requests)):
      n = drawn.mask[row].sum()
      assert drawn.tokens[row, :n].tolist() == completion.tokens
      assert drawn.stopped[row] == (completion.finish == 'stop_token')


@pytest.fixture(scope='module')
def whole(text_file, tmp_path_factory):
  """A folder with a base model and the `run` of `described`, which nothing interrupted."""
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    patch.setattr(jax, 'device_count', lambda: 1)
    make_base(text_file, folder)
    train(described(text_file, folder), folder / 'run')
  return folder


class PowerCut(Exception):
  """Ends a run without any clean-up of its own."""


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_the_same(text_file, whole, tmp_path, monkeypatch):
  """Cut off in the sampling of the second round, which samples the same again from the checkpoint."""
  draw = Sampler.__call__
  draws = []

  def fails(self, *arguments):
    draws.append(1)
    if len(draws) == 2:
      raise PowerCut
    return draw(self, *arguments)

  run = described(text_file, whole)
  monkeypatch.setattr(Sampler, '__call__', fails)
  with pytest.raises(PowerCut):
    train(run, tmp_path / 'run')
  train(run, tmp_path / 'run')
  assert len(draws) == 3  # of two rounds, the second twice
  undisturbed = saved(whole / 'run')
  for name, value in saved(tmp_path / 'run').items():
    np.testing.assert_array_equal(value, undisturbed[name], err_msg=name)
  names = ('reward', 'kl', 'kl_weight', 'loss', 'ratio')
  for row, expected in zip(rows_of(tmp_path / 'run'), rows_of(whole / 'run'), strict=True):
    assert [row[name] for name in names] == [expected[name] for name in names]


@pytest.mark.slow
def test_rows_say_reward_divergence_length_entropy_and_clipping(whole):
  rows = rows_of(whole / 'run')
  assert len(rows) == 8
  for row in rows:
    numbers = [
      'reward',
      'kl',
      'completion_length',
      'entropy',
      'clip_fraction',
      'ratio',
      'kl_weight',
    ]
    assert all(np.isfinite(row[name]) for name in numbers)
  assert rows[0]['kl'] == pytest.approx(0, abs=1e-4)  # the policy starts as its reference
  assert rows[0]['kl_weight'] == 0.05
  assert rows[4]['kl_weight'] < 0.05  # nearer than its target
  assert json.loads((whole / 'run' / 'run.json').read_text())['status'] == 'finished'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lottery(Reward):
  """Scores that follow from the seeds: in some groups all are equal."""

  def __call__(self, prompts, completions):
    pairs = zip(prompts, completions, strict=True)
    return np.array([float(c.tokens[0] % 2 == 0 and p.text < '5') for p, c in pairs])


def opened(text_file, **changes):
  run = load(text_file).build()
  run = dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))
  return run, run.train.open(run)


def draw_one_token(params, prompts, seeds):
  """A stand-in for a `Sampler`: completions of one token, which follows from the seed alone."""
  shape = seeds.size, 16
  integers = {name: np.ones(shape, np.int32) for name in ('tokens', 'real', 'mask')}
  floats = {name: np.zeros(shape, np.float32) for name in ('log_probs', 'entropy', 'kept')}
  completions = [Completion(tokens=[int(seed % 50)], finish='stop_token') for seed in seeds.flat]
  repeated = [prompt for prompt in prompts for _ in range(seeds.shape[1])]
  return Rows(repeated, completions, **integers, **floats)


def test_prompts_of_equal_scores_are_drawn_again(text_file):
  """DAPO's dynamic sampling: until the groups suffice, or `resample` times."""
  shares = []
  for resample in (1, 12):
    _, rounds = opened(text_file, reward=Lottery(), resample=resample)
    scores = np.concatenate([rounds.draw(draw_one_token, {})[1] for _ in range(10)])
    assert scores.shape == (20, 4)
    shares.append(np.mean(np.ptp(scores, axis=1) > 0))
    assert (rounds.asked > 20) == (resample > 1)
  assert shares[1] == 1 > shares[0]


def test_prompts_are_a_function_of_their_number_and_keep_the_held_out_apart():
  task = Arithmetic(digits=2)
  train_prompts = Problems(task=task, split='train', held_out=0.2)
  held_out_prompts = Problems(task=task, split='validation', held_out=0.2)

  def texts(prompts, seed):
    return [prompts.draw(seed, i).text for i in range(200)]

  assert texts(train_prompts, 3) == texts(train_prompts, 3)
  assert texts(train_prompts, 3) != texts(train_prompts, 4)
  assert not set(texts(train_prompts, 3)) & set(texts(held_out_prompts, 3))
  first = train_prompts.draw(0, 0)
  assert first.target.question == first.text


def test_prompts_of_a_file_come_once_a_pass(tmp_path):
  file = tmp_path / 'prompts.jsonl'
  file.write_text('\n'.join(json.dumps({'prompt': f'{i}+1=', 'answer': i + 1}) for i in range(5)))
  prompts = PromptLines(file=str(file), target='answer')
  epochs = [[prompts.draw(0, 5 * epoch + i).text for i in range(5)] for epoch in range(2)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == [f'{i}+1=' for i in range(5)]
  assert epochs[0] != epochs[1]
  assert prompts.draw(0, 0).target == int(prompts.draw(0, 0).text[0]) + 1
  file.write_text('{"question": "1+1="}')
  with pytest.raises(UserError, match=r'prompts\.jsonl:1'):
    PromptLines(file=str(file)).draw(0, 0)


@pytest.mark.parametrize(
  ('field', 'rollouts_changes', 'run_changes'),
  [
    ('group', {'group': 3}, {}),
    ('steps', {'updates': 3, 'group': 8}, {}),
    ('advantages', {'advantages': GAE()}, {}),
    ('curriculum', {}, {'curriculum': ((1, 8, 1),)}),
    ('loss', {}, {'loss': CrossEntropy()}),
    ('max_tokens', {'max_tokens': 16}, {}),
    ('penalty', {'penalty': KL()}, {}),
    ('group', {'group': 1}, {}),
  ],
)
def test_what_does_not_fit_is_named(text_file, field, rollouts_changes, run_changes):
  run = load(text_file).build()

  def open_changed():
    rollouts = dataclasses.replace(run.train, **rollouts_changes)
    rollouts.open(dataclasses.replace(run, train=rollouts, **run_changes))

  with pytest.raises(Invalid) as error:
    open_changed()
  assert error.value.field == field


def test_a_prompt_that_does_not_fit_and_a_reward_without_numbers_are_told(text_file):
  _, rounds = opened(text_file, reward=Silent())
  with pytest.raises(UserError, match='abstained on every completion'):
    rounds.draw(draw_one_token, {})
  sampler = rounds.sampler(None, rounds.settings)
  with pytest.raises(UserError, match='has 15 tokens'):
    sampler({}, [Prompt('x' * 15)], np.zeros((1, 4), np.int32))


def test_a_stop_of_several_tokens_is_told_at_once(text_file):
  with pytest.raises(Invalid, match='must be one'):
    opened(text_file, stop='two')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silent(Reward):
  """Abstains."""

  def __call__(self, prompts, completions):
    return np.full(len(completions), np.nan)


@pytest.mark.slow
def test_a_mesh_draws_and_learns_the_same(text_file, whole, tmp_path, monkeypatch):
  """On data x tensor the same tokens are sampled. The sums of an update round differently."""
  monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices()[:4])
  run = dataclasses.replace(described(text_file, whole), mesh=Mesh(data=2, tensor=2))
  train(run, tmp_path / 'run')
  first_rows = zip(rows_of(tmp_path / 'run')[:4], rows_of(whole / 'run')[:4], strict=True)
  for row, expected in first_rows:
    for name in ('reward', 'completion_length', 'stopped'):
      assert row[name] == expected[name]
    for name in ('loss', 'grad_norm', 'entropy', 'ratio'):
      assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('file', sorted(map(str, pathlib.Path('gin/reinforcement').glob('*.gin'))))
def test_the_file_of_a_method_suits_a_run(text_file, file):
  """After a run's own file: the rows have every array that its loss reads."""
  bindings = [f"FILES='{text_file}'", 'Run.checkpoint_every=4']
  config = configs.load(['tests/gin/reinforce.gin', file], bindings)
  run = config.build()
  run.loss.check(run, 384)
  features = run.train.open(run).features
  assert set(run.loss.reads) <= set(features)


@pytest.mark.slow
def test_ppo_learns_values(text_file, tmp_path):
  """With a reward that is always 1, in rounds of four updates, the values come nearer to 1."""
  files = ['tests/gin/reinforce.gin', 'gin/reinforcement/ppo.gin']
  bindings = [
    'Run.steps=16', 'Run.checkpoint_every=None', "reward.Format.pattern='.*'",
    'PPO.value_clip=None', 'GAE.trace=1.0',
  ]  # fmt: skip
  config = configs.load(files, [f"FILES='{text_file}'", *bindings])
  train(config.build(), tmp_path / 'run')
  rows = rows_of(tmp_path / 'run')
  assert all(row['reward'] == 1 for row in rows)
  # The values start at 0: half of (0 - 1)^2, times the weight of 0.1.
  assert rows[0]['value_loss'] == pytest.approx(0.05, rel=1e-4)
  assert rows[-1]['value_loss'] < 0.7 * rows[0]['value_loss']
