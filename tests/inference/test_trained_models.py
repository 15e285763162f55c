"""With weights that somebody trained: the greedy tokens are those of transformers."""

import jax
import pytest

from research.generate import load
from research.parallel.mesh import Mesh
from tests import trained

MORE = 100  # tokens
PROMPTS = (
  'The capital of France is', 'def fibonacci(n):', 'Once upon a time', 'Water boils at',
  'Dear Sir or Madam,', '1, 2, 3, 5, 8,', 'The theory of relativity says that', 'import numpy as np\n',
  'In the year 2889', 'Roses are red,',
)  # fmt: skip


@pytest.mark.slow
def test_a_hundred_greedy_tokens_of_ten_prompts_are_those_of_transformers():
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  folder = trained.smollm2()
  reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  with Mesh().use(jax.local_devices()[:1]):
    generator = load(hf=str(folder), room=160, slots=len(PROMPTS))
    answers = generator(PROMPTS, max_tokens=MORE, stop_tokens=())
    prompts = [generator.request(prompt).prompt for prompt in PROMPTS]
  for prompt, answer in zip(prompts, answers, strict=True):
    assert len(answer.tokens) == MORE
    # Each token is the likeliest after those before it, by one forward pass of transformers. So all of them are
    # its greedy tokens, which take a hundred passes to generate.
    with torch.inference_mode():
      logits = reference(torch.tensor([[*prompt, *answer.tokens]])).logits[0]
    assert answer.tokens == logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist()
