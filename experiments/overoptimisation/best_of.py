"""Best-of-n against a proxy: completions are drawn and judged by gold once; each proxy then scores them.

python best_of.py sample --base=DIR --prompts=FILE --out=FILE --count=16 --samples=1024
python best_of.py score --proxy=DIR --samples=FILE --out=FILE
"""

import argparse
import json
import pathlib

import gold
import jax
import numpy as np
from flax import nnx

from research.checkpoints.pretrained import Pretrained
from research.core import storage
from research.data.encoding import make_encoding
from research.evaluation import loading
from research.inference.request import Completion
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from research.reinforcement.prompts import Prompt, PromptLines
from research.reinforcement.reward_model import RewardModel
from research.reinforcement.rounds import seeds_of
from research.reinforcement.sampler import Sampler
from research.scaling.laws.alignment import kl_of_best_of_n


def sample(flags) -> dict:
  """{prompt, texts, finishes, gold} for each prompt."""
  base = Pretrained(folder=flags.base)
  encoding = make_encoding(loading.vocabulary_of(loading.open_folder(flags.base).run))
  source = PromptLines(file=flags.prompts)
  groups = []
  with Mesh().use(jax.devices()[:1]):
    graphdef = nnx.graphdef(base.abstract)
    sampler = Sampler(graphdef, encoding, Sampling(temperature=1.0), 32, 25, [encoding.end])
    params = base.params()
    for number in range(flags.count):
      prompt = source.draw(2, number)
      completions = sampler(
        params, [prompt], seeds_of(2, np.array([number]), flags.samples)
      ).completions
      groups.append({
        'prompt': prompt.text,
        'texts': [completion.text for completion in completions],
        'finishes': [completion.finish for completion in completions],
        'gold': [gold.gold(completion.text) for completion in completions],
      })  # fmt: skip
  return groups


def best_of_n(scores: np.ndarray, values: np.ndarray, n: int) -> float:
  """The expected value of the completion with the highest score of n, drawn without replacement.

  The one of rank i from below (1 is the lowest) of m is the highest with probability C(i - 1, n - 1) / C(m, n).
  """
  order = np.argsort(scores, kind='stable')
  m = len(order)
  # P(highest rank is m) is n / m; each lower one is (i - n + 1) / i of the one above it.
  weights = np.zeros(m)
  weight = n / m
  for rank in range(m, n - 1, -1):
    weights[rank - 1] = weight
    weight *= (rank - n) / (rank - 1) if rank > 1 else 0.0
  return float(weights @ values[order])


def score(flags) -> dict:
  """The gold and proxy reward of best-of-n for each n; the proxy's deviation, and correlation with gold."""
  groups = json.loads(pathlib.Path(flags.samples).read_text())
  reward = RewardModel(model=Pretrained(folder=flags.proxy), longest=128)
  scores = []
  for group in groups:
    pieces = zip(group['texts'], group['finishes'], strict=True)
    completions = [Completion(text=text, finish=finish) for text, finish in pieces]
    scores.append(reward([Prompt(group['prompt'])] * len(completions), completions))
  golds = [np.array(group['gold']) for group in groups]
  rows = []
  n = 1
  while n <= len(golds[0]):
    pairs = list(zip(scores, golds, strict=True))
    rows.append({
      'n': n,
      'kl': float(kl_of_best_of_n(n)),
      'gold': float(np.mean([best_of_n(s, g, n) for s, g in pairs])),
      'proxy': float(np.mean([best_of_n(s, s, n) for s, _ in pairs])),
    })  # fmt: skip
    n *= 2
  deviation = float(np.std(np.concatenate(scores)))
  correlation = float(np.corrcoef(np.concatenate(scores), np.concatenate(golds))[0, 1])
  return {'rows': rows, 'deviation': deviation, 'correlation': correlation}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('what', choices=('sample', 'score'))
  for flag in ('base', 'prompts', 'proxy', 'samples', 'out'):
    parser.add_argument(f'--{flag}')
  parser.add_argument('--count', type=int)
  flags = parser.parse_args()
  if flags.what == 'sample':
    flags.samples = int(flags.samples)
    result = sample(flags)
  else:
    result = score(flags)
  storage.write_atomic(pathlib.Path(flags.out), json.dumps(result))


if __name__ == '__main__':
  main()
