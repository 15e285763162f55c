"""Best-of-n keeps the completion with the highest reward, at the divergence that the formula gives."""

import dataclasses
import json
import sys

import numpy as np
import pytest

from research import generate
from research.core.errors import UserError
from research.inference import flags as flags_module
from research.inference.request import Completion
from research.reinforcement.best_of import choose
from research.reinforcement.reward import Reward
from research.scaling.laws.alignment import kl_of_best_of_n
from research.training import program
from tests.reinforcement.small import make_base


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Reward):
  """Scores a text by the number that it is; abstains on an empty one."""

  def __call__(self, prompts, completions):
    return np.array([float(completion.text or 'nan') for completion in completions])


def completions_of(*texts):
  return [Completion(text=text) for text in texts]


def test_the_highest_score_is_kept_and_abstentions_are_not():
  best, scores = choose('p', completions_of('1', '', '3', '3', '2'), reward=Table())
  assert (best.text, scores) == ('3', [1.0, None, 3.0, 3.0, 2.0])
  with pytest.raises(UserError, match='abstains on all 2'):
    choose('p', completions_of('', ''), reward=Table())


@pytest.mark.parametrize('n', [2, 4, 16])
def test_its_divergence_from_a_tabular_policy_is_the_formulas(n):
  """Exactly over 4,000 outcomes of one probability each, and by 20,000 draws over 40 of them, to 0.02 nats."""
  many = np.arange(1, 4001) / 4000
  best = many**n - (many - 1 / 4000) ** n
  exact = np.sum(best * np.log(best * 4000))
  assert exact == pytest.approx(kl_of_best_of_n(n), abs=2e-3)
  random = np.random.default_rng(0)
  outcomes = 40
  draws = 20_000
  texts = completions_of(*map(str, range(outcomes)))
  drawn = random.integers(0, outcomes, (draws, n))
  counts = np.zeros(outcomes)
  for row in drawn[:2000]:  # by the function itself
    counts[int(choose('p', [texts[i] for i in row], reward=Table())[0].text)] += 1
  for value in drawn[2000:].max(1):
    counts[value] += 1
  share = counts / draws
  levels = np.arange(1, outcomes + 1)[share > 0] / outcomes
  share = share[share > 0]
  expected = levels**n - (levels - 1 / outcomes) ** n
  divergence = np.sum(share * np.log(share * outcomes))
  assert divergence == pytest.approx(np.sum(expected * np.log(expected * outcomes)), abs=0.02)
  # The formula is for scores that are never equal, and an upper bound for others.
  assert divergence <= kl_of_best_of_n(n) + 0.02


REWARD = """from __gin__ import dynamic_registration
from research.reinforcement import reward
REWARD = @reward.Format
reward.Format.pattern = '[ -~].*'
"""


@pytest.mark.slow
def test_the_command_keeps_the_best(text_file, tmp_path, monkeypatch, capsys, one_device):
  monkeypatch.setattr(program, 'keep_compiled', lambda: None)
  make_base(text_file, tmp_path)
  (tmp_path / 'reward.gin').write_text(REWARD)
  prompts, out = tmp_path / 'prompts.jsonl', tmp_path / 'answers.jsonl'
  prompts.write_text('"the law"\n"this run"\n')

  def run(*flags):
    fixed = [f'--checkpoint={tmp_path}/base', '--max_tokens=4', '--room=32', '--temperature=20']
    monkeypatch.setattr(sys, 'argv', ['generate', *fixed, *flags])
    generate.main(flags_module.parse(generate.__doc__))
    return capsys.readouterr().out

  of_64 = ('--best_of=64', f'--reward={tmp_path}/reward.gin')
  run(*of_64, f'--prompts={prompts}', f'--out={out}')
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert len(rows) == 2
  for row in rows:
    assert len(row['scores']) == 64
    assert len(row['texts']) == 1
    # At this temperature a quarter of all completions begins with a printable character.
    assert max(row['scores']) == 1.0
    assert ' ' <= row['texts'][0][0] <= '~'
  first = next(row['texts'][0] for row in rows if row['prompt'] == 'the law')
  assert run(*of_64, '--prompt=the law').rstrip('\n') == first.rstrip('\n')
  for clash in (('--best_of=4',), (*of_64, '--samples=2'), (*of_64, '--temperature=0')):
    with pytest.raises(SystemExit):
      run('--prompt=the law', *clash)
