"""Measures how far an answer depends on its company in the batch, on --slots and on prompts in the cache.

    python experiments/speed/invariance.py                     # a random LLaMA, T5 and Mamba
    python experiments/speed/invariance.py --hf=FOLDER         # a model of yours

The reference is greedy answers that are asked for one at a time. Each line changes one thing: it says how many
answers have the same tokens, and the largest difference of a log-probability before the first other token.
"""

import argparse
import pathlib
import sys
import tempfile

import jax
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'experiments' / 'speed')]

from serve import TEXT, write_tokenizer  # noqa: E402

from research.parallel.mesh import Mesh  # noqa: E402
from research.serving.served_model import open_served  # noqa: E402

LENGTHS = (
  3,
  10,
  40,
  90,
  200,
  300,
  420,
)  # characters of the prompts, which is tokens of the random models


def write_models(folder: pathlib.Path) -> list[pathlib.Path]:
  """Writes a random decoder, encoder-decoder and recurrence with a tokenizer of bytes."""
  import transformers

  shared = {
    'vocab_size': 257, 'tie_word_embeddings': True, 'bos_token_id': None, 'eos_token_id': 0, 'pad_token_id': 0,
  }  # fmt: skip
  llama = transformers.LlamaConfig(
    **shared, hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.2,
  )  # fmt: skip
  t5 = transformers.T5Config(
    **shared, d_model=256, d_ff=688, d_kv=32, num_layers=4, num_heads=8, decoder_start_token_id=0,
    initializer_factor=4.0,
  )  # fmt: skip
  mamba = transformers.MambaConfig(
    **shared, hidden_size=256, num_hidden_layers=4, initializer_range=0.5
  )
  kinds = {
    'llama': (transformers.LlamaForCausalLM, llama),
    't5': (transformers.T5ForConditionalGeneration, t5),
    'mamba': (transformers.MambaForCausalLM, mamba),
  }
  for name, (kind, config) in kinds.items():
    transformers.set_seed(0)
    kind(config).save_pretrained(folder / name)
    write_tokenizer(folder / name)
  return [folder / name for name in kinds]


def measure(folder: pathlib.Path, slots: int, max_tokens: int) -> None:
  """Prints the lines of one model."""
  prompts = [TEXT[500 * i : 500 * i + length] for i, length in enumerate(LENGTHS)]
  knobs = {'room': 640, 'slots': slots, 'kept': 0}

  def answers(prompts: list[str], together: bool = False, before=(), **changed) -> list:
    generator = open_served(None, str(folder), **{**knobs, **changed}).generator
    requests = [
      generator.request(prompt, max_tokens=max_tokens, stop_tokens=())
      for prompt in [*before, *prompts]
    ]
    if together:
      return generator.engine.run(requests)[len(before) :]
    return [generator.engine.run([request])[0] for request in requests][len(before) :]

  alone = answers(prompts)
  beginnings = [prompt[: len(prompt) // 2] for prompt in prompts]
  lines = {
    f'in the company of {3 * len(prompts)}': answers(prompts * 3, together=True),
    'again, one at a time': answers(prompts),
    'with 1 slot': answers(prompts, slots=1),
    f'with {2 * slots} slots': answers(prompts, slots=2 * slots),
    'after the first half of each prompt': answers(prompts, before=beginnings, kept=len(prompts)),
  }
  for name, found in lines.items():
    equal = [one.tokens == other.tokens for one, other in zip(found, alone * 3, strict=False)]
    largest = max(map(difference, found, alone * 3))
    print(
      f'{folder.name}, {name}: {sum(equal)} of {len(equal)} the same, {largest:.1e}', flush=True
    )


def difference(found, wanted) -> float:
  """Returns the largest difference of log-probabilities before the first token that differs."""
  pairs = zip(found.tokens, wanted.tokens, strict=False)
  same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(wanted.tokens))
  apart = np.abs(np.subtract(found.logprobs[:same], wanted.logprobs[:same]))
  return float(max(apart, default=0.0))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--hf', type=pathlib.Path, metavar='FOLDER', help='default: random models')
  parser.add_argument('--slots', type=int, default=8)
  parser.add_argument('--max_tokens', type=int, default=32)
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary, Mesh().use(jax.devices()[:1]):
    for folder in [flags.hf] if flags.hf else write_models(pathlib.Path(temporary)):
      measure(folder, flags.slots, flags.max_tokens)


if __name__ == '__main__':
  main()
