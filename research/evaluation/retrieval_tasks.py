"""Retrieval, re-ranking and recommendation on the functions and imports of a corpus of Python."""

import ast
import dataclasses
import random

import numpy as np

from research.core.errors import Invalid, UserError
from research.data.corpora import Corpus, PythonSources
from research.evaluation.corpus_tasks import documents
from research.evaluation.requests import Embed, LogLikelihood
from research.evaluation.task import Item, Task

MODES = ('embed', 'rerank')


def rank_measures(scores: np.ndarray, right: int) -> dict[str, float]:
  """nDCG@10 and the reciprocal rank of one relevant candidate, by trec_eval.

  Args:
    scores: [candidates], higher is better. Equal scores: trec_eval takes the higher name first.
    right: the index of the relevant one.

  Raises:
    UserError: pytrec-eval is not installed.
  """
  try:
    import pytrec_eval
  except ImportError as error:
    raise UserError(
      f'pytrec-eval is needed for nDCG and MRR: uv sync --extra eval ({error}).'
    ) from None
  names = [f'{i:06d}' for i in range(len(scores))]
  judge = pytrec_eval.RelevanceEvaluator({'query': {names[right]: 1}}, {'ndcg_cut', 'recip_rank'})
  run = {'query': {name: float(s) for name, s in zip(names, scores, strict=True)}}
  measured = judge.evaluate(run)['query']
  return {
    'ndcg@10': measured['ndcg_cut_10'],
    'mrr': measured['recip_rank'],
    'hit@1': float(measured['recip_rank'] == 1.0),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Task):
  """Base of tasks that put candidates in order.

  Attributes:
    corpus: whose validation documents.
    candidates: how many, the right one among them.
    documents: so many documents of the corpus are looked through at most.
  """

  corpus: Corpus = dataclasses.field(default_factory=PythonSources)
  candidates: int = 10
  documents: int = 400

  def __post_init__(self):
    super().__post_init__()
    if self.candidates < 2:
      raise Invalid(type(self), 'candidates', f'{self.candidates!r} must be 2 or more.')

  def pick(self, right: str, pool: list[str], chance: random.Random) -> tuple[list[str], int]:
    """(candidates in the order of chance, the place of the right one)."""
    others = chance.sample([text for text in pool if text != right], self.candidates - 1)
    options = [right, *others]
    chance.shuffle(options)
    return options, options.index(right)

  def check_enough(self, pool: list[str], what: str, shown: int = 0) -> None:
    """Raises UserError where there are too few candidates, beside those that a question shows."""
    if len(pool) < self.candidates + shown:
      raise UserError(
        f'{self.corpus.name} has {len(pool)} {what} in {self.documents} documents, too few for '
        f'{self.candidates} candidates; lower {type(self).__name__}.candidates.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocstringRetrieval(Ranking):
  """Which function does a docstring describe?

  Attributes:
    mode: 'embed' compares the features of both texts by their cosine; 'rerank' asks how likely the docstring is
      after each function.
    pooling: of 'embed', as in `requests.Embed`.
    longest: so many characters of a function.
  """

  mode: str = 'embed'
  pooling: str = 'mean'
  longest: int = 400

  def __post_init__(self):
    super().__post_init__()
    if self.mode not in MODES:
      raise Invalid(type(self), 'mode', f'{self.mode!r} is not one of {", ".join(MODES)}.')

  @property
  def name(self) -> str:
    how = self.mode if self.mode == 'rerank' else f'embed-{self.pooling}'
    return f'docstrings-{self.corpus.name}-{self.candidates}candidates-{how}'

  def items(self) -> list[Item]:
    pairs = {}
    for text in documents(self.corpus, self.documents):
      pairs |= {body[: self.longest]: summary for summary, body in described_functions(text)}
    pool = sorted(pairs)
    self.check_enough(pool, 'functions with a docstring')
    chance = random.Random(self.seed)
    chosen = chance.sample(pool, min(self.examples, len(pool)))
    return [self.item(body, pairs[body], pool, chance) for body in chosen]

  def item(self, body: str, summary: str, pool: list[str], chance: random.Random) -> Item:
    options, right = self.pick(body, pool, chance)
    if self.mode == 'embed':
      texts = [summary, *options]
      return Item(tuple(Embed(text, self.pooling) for text in texts), right)
    requests = [LogLikelihood(f'{option}\n# In short:', f' {summary}\n') for option in options]
    return Item(tuple(requests), right)

  def measure(self, item, answers):
    if self.mode == 'rerank':
      return rank_measures(np.array([answer.nats for answer in answers]), item.target)
    query, *options = (answer.vector / np.linalg.norm(answer.vector) for answer in answers)
    return rank_measures(np.array([query @ option for option in options]), item.target)


def described_functions(text: str) -> list[tuple[str, str]]:
  """(first line of the docstring, source without the docstring) of a module's functions that have one."""
  try:
    tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError):
    return []
  pairs = []
  for node in ast.walk(tree):
    if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
      continue
    summary = (ast.get_docstring(node) or '').strip().partition('\n')[0]
    if summary:
      node.body, node.decorator_list = node.body[1:], []
      pairs.append((summary, ast.unparse(node)))
  return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextImport(Ranking):
  """Recommendation: after what a module has imported, which item comes next out of the candidates?

  A module is a user, what it imports are the items in the order of its choice. The question is put as an
  instruction, and every candidate is scored by its likelihood as the answer.

  Attributes:
    history: so many items before the next one, at most.
  """

  history: int = 6

  @property
  def name(self) -> str:
    return f'next-import-{self.corpus.name}-{self.candidates}candidates'

  def items(self) -> list[Item]:
    users = [imports_of(text) for text in documents(self.corpus, self.documents)]
    users = [user for user in users if len(user) > 1]
    pool = sorted({item for user in users for item in user})
    self.check_enough(pool, 'imported modules', self.history)
    chance = random.Random(self.seed)
    chance.shuffle(users)
    return [self.item(user, pool, chance) for user in users[: self.examples]]

  def item(self, user: list[str], pool: list[str], chance: random.Random) -> Item:
    place = chance.randrange(1, len(user))
    history = user[max(0, place - self.history) : place]
    unseen = [item for item in pool if item not in history]
    options, right = self.pick(user[place], unseen, chance)
    question = (
      f'# A module has imported {", ".join(history)}.\n'
      f'# Which of these does it import next: {", ".join(options)}?\nimport'
    )
    return Item(tuple(LogLikelihood(question, f' {option}\n') for option in options), right)

  def measure(self, item, answers):
    return rank_measures(np.array([answer.nats for answer in answers]), item.target)


def imports_of(text: str) -> list[str]:
  """The modules that a module imports, each once, in the order of the text."""
  try:
    tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError):
    return []
  names = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      names |= {alias.name: node.lineno for alias in node.names if alias.name not in names}
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      names.setdefault(node.module, node.lineno)
  return sorted(names, key=lambda name: (names[name], name))
