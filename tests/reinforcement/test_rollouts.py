"""Rollouts: their log-probabilities are the step's, and a round is made again to the bit."""

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
  """(program, parameters, first batch, what is said of it) of a run under the mesh in use."""
  run = config.build()
  program = make_program(run)
  params = jax.jit(program.init)(jax.random.key(1))['params']
  # Sharper than it starts, so that probabilities differ.
  params = jax.tree.map(lambda x: 3 * x, params)
  batch, told = next(run.train.open(run).batches(program, 0, lambda: params))
  return program, params, batch, told


@pytest.mark.parametrize('bindings', [(), ('PolicyGradient.temperature=0.7', 'Rollouts.top_p=0.8')])
def test_the_log_probabilities_of_a_rollout_are_the_steps(text_file, bindings):
  """To 1e-5; so the mean ratio of the first update is 1, with truncated sampling too."""
  with Mesh().use(jax.devices()[:1]):
    program, params, batch, told = first_round(load(text_file, *bindings))
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
    # What tokens are drawn from is this part of the policy; by its probabilities the ratio would be as much.
    assert 0.8 <= told['kept_probability'] < 0.97
  else:
    assert told['kept_probability'] == pytest.approx(1.0, abs=1e-5)
    p = np.exp(log_p)
    entropy = -(p * log_p).sum(-1)
    assert told['entropy'] == pytest.approx((entropy * mask).sum() / mask.sum(), rel=1e-4)


def test_the_rows_of_a_round(text_file):
  """A prompt, its completion up to a stop, and the loss on the completion alone."""
  with Mesh().use(jax.devices()[:1]):
    _, _, batch, told = first_round(load(text_file))
  for row in range(8):
    mask, tokens = batch['decoder_loss_weights'][row], batch['decoder_target_tokens'][row]
    start = np.argmax(mask)
    assert bytes(int(t) - 3 for t in tokens[:start]).decode().endswith('=')
    assert mask.sum() == np.argmin(mask[start:]) <= 4
    assert not (tokens[start + mask.sum() :]).any()
    np.testing.assert_array_equal(
      batch['decoder_input_tokens'][row, 1 : start + mask.sum()], tokens[: start + mask.sum() - 1]
    )
    assert len(set(batch[losses.ADVANTAGES][row][mask > 0])) == 1
  assert told['completion_length'] == pytest.approx(batch['decoder_loss_weights'].sum() / 8)
  # Two prompts, four completions of each side by side, whose advantages have mean 0.
  first = batch[losses.ADVANTAGES].max(1) + batch[losses.ADVANTAGES].min(1)
  np.testing.assert_allclose(first.reshape(2, 4).sum(1), 0, atol=1e-5)


@pytest.mark.slow
def test_an_answer_is_that_of_the_engine(text_file):
  """Which reads prompts alone and answers in slots: the same tokens by the same seeds."""
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
  """A folder with a base model, the `run` that nothing disturbed, and what that run is (`described`)."""
  folder = tmp_path_factory.mktemp('whole')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(jax, 'devices', lambda: jax.local_devices()[:1])
    patch.setattr(jax, 'device_count', lambda: 1)
    make_base(text_file, folder)
    train(described(text_file, folder), folder / 'run')
  return folder


class Stopped(Exception):
  """In place of a power cut."""


@pytest.mark.slow
def test_a_run_that_was_cut_off_ends_the_same(text_file, whole, tmp_path, monkeypatch):
  """In the second round's draw: what is drawn again from the checkpoint is the same to the bit."""
  draw, draws = Sampler.__call__, []

  def fails(self, *arguments):
    draws.append(1)
    if len(draws) == 2:
      raise Stopped
    return draw(self, *arguments)

  run = described(text_file, whole)
  monkeypatch.setattr(Sampler, '__call__', fails)
  with pytest.raises(Stopped):
    train(run, tmp_path / 'run')
  train(run, tmp_path / 'run')
  assert len(draws) == 3  # of two rounds, the second twice
  undisturbed = saved(whole / 'run')
  for name, value in saved(tmp_path / 'run').items():
    np.testing.assert_array_equal(value, undisturbed[name], err_msg=name)
  same = ('reward', 'kl', 'kl_weight', 'loss', 'ratio')
  for one, other in zip(rows_of(tmp_path / 'run'), rows_of(whole / 'run'), strict=True):
    assert [one[name] for name in same] == [other[name] for name in same]


