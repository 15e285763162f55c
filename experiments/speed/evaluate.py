"""Log-likelihood requests per second, ours and lm-eval's own backend (transformers on torch) in the same run.

    uv run --extra eval --group hf python experiments/speed/evaluate.py --hf=FOLDER

lm-eval's backend needs torch and accelerate (docs/contributing.md).
The folder is Hugging Face's: config.json, *.safetensors and a tokenizer. The requests are questions with four
choices after two solved ones, and then the same questions with one choice each, where no context is shared.
Both backends answer them in batches of the same size, once to warm up (to compile) and `--repeat` times to
measure; the fastest pass counts. The log-likelihoods of both are compared as well.
"""

import argparse
import functools
import json
import random
import time

import jax

from research.evaluation import generated_tasks, loading
from research.evaluation.lm_eval_model import make_model
from research.evaluation.suite import Suite, make_engine

LENGTH = 512  # the most tokens of a row, in both backends
WORDS = [
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
]


def make_requests(questions: int, choices: int) -> list:
  """lm-eval's requests of questions after two solved ones; about 110 words each."""
  from lm_eval.api.instance import Instance

  rng = random.Random(0)
  requests = []
  for _ in range(questions):
    shots = [' '.join(rng.choices(WORDS, k=30)) for _ in range(3)]
    context = '\n'.join(f'Question: {text}\nAnswer:' for text in shots)
    for _ in range(choices):
      continuation = ' ' + ' '.join(rng.choices(WORDS, k=rng.randint(1, 5)))
      requests.append(Instance('loglikelihood', {}, (context, continuation), 0))
  return requests


def best_rate(model, requests: list, repeat: int) -> tuple[float, list]:
  """(requests per second of the fastest pass, answers)."""
  answers = model.loglikelihood(requests, disable_tqdm=True)
  seconds = []
  for _ in range(repeat):
    start = time.perf_counter()
    model.loglikelihood(requests, disable_tqdm=True)
    seconds.append(time.perf_counter() - start)
  return len(requests) / min(seconds), answers


def compare(ours, reference, requests: list, repeat: int) -> dict:
  """The rates of both backends, and how far their log-likelihoods differ."""
  rate, answers = best_rate(ours, requests, repeat)
  reference_rate, expected = best_rate(reference, requests, repeat)
  pairs = zip(answers, expected, strict=True)
  differences = [abs(answer[0] / other[0] - 1) for answer, other in pairs]
  return {
    'requests': len(requests),
    'isoflop_per_second': round(rate, 3),
    'lm_eval_hf_per_second': round(reference_rate, 3),
    'ratio': round(rate / reference_rate, 3),
    'largest_relative_difference': round(max(differences), 7),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--hf', required=True, metavar='FOLDER')
  parser.add_argument('--questions', type=int, default=16)
  parser.add_argument('--batch_size', type=int, default=8)
  parser.add_argument('--repeat', type=int, default=2)
  flags = parser.parse_args()
  from lm_eval.models.huggingface import HFLM

  reference = HFLM(
    pretrained=flags.hf, batch_size=flags.batch_size, device='cpu', dtype='float32',
    max_length=LENGTH,
  )  # fmt: skip
  folder = loading.open_hf(flags.hf)
  # An engine takes its settings from a suite, whose tasks are not asked here.
  suite = Suite(
    tasks=(generated_tasks.Copying(),), batch_size=flags.batch_size, length=LENGTH, too_long='cut'
  )
  # One device, as torch uses one.
  with loading.mesh_for(folder.model).use(jax.devices()[:1]):
    model = loading.abstract_model(folder.model)
    read_params = functools.partial(loading.read_params, folder)
    engine, _ = make_engine(suite, model, read_params, None, folder.tokenizer)
    ours = make_model(engine)
    for choices in (4, 1):
      row = compare(ours, reference, make_requests(flags.questions, choices), flags.repeat)
      print(json.dumps({'choices': choices, **row}), flush=True)


if __name__ == '__main__':
  main()
