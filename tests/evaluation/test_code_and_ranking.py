"""pass@k by the closed form, and rankings by trec_eval's measures."""

import math

import numpy as np
import pytest

from research.core.errors import Invalid, UserError
from research.data.corpora import PythonSources
from research.evaluation import code_tasks, retrieval_tasks
from research.evaluation.code_problems import builtin_problems
from research.evaluation.requests import Embed, Embedding, Generation, Likelihood
from tests.evaluation.scripted import Scripted

CORPUS = PythonSources()


def test_pass_at_k_of_a_known_table_is_the_closed_form(monkeypatch):
  """Problem i is solved by i of its 6 samples."""
  problems = builtin_problems()[:5]
  solved = {problem.prompt: i for i, problem in enumerate(problems)}
  monkeypatch.setattr(code_tasks, 'passes', lambda problem, text, limits: text == 'right')
  counts = dict.fromkeys(solved, 0)

  def answer(request):
    counts[request.context] += 1
    right = counts[request.context] <= solved[request.context]
    return Generation('right' if right else 'wrong', 3, True)

  task = code_tasks.FunctionCompletion(samples=6, ks=(1, 2, 6), examples=5)
  result = task.run(Scripted(answer))
  for k in (1, 2, 6):
    expected = [1 - math.comb(6 - c, k) / math.comb(6, k) for c in range(5)]
    assert result['metrics'][f'pass@{k}'] == pytest.approx(np.mean(expected), abs=1e-12)
  assert result['settings']['sandbox'] in ('namespaces', 'limits')
  seeds = [r.sampling.seed for item in task.items() for r in item.requests]
  assert len(set(seeds)) == 30


def test_samples_that_would_be_equal_are_refused():
  with pytest.raises(Invalid, match=r'temperature: 0 is greedy: all 10 samples'):
    code_tasks.FunctionCompletion(temperature=0.0)
  with pytest.raises(Invalid, match=r'ks: \(3,\) must be numbers from 1 to the 2 samples'):
    code_tasks.FunctionCompletion(samples=2, ks=(3,))


def test_measures_of_a_ranking():
  pytest.importorskip('pytrec_eval')
  scores = np.array([0.1, 0.9, 0.5, 0.3])
  for right, rank in ((1, 1), (2, 2), (3, 3), (0, 4)):
    measured = retrieval_tasks.rank_measures(scores, right)
    assert measured['mrr'] == pytest.approx(1 / rank)
    assert measured['ndcg@10'] == pytest.approx(1 / math.log2(rank + 1))
    assert measured['hit@1'] == float(rank == 1)


MODULE = '''
import os
import sys, json
from a.b import c

def area(radius):
  """Area of a circle.

  More words.
  """
  value = 3.14 * radius ** 2
  return value

def undocumented(x):
  return x
'''


def test_functions_and_imports_of_a_module():
  ((summary, body),) = retrieval_tasks.described_functions(MODULE)
  assert summary == 'Area of a circle.'
  assert body == 'def area(radius):\n    value = 3.14 * radius ** 2\n    return value'
  assert retrieval_tasks.imports_of(MODULE) == ['os', 'json', 'sys', 'a.b']
  assert retrieval_tasks.described_functions('def (') == []


@pytest.fixture
def modules(monkeypatch):
  """Documents with different functions and imports."""
  texts = [MODULE.replace('area', f'area{i}').replace('3.14', str(i)).replace('circle', f'circle {i}')
           .replace('a.b', f'a.b{i}') for i in range(14)]  # fmt: skip
  monkeypatch.setattr(retrieval_tasks, 'documents', lambda corpus, most: texts[:most])
  return texts


def number_in(text: str) -> int:
  return int(''.join(filter(str.isdigit, text.split('area')[-1].split('circle')[-1].split('(')[0])))


@pytest.mark.parametrize('mode', ['embed', 'rerank'])
def test_a_model_that_knows_the_function_ranks_it_first(mode, modules):
  pytest.importorskip('pytrec_eval')

  def answer(request):
    if isinstance(request, Embed):
      vector = np.zeros(20, np.float32)
      vector[number_in(request.text)] = 1.0
      return Embedding(vector)
    same = number_in(request.context.partition('\n')[0]) == number_in(request.continuation)
    return Likelihood(-1.0 if same else -5.0, 3, False)

  task = retrieval_tasks.DocstringRetrieval(corpus=CORPUS, mode=mode, candidates=6, examples=8)
  result = task.run(Scripted(answer))
  assert (result['metrics']['mrr'], result['metrics']['ndcg@10']) == (1.0, 1.0)

  def blind(request):
    if isinstance(request, Embed):
      return Embedding(np.ones(3, np.float32))
    return Likelihood(-1.0, 1, False)

  assert task.run(Scripted(blind))['metrics']['mrr'] < 0.9
  few = retrieval_tasks.DocstringRetrieval(corpus=CORPUS, candidates=40)
  assert 'too few for 40 candidates; lower DocstringRetrieval.candidates' in few.run(None)['error']


def test_the_next_item_is_asked_for_among_unseen_ones(modules):
  task = retrieval_tasks.NextImport(corpus=CORPUS, candidates=4, history=3, examples=9)
  items = task.items()
  assert items == task.items()
  assert len(items) == 9
  for item in items:
    options = [request.continuation.strip() for request in item.requests]
    question = item.requests[0].context
    history = question.partition('imported ')[2].partition('.\n')[0].split(', ')
    assert len(set(options)) == 4
    assert not set(options) & set(history)
    users = [retrieval_tasks.imports_of(text) for text in modules]
    # The right candidate follows the last item of the history in some module.
    follows = {user[user.index(history[-1]) + 1] for user in users if history[-1] in user[:-1]}
    assert options[item.target] in follows


def test_candidates_must_be_several():
  with pytest.raises(Invalid, match=r'candidates: 1 must be 2 or more'):
    retrieval_tasks.NextImport(candidates=1)
  with pytest.raises(Invalid, match=r"mode: 'bm25' is not one of embed, rerank"):
    retrieval_tasks.DocstringRetrieval(mode='bm25')
  with pytest.raises(UserError):
    retrieval_tasks.NextImport(corpus=CORPUS).check_enough(['a'], 'imports')
