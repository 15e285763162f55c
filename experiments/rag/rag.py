"""Answers questions from this project's documents through the endpoint; see README.md beside this file."""

import argparse
import pathlib
import re
import sys

import numpy as np
import openai

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

SHORTEST = 80  # characters of a passage; a shorter section says too little
LONGEST = 1500  # characters of a passage, so that a few of them fit into a prompt
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
  """Returns the sections of all Markdown files of a folder, without the shortest ones."""
  passages = []
  for path in sorted(folder.glob('*.md')):
    for heading, text in sections(path.read_text()):
      if len(text) >= SHORTEST:
        passages.append(Passage(path.name, heading, text[:LONGEST]))
  return passages


def sections(page: str) -> list[tuple[str, str]]:
  """Returns the (heading, text) of each section of a Markdown page."""
  parts: list[tuple[str, list[str]]] = []
  in_code = False
  for line in page.splitlines():
    if line.startswith('```'):
      in_code = not in_code
    # A comment in a shell's code looks like a heading.
    if re.match('#+ ', line) and not in_code:
      parts.append((line.strip('#` '), []))
    elif parts:
      parts[-1][1].append(line)
  return [(heading, '\n'.join(lines).strip()) for heading, lines in parts]


class Store:
  """Finds passages by their embeddings (FAISS, inner product) or by their words (BM25).

  Args:
    passages: the passages.
    client: the endpoint that embeds; None to compare words.
    model: the name of its model.
    embedded: how many characters of a passage are embedded, from its beginning.
  """

  def __init__(
    self,
    passages: list[Passage],
    client: openai.OpenAI | None,
    model: str = '',
    embedded: int = LONGEST,
  ):
    self.passages = passages
    self.client = client
    self.model = model
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
    """Returns the embeddings of texts, float32 [texts, embed], each of length 1."""
    data = self.client.embeddings.create(model=self.model, input=texts).data
    return np.array([result.embedding for result in data], np.float32)

  def scores(self, question: str) -> np.ndarray:
    """Returns how well each passage fits a question, [passages]; higher is better."""
    count = len(self.passages)
    if self.client:
      values, places = self.index.search(self.embed([question]), count)
      scores = np.empty(count, np.float32)
      scores[places[0]] = values[0]
      return scores
    import bm25s

    words = bm25s.tokenize(question, return_ids=False, show_progress=False)
    # A question of stop words alone has no words left.
    return np.asarray(self.index.get_scores(words[0])) if words[0] else np.zeros(count)

  def best(self, question: str, count: int) -> list[Passage]:
    """Returns the passages that fit a question best."""
    order = np.argsort(-self.scores(question), kind='stable')
    return [self.passages[i] for i in order[:count]]


def evaluate(store: Store) -> dict[str, float]:
  """Returns the means over all headings of recall and of the measures of `evaluation.retrieval_tasks`.

  Each heading is a question whose only relevant passage is its own. So recall at k is how often that passage is
  among the first k.
  """
  from research.evaluation.retrieval_tasks import rank_measures

  rows = []
  for number, passage in enumerate(store.passages):
    row = rank_measures(store.scores(passage.heading), number)
    recall = {f'recall@{k}': float(row['mrr'] >= 1 / k) for k in RECALL_AT}
    rows.append(row | recall)
  return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def answer(client: openai.OpenAI, model: str, store: Store, question: str, count: int) -> str:
  """Returns the model's answer, the passages with their numbers, and wrong citations.

  Args:
    client: the endpoint that answers.
    model: the name of its model.
    store: finds the passages.
    question: the question.
    count: how many passages the prompt has.
  """
  passages = store.best(question, count)
  shown = '\n\n'.join(f'[{i}] ({p.place})\n{p.text}' for i, p in enumerate(passages, 1))
  turns = [
    {'role': 'system', 'content': ASK},
    {'role': 'user', 'content': f'{shown}\n\nQuestion: {question}'},
  ]
  completion = client.chat.completions.create(
    model=model, messages=turns, temperature=0, max_tokens=200
  )
  text = completion.choices[0].message.content
  cited = sorted({int(number) for number in re.findall(r'\[(\d+)\]', text)})
  lines = [text, '']
  for number, passage in enumerate(passages, 1):
    lines.append(f'[{number}] {passage.place}' + ('' if number in cited else ' (not cited)'))
  for number in cited:
    if not 1 <= number <= len(passages):
      lines.append(f'[{number}] is no passage: a wrong citation')
  return '\n'.join(lines)


def client_of(url: str) -> tuple[openai.OpenAI, str]:
  """Returns a client of a server, and the name of the server's model."""
  client = openai.OpenAI(base_url=url, api_key='none', timeout=600)
  return client, client.models.list().data[0].id


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--url', default='http://127.0.0.1:8000/v1', help='the endpoint')
  parser.add_argument('--embedder', metavar='URL', help='another endpoint, for the embeddings')
  parser.add_argument(
    '--embedded',
    type=int,
    default=LONGEST,
    metavar='N',
    help='characters of a passage that are embedded, so that it fits the model',
  )
  parser.add_argument('--passages', type=int, default=3, help='passages in the prompt')
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
