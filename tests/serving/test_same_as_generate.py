"""Greedy answers of the endpoint are those of research.generate, token for token, alone and in a full batch.

Where no prompt goes on from another, every bit of the log-probabilities is the same too.
"""

import concurrent.futures
import json

import jax
import numpy as np
import openai
import pytest

from research.evaluation.generators import load
from research.parallel.mesh import Mesh
from tests.serving import tiny

PROMPTS = [
  'w5 w9 w7',
  'w1',
  ' '.join(f'w{i}' for i in range(3, 60)),
  'w8 w8',
  'w30 w4 w17 w2',
  'w50',
]
MORE = 12


def answers(url, prompts, together) -> list[tuple[str, list[float]]]:
  """The text of each answer, and the log-probabilities of its tokens."""
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:

    def ask(prompt):
      knobs = {'model': 'tiny', 'max_tokens': MORE, 'temperature': 0, 'logprobs': 0}
      answer = client.completions.create(prompt=prompt, **knobs).choices[0]
      return answer.text, answer.logprobs.token_logprobs

    if not together:
      return [ask(prompt) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
      return list(pool.map(ask, prompts))


def check(url, folder, prompts, tolerance=0.0, **sizes) -> None:
  """Compares a server of a folder with what the command gives, of the same room and slots.

  Args:
    tolerance: of the log-probabilities, absolute; 0 wants every bit.
  """
  with Mesh().use(jax.local_devices()[:1]):
    generator = load(hf=str(folder), **sizes)
    alone = [generator([prompt], max_tokens=MORE)[0] for prompt in prompts]
  expected = [(one.text, one.logprobs) for one in alone]
  assert len({text for text, _ in expected}) > 2
  # More than there are slots, so that they come and go, and each prompt is begun by an earlier one.
  for several, together in ((prompts, False), (prompts * 3, True)):
    found = answers(url, several, together)
    for (text, logprobs), (want, want_logprobs) in zip(
      found, expected * (len(several) // len(prompts)), strict=True
    ):
      assert text == want
      # The token that ends a text is no part of what the endpoint tells.
      assert len(want_logprobs) - len(logprobs) in (0, 1)
      assert np.abs(np.subtract(logprobs, want_logprobs[: len(logprobs)])).max() <= tolerance


DECODER_PROMPTS = ['abc', 'a', 'Some longer text. ' * 6, 'abcd', '0']


def test_a_decoder(url, llama):
  # A prompt that goes on from one that was kept is read in other pieces.
  check(url, llama, DECODER_PROMPTS, tolerance=1e-5, room=640, slots=4)


@pytest.mark.slow
def test_company_changes_no_bit(llama):
  prompts = [*DECODER_PROMPTS, 'Some longer text. ' * 25]  # more than one piece of 256 tokens
  with tiny.serving(llama, room=640, slots=4, kept=0) as url:
    check(url, llama, prompts, room=640, slots=4)


@pytest.mark.slow
@pytest.mark.parametrize('family', ['t5-1.1', 'mamba'])
def test_an_encoder_decoder_and_a_recurrence(family, tmp_path):
  pytest.importorskip('torch')
  tokenizers = pytest.importorskip('tokenizers')
  from tests.huggingface import test_parity as parity

  parity._reference(family).save_pretrained(tmp_path)
  words = {f'w{i}': i for i in range(parity.VOCAB)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  config = tmp_path / 'config.json'
  # An end that is never likely would end texts before they differ.
  config.write_text(json.dumps(json.loads(config.read_text()) | {'eos_token_id': 95}))
  with tiny.serving(tmp_path, room=96, slots=4, kept=0) as url:
    check(url, tmp_path, PROMPTS, room=96, slots=4)
