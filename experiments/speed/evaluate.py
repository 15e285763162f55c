"""Log-likelihood requests per second, beside lm-eval's own backend (transformers on torch) in the same run.

    uv run --extra eval --group hf python experiments/speed/evaluate.py --hf=FOLDER

The folder is Hugging Face's: config.json, *.safetensors and a tokenizer. The requests are questions with four
choices after two solved ones, and the same questions with one choice alone, where nothing can be shared. Both
answer them in batches of the same size, once to warm up (to compile) and `--repeat` times to measure; the best
counts. The log-likelihoods of both are compared as well.
"""

import argparse
import json
import random
import time

import jax

from research.evaluation import loading
from research.evaluation.lm_eval_model import make_model
from research.evaluation.suite import Suite, make_engine
from research.evaluation.task import Item, Task

WORDS = (
  'the',
  'law',
  'of',
  'loss',
  'falls',
  'with',
  'compute',
  'and',
  'data',
  'in',
  'every',
  'run',
)


class Nothing(Task):
  """A suite must have a task; this benchmark asks by itself."""

  name = 'nothing'

  def items(self) -> list[Item]:
    return []

  def measure(self, item, answers):
    return {}


def make_requests(questions: int, choices: int) -> list:
  """lm-eval's requests of questions after two solved ones; about 110 words each."""
  from lm_eval.api.instance import Instance

  chance = random.Random(0)
  requests = []
  for _ in range(questions):
    shots = [' '.join(chance.choices(WORDS, k=30)) for _ in range(3)]
    context = '\n'.join(f'Question: {text}\nAnswer:' for text in shots)
    for _ in range(choices):
      arguments = context, ' ' + ' '.join(chance.choices(WORDS, k=chance.randint(1, 5)))
      requests.append(Instance('loglikelihood', {}, arguments, 0))
  return requests


def best_rate(model, requests: list, repeat: int) -> tuple[float, list]:
  """(requests per second, answers)."""
  answers = model.loglikelihood(requests, disable_tqdm=True)
  seconds = []
  for _ in range(repeat):
    began = time.perf_counter()
    model.loglikelihood(requests, disable_tqdm=True)
    seconds.append(time.perf_counter() - began)
  return len(requests) / min(seconds), answers


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--hf', required=True, metavar='FOLDER')
  parser.add_argument('--questions', type=int, default=16)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--repeat', type=int, default=2)
  flags = parser.parse_args()
  from lm_eval.models.huggingface import HFLM

  theirs = HFLM(
    pretrained=flags.hf, batch_size=flags.batch_size, device='cpu', dtype='float32', max_length=512
  )
  folder = loading.open_hf(flags.hf)
  suite = Suite(tasks=(Nothing(),), batch_size=flags.batch_size, length=512, too_long='cut')
  with loading.mesh_for(folder.model).use(jax.devices()[:1]):
    abstract = loading.abstract_model(folder.model)
    engine, _ = make_engine(
      suite, abstract, lambda: loading.read_params(folder), None, folder.tokenizer
    )
    ours = make_model(engine)
    for choices in (4, 1):
      requests = make_requests(flags.questions, choices)
      rate, answers = best_rate(ours, requests, flags.repeat)
      other, expected = best_rate(theirs, requests, flags.repeat)
      worst = max(abs(a[0] / b[0] - 1) for a, b in zip(answers, expected, strict=True))
      row = {
        'choices': choices, 'requests': len(requests), 'isoflop_per_second': rate,
        'lm_eval_hf_per_second': other, 'ratio': rate / other, 'largest_relative_difference': worst,
      }  # fmt: skip
      print(json.dumps({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == '__main__':
  main()
