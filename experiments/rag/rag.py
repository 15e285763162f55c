"""Answers questions from this project's documents through the endpoint; see README.md beside this file."""

import argparse
import pathlib
import re
import sys

import numpy as np
import openai

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SHORTEST, LONGEST = 80, 1500  # characters of a passage
RECALL_AT = (3, 10)
ASK = (
  'Answer the question from the passages alone. Name the passages that you use as [1], [2]. If they do not '
  'say it, say so.'
)


class Passage:
  """A section of a page."""

  def __init__(self, page: str, heading: str, text: str):
    self.page = page
    self.heading = heading
    self.text = text

  @property
  def place(self) -> str:
    return f'{self.page}, "{self.heading}"'


def read_passages(folder: pathlib.Path) -> list[Passage]:
  """The sections of all Markdown files, without very short ones."""
  passages = []
  for path in sorted(folder.glob('*.md')):
    parts = re.split(r'^#+ (.+)$', path.read_text(), flags=re.MULTILINE)
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
      if len(text.strip()) >= SHORTEST:
        passages.append(Passage(path.name, heading.strip('` '), text.strip()[:LONGEST]))
  return passages


class Store:
  """Passages that are retrieved by their embeddings (FAISS, inner product) or by their words (BM25).

  Args:
    client, model: what embeds; None to find by words.
    embedded: so many characters of a passage are embedded, its first.
  """

  def __init__(
    self,
    passages: list[Passage],
    client: openai.OpenAI | None,
    model: str = '',
    embedded: int = LONGEST,
  ):
    self.passages, self.client, self.model = passages, client, model
    if client:
      import faiss

      vectors = self.embed([passage.text[:embedded] for passage in passages])
      self.index = faiss.IndexFlatIP(vectors.shape[1])
      self.index.add(vectors)
    else:
      import bm25s

      self.index = bm25s.BM25()
      words = bm25s.tokenize([passage.text for passage in passages], show_progress=False)
      self.index.index(words, show_progress=False)

  def embed(self, texts: list[str]) -> np.ndarray:
    """[texts, embed], float32, of length 1."""
    data = self.client.embeddings.create(model=self.model, input=texts).data
    return np.array([item.embedding for item in data], np.float32)

  def scores(self, question: str) -> np.ndarray:
    """[passages], higher is better."""
    count = len(self.passages)
    if self.client:
      values, indices = self.index.search(self.embed([question]), count)
      scores = np.empty(count, np.float32)
      scores[indices[0]] = values[0]
      return scores
    import bm25s

    words = bm25s.tokenize(question, return_ids=False, show_progress=False)
    return np.asarray(self.index.get_scores(words[0])) if words[0] else np.zeros(count)

  def best(self, question: str, count: int) -> list[Passage]:
    order = np.argsort(-self.scores(question), kind='stable')
    return [self.passages[i] for i in order[:count]]


def evaluate(store: Store) -> dict[str, float]:
  """The means of the measures of `research.evaluation.retrieval_tasks` over all headings, and recall at k.

  One passage is right, so recall at k is how often it is among the first k.
  """
  from research.evaluation.retrieval_tasks import rank_measures

  rows = []
  for number, passage in enumerate(store.passages):
    row = rank_measures(store.scores(passage.heading), number)
    recall = {f'recall@{k}': float(row['mrr'] >= 1 / k) for k in RECALL_AT}
    rows.append(row | recall)
  return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def answer(client: openai.OpenAI, model: str, store: Store, question: str, count: int) -> str:
  """The answer, the passages that it cites, and the citations of passages that it did not get."""
  passages = store.best(question, count)
  context = '\n\n'.join(f'[{i}] ({p.place})\n{p.text}' for i, p in enumerate(passages, 1))
  turns = [
    {'role': 'system', 'content': ASK},
    {'role': 'user', 'content': f'{context}\n\nQuestion: {question}'},
  ]
  response = client.chat.completions.create(
    model=model, messages=turns, temperature=0, max_tokens=200
  )
  text = response.choices[0].message.content
  cited = sorted({int(number) for number in re.findall(r'\[(\d+)\]', text)})
  lines = [text, '']
  lines += [
    f'[{i}] {p.place}' + ('' if i in cited else ' (not cited)') for i, p in enumerate(passages, 1)
  ]
  lines += [
    f'[{number}] is no passage: a wrong citation' for number in cited if number > len(passages)
  ]
  return '\n'.join(lines)


def client_of(url: str) -> tuple[openai.OpenAI, str]:
  """(a client of a server, the name of its model)."""
  client = openai.OpenAI(base_url=url, api_key='none', timeout=600)
  return client, client.models.list().data[0].id


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--url', default='http://127.0.0.1:8000/v1', help='the endpoint')
  parser.add_argument('--embedder', metavar='URL', help='another endpoint for the embeddings')
  parser.add_argument(
    '--embedded',
    type=int,
    default=LONGEST,
    metavar='N',
    help='characters of a passage that are embedded',
  )
  parser.add_argument('--passages', type=int, default=3, help='shown to the model')
  parser.add_argument('--words', action='store_true', help='find passages by BM25')
  parser.add_argument('--ask', metavar='QUESTION')
  parser.add_argument('--evaluate', action='store_true')
  flags = parser.parse_args()
  passages = read_passages(ROOT / 'docs')
  client, model = client_of(flags.url)
  embedder, embedding_model = client_of(flags.embedder) if flags.embedder else (client, model)
  if flags.evaluate:
    stores = {
      'words (BM25)': Store(passages, None),
      embedding_model: Store(passages, embedder, embedding_model, flags.embedded),
    }
    print(f'{len(passages)} passages, each asked for by its heading')
    for name, store in stores.items():
      row = '  '.join(f'{key} {value:.3f}' for key, value in evaluate(store).items())
      print(f'{name}: {row}')
  if flags.ask:
    finder = None if flags.words else embedder
    store = Store(passages, finder, embedding_model, flags.embedded)
    print(answer(client, model, store, flags.ask, flags.passages))


if __name__ == '__main__':
  main()
