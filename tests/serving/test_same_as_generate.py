"""Greedy answers of the endpoint are those of research.generate, token for token, alone and in a full batch."""

import concurrent.futures
import json

import jax
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


def answers(url, prompts, together) -> list[list[str]]:
  """The tokens of each answer."""
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:

    def ask(prompt):
      return (
        client.completions.create(model='tiny', prompt=prompt, max_tokens=MORE, temperature=0)
        .choices[0]
        .text
      )

    if not together:
      return [ask(prompt) for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
      return list(pool.map(ask, prompts))


def check(url, folder, prompts, **sizes) -> None:
  """Compares a server of a folder with what the command gives, of the same room and slots."""
  with Mesh().use(jax.local_devices()[:1]):
    generator = load(hf=str(folder), **sizes)
    expected = [generator([prompt], max_tokens=MORE)[0].text for prompt in prompts]
  assert len(set(expected)) > 2
  assert answers(url, prompts, together=False) == expected
  # More than there are slots, so that they come and go, and each prompt is begun by an earlier one.
  several = prompts * 3
  assert answers(url, several, together=True) == expected * 3


def test_a_decoder(url, llama):
  prompts = ['abc', 'a', 'Some longer text. ' * 6, 'abcd', '0']
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
  with tiny.serving(tmp_path, room=96, slots=4) as url:
    check(url, tmp_path, PROMPTS, room=96, slots=4)
