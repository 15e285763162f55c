"""A server of four devices, two copies of a model that is split in two, answers as a server of one does."""

import concurrent.futures

import numpy as np
import openai
import pytest

from research.parallel.mesh import Mesh
from tests.serving import tiny

PROMPTS = ['abc', 'a', 'Some longer text. ' * 20, 'abcd', '0', 'Some longer text. ' * 20 + 'More.']


def answers(url: str) -> dict[str, list]:
  """Greedy completions that are asked for at once, a drawn one, scores of a text, an embedding."""
  with openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client:

    def complete(prompt, **settings):
      settings = {'model': 'tiny', 'max_tokens': 12, 'temperature': 0, **settings}
      return client.completions.create(prompt=prompt, **settings).choices[0]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      texts = [answer.text for answer in pool.map(complete, PROMPTS * 2)]
    texts.append(complete('abc', temperature=1.0, top_p=0.9, seed=5).text)
    scored = complete(PROMPTS[2], max_tokens=0, echo=True, logprobs=2).logprobs.token_logprobs
    embedding = client.embeddings.create(model='tiny', input='abc').data[0].embedding
  return {'texts': texts, 'scores': scored[1:], 'embedding': embedding}


@pytest.mark.slow
def test_four_devices_answer_as_one(llama, url):
  # The 259 tokens of this model are odd.
  mesh = Mesh(data=2, tensor=2, rules={'vocab': None})
  with tiny.serving(llama, room=640, slots=4, mesh=mesh, devices=4) as of_four:
    found = answers(of_four)
  wanted = answers(url)
  assert found['texts'] == wanted['texts']
  assert len(set(wanted['texts'])) >= len(PROMPTS)
  np.testing.assert_allclose(found['scores'], wanted['scores'], atol=1e-4)
  np.testing.assert_allclose(found['embedding'], wanted['embedding'], atol=1e-5)