@pytest.mark.slow
def test_rows_say_reward_divergence_length_entropy_and_clipping(whole):
  rows = rows_of(whole / 'run')
  assert len(rows) == 8
  for row in rows:
    for name in (
      'reward',
      'kl',
      'completion_length',
      'entropy',
      'clip_fraction',
      'ratio',
      'kl_weight',
    ):
      assert np.isfinite(row[name])
  assert rows[0]['kl'] == pytest.approx(0, abs=1e-4)  # the policy starts as its reference
  assert rows[0]['kl_weight'] == 0.05
  assert rows[4]['kl_weight'] < 0.05  # nearer than its target
  assert json.loads((whole / 'run' / 'run.json').read_text())['status'] == 'finished'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lottery(Reward):
  """Scores by chance: in some groups all are equal."""

  def __call__(self, prompts, completions):
    pairs = zip(prompts, completions, strict=True)
    return np.array([float(c.tokens[0] % 2 == 0 and p.text < '5') for p, c in pairs])


def opened(text_file, **changes):
  run = load(text_file).build()
  run = dataclasses.replace(run, train=dataclasses.replace(run.train, **changes))
  return run, run.train.open(run)


def draw_one_token(params, prompts, seeds):
  """In the place of a `Sampler`: completions of one token, which the seeds alone decide."""
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
  asked = {
    split: Problems(task=task, split=split, held_out=0.2) for split in ('train', 'validation')
  }
  texts = {split: [p.at(3, i).text for i in range(200)] for split, p in asked.items()}
  assert texts['train'] == [asked['train'].at(3, i).text for i in range(200)]
  assert texts['train'] != [asked['train'].at(4, i).text for i in range(200)]
  assert not set(texts['train']) & set(texts['validation'])
  assert asked['train'].at(0, 0).target.question == asked['train'].at(0, 0).text


def test_prompts_of_a_file_come_once_a_pass(tmp_path):
  file = tmp_path / 'prompts.jsonl'
  file.write_text('\n'.join(json.dumps({'prompt': f'{i}+1=', 'answer': i + 1}) for i in range(5)))
  prompts = PromptLines(file=str(file), target='answer')
  passes = [[prompts.at(0, 5 * epoch + i).text for i in range(5)] for epoch in range(2)]
  assert sorted(passes[0]) == sorted(passes[1]) == [f'{i}+1=' for i in range(5)]
  assert passes[0] != passes[1]
  assert prompts.at(0, 0).target == int(prompts.at(0, 0).text[0]) + 1
  file.write_text('{"question": "1+1="}')
  with pytest.raises(UserError, match=r'prompts\.jsonl:1'):
    PromptLines(file=str(file)).at(0, 0)


@pytest.mark.parametrize(
  ('field', 'changes', 'of_run'),
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
def test_what_does_not_fit_is_named(text_file, field, changes, of_run):
  def open_it(run):
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, **changes), **of_run)
    run.train.open(run)

  run = load(text_file).build()
  with pytest.raises(Invalid) as error:
    open_it(run)
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
  """On data x tensor the same tokens are drawn; what is learned differs by the rounding of other sums."""
  monkeypatch.setattr(jax, 'devices', lambda: jax.local_devices()[:4])
  run = dataclasses.replace(described(text_file, whole), mesh=Mesh(data=2, tensor=2))
  train(run, tmp_path / 'run')
  for one, other in zip(rows_of(tmp_path / 'run')[:4], rows_of(whole / 'run')[:4], strict=True):
    for name in ('reward', 'completion_length', 'stopped'):
      assert one[name] == other[name]
    for name in ('loss', 'grad_norm', 'entropy', 'ratio'):
      assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('file', sorted(map(str, pathlib.Path('gin/reinforcement').glob('*.gin'))))
def test_the_file_of_a_method_suits_a_run(text_file, file):
  """Beside a run's own file: its loss finds what it reads in the rows."""
  bindings = [f"FILES='{text_file}'", 'Run.checkpoint_every=4']
  config = configs.load(['tests/gin/reinforce.gin', file], bindings)
  run = config.build()
  run.loss.check(run, 384)
  features = run.train.open(run).features
  assert set(run.loss.reads) <= set(features)


@pytest.mark.slow
def test_ppo_learns_values(text_file, tmp_path):
  """Of a reward that is always 1, in rounds of four updates: what is expected comes nearer to it."""
  files = ['tests/gin/reinforce.gin', 'gin/reinforcement/ppo.gin']
  bindings = [
    'Run.steps=16', 'Run.checkpoint_every=None', "reward.Format.pattern='.*'",
    'PPO.value_clip=None', 'GAE.trace=1.0',
  ]  # fmt: skip
  config = configs.load(files, [f"FILES='{text_file}'", *bindings])
  train(config.build(), tmp_path / 'run')
  rows = rows_of(tmp_path / 'run')
  assert all(row['reward'] == 1 for row in rows)
  # Half of (0 - 1)^2 by the weight of .1: nothing is expected at first.
  assert rows[0]['value_loss'] == pytest.approx(0.05, rel=1e-4)
  assert rows[-1]['value_loss'] < 0.7 * rows[0]['value_loss']
