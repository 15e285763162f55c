"""Retrieval, re-ranking and recommendation on the functions and imports of a Python corpus."""

import ast
import dataclasses
import random
from collections.abc import Iterator

import numpy as np

from research.core.errors import Invalid, UserError
from research.data.corpora import Corpus, PythonSources
from research.evaluation.corpus_tasks import documents
from research.evaluation.requests import Embed, LogLikelihood
from research.evaluation.task import Item, Task

MODES = ('embed', 'rerank')


def rank_measures(scores: np.ndarray, right: int) -> dict[str, float]:
  """nDCG@10, reciprocal rank and hit@1 of a ranking with one relevant candidate, by trec_eval.

  Args:
    scores: [candidates], higher is better. Of equal scores trec_eval takes the last candidate first.
    right: the index of the relevant candidate.

  Raises:
    UserError: pytrec-eval is not installed.
  """
  try:
    import pytrec_eval
  except ImportError as error:
    raise UserError(
      f'pytrec-eval is needed for nDCG and MRR: uv sync --extra eval ({error}).'
    ) from None
  names = [f'{i:06d}' for i in range(len(scores))]  # trec_eval's documents have names
  relevant = {'query': {names[right]: 1}}
  run = {'query': {name: float(score) for name, score in zip(names, scores, strict=True)}}
  evaluator = pytrec_eval.RelevanceEvaluator(relevant, {'ndcg_cut', 'recip_rank'})
  measured = evaluator.evaluate(run)['query']
  return {
    'ndcg@10': measured['ndcg_cut_10'],
    'mrr': measured['recip_rank'],
    'hit@1': float(measured['recip_rank'] == 1.0),
  }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking(Task):
  """Base of the tasks that rank candidates.

  Attributes:
    corpus: the corpus of the documents.
    candidates: the number of candidates, the right one included.
    documents: the most validation documents of the corpus that are searched.
  """

  corpus: Corpus = dataclasses.field(default_factory=PythonSources)
  candidates: int = 10
  documents: int = 400

  def __post_init__(self):
    super().__post_init__()
    if self.candidates < 2:
      raise Invalid(type(self), 'candidates', f'{self.candidates!r} must be 2 or more.')

  def pick(self, right: str, pool: list[str], rng: random.Random) -> tuple[list[str], int]:
    """(candidates in random order, the index of the right one)."""
    others = rng.sample([text for text in pool if text != right], self.candidates - 1)
    candidates = [right, *others]
    rng.shuffle(candidates)
    return candidates, candidates.index(right)

  def check_enough(self, pool: list[str], what: str, shown: int = 0) -> None:
    """Checks that the pool has enough candidates.

    Args:
      what: the candidates, for the message.
      shown: how many of the pool a question may show, which are then no candidates.

    Raises:
      UserError: it has too few.
    """
    if len(pool) < self.candidates + shown:
      raise UserError(
        f'{self.corpus.name} has {len(pool)} {what} in {self.documents} documents, too few for '
        f'{self.candidates} candidates; lower {type(self).__name__}.candidates.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocstringRetrieval(Ranking):
  """Finds the function that a docstring describes.

  Attributes:
    mode: 'embed' ranks functions by the cosine of their embedding and the docstring's; 'rerank' by the
      likelihood of the docstring after each function.
    pooling: for 'embed', as in `requests.Embed`.
    longest: the most characters of a function.
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
    summaries = {}
    # By source, so that a function that occurs twice is one candidate.
    for text in documents(self.corpus, self.documents):
      for summary, source in described_functions(text):
        summaries[source[: self.longest]] = summary
    pool = sorted(summaries)
    self.check_enough(pool, 'functions with a docstring')
    rng = random.Random(self.seed)
    chosen = rng.sample(pool, min(self.examples, len(pool)))
    return [self.item(source, summaries[source], pool, rng) for source in chosen]

  def item(self, source: str, summary: str, pool: list[str], rng: random.Random) -> Item:
    """The summary of one function, and the function among the candidates."""
    candidates, right = self.pick(source, pool, rng)
    if self.mode == 'embed':
      texts = [summary, *candidates]
      return Item(tuple(Embed(text, self.pooling) for text in texts), right)
    requests = [
      LogLikelihood(f'{candidate}\n# In short:', f' {summary}\n') for candidate in candidates
    ]
    return Item(tuple(requests), right)

  def measure(self, item, answers):
    if self.mode == 'rerank':
      return rank_measures(np.array([answer.nats for answer in answers]), item.target)
    query, *candidates = (answer.vector / np.linalg.norm(answer.vector) for answer in answers)
    cosines = [query @ candidate for candidate in candidates]
    return rank_measures(np.array(cosines), item.target)


def described_functions(text: str) -> list[tuple[str, str]]:
  """(first line of the docstring, source without the docstring) of a module's functions that have one.

  Empty where the text is not Python.
  """
  pairs = []
  for node in _nodes(text):
    # A function of a docstring alone has nothing left to find.
    if not isinstance(node, ast.FunctionDef) or len(node.body) < 2:
      continue
    summary = (ast.get_docstring(node) or '').strip().partition('\n')[0]
    if summary:
      # Neither the docstring nor a decorator may give the function away.
      node.body = node.body[1:]
      node.decorator_list = []
      pairs.append((summary, ast.unparse(node)))
  return pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextImport(Ranking):
  """Sequential recommendation: the module that a file imports next, out of candidates.

  A file is a user; the modules that it imports are its items, in their order. The prompt is an instruction with
  the candidates, and the likelihood of each candidate as the answer ranks them.

  Attributes:
    history: the most items before the next one.
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
    rng = random.Random(self.seed)
    rng.shuffle(users)
    return [self.item(user, pool, rng) for user in users[: self.examples]]

  def item(self, user: list[str], pool: list[str], rng: random.Random) -> Item:
    """The next item of one user at a random position."""
    position = rng.randrange(1, len(user))
    history = user[max(0, position - self.history) : position]
    # An item of the history would be an easy wrong candidate.
    unseen = [item for item in pool if item not in history]
    candidates, right = self.pick(user[position], unseen, rng)
    question = (
      f'# A module has imported {", ".join(history)}.\n'
      f'# Which of these does it import next: {", ".join(candidates)}?\nimport'
    )
    requests = [LogLikelihood(question, f' {candidate}\n') for candidate in candidates]
    return Item(tuple(requests), right)

  def measure(self, item, answers):
    return rank_measures(np.array([answer.nats for answer in answers]), item.target)


def imports_of(text: str) -> list[str]:
  """The modules that a file imports, each once, in the order of the text; relative imports are left out.

  Empty where the text is not Python.
  """
  lines = {}
  for node in _nodes(text):
    if isinstance(node, ast.Import):
      for alias in node.names:
        lines.setdefault(alias.name, node.lineno)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
      lines.setdefault(node.module, node.lineno)
  return sorted(lines, key=lambda name: (lines[name], name))


def _nodes(text: str) -> Iterator[ast.AST]:
  """The syntax tree's nodes; none where the text is not Python."""
  try:
    return ast.walk(ast.parse(text))
  except (SyntaxError, ValueError, RecursionError):
    return iter(())
