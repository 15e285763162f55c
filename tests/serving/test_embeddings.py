"""Embeddings are the mean of transformers' last hidden states; an encoder gives them and nothing else."""

import numpy as np
import openai
import pytest

from tests.serving import tiny

TEXTS = ['w5 w9 w7', 'w1', ' '.join(f'w{i}' for i in range(3, 40))]


@pytest.mark.slow
@pytest.mark.parametrize('family', ['llama', 'bert'])
def test_as_transformers(family, tmp_path):
  torch = pytest.importorskip('torch')
  tokenizers = pytest.importorskip('tokenizers')
  from tests.huggingface import test_parity as parity

  reference = parity._reference(family)
  reference.save_pretrained(tmp_path)
  words = {f'w{i}': i for i in range(parity.VOCAB)} | {'[end]': parity.VOCAB - 1}
  del words[f'w{parity.VOCAB - 1}']
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(tmp_path / 'tokenizer.json'))
  (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "[end]"}')
  with (
    tiny.serving(tmp_path, room=64) as url,
    openai.OpenAI(base_url=f'{url}/v1', api_key='none', max_retries=0) as client,
  ):
    found = client.embeddings.create(model='tiny', input=TEXTS).data
    if family == 'bert':
      with pytest.raises(openai.BadRequestError, match='sees both ways'):
        client.completions.create(model='tiny', prompt='w1')
      assert not client.models.list().data[0].can['completions']
  for text, one in zip(TEXTS, found, strict=True):
    ids = torch.tensor([tokenizer.encode(text).ids])
    with torch.no_grad():
      hidden = reference.base_model(ids).last_hidden_state[0].numpy().astype(np.float64).mean(0)
    np.testing.assert_allclose(one.embedding, hidden / np.linalg.norm(hidden), atol=1e-5)
