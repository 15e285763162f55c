"""Tasks judge answers rightly; a suite keeps finished tasks, tells what failed, and goes on after a kill."""

import dataclasses
import json
import math
import random
import re
import subprocess
import sys
import time

import pytest

from research.core import configs
from research.core.errors import Invalid, UserError
from research.data.corpora import TextFiles
from research.data.encoding import ByteEncoding
from research.evaluation import corpus_tasks, generated_tasks, suite
from research.evaluation.requests import (
  Failed,
  GenerateUntil,
  Generation,
  Likelihood,
  LogLikelihood,
)
from research.evaluation.task import Item, Task, judge_choices
from tests.evaluation.scripted import Scripted

KINDS = (
  generated_tasks.Arithmetic(), generated_tasks.Arithmetic(operation='-', digits=3),
  generated_tasks.ModularArithmetic(), generated_tasks.Copying(), generated_tasks.Sorting(),
  generated_tasks.Brackets(),
)  # fmt: skip


def solve(question: str) -> str:
  """The answer to a generated question, by other code than the task's."""
  verb, _, rest = question.partition(' ')
  word = rest.rstrip(':')
  match verb:
    case 'copy':
      return word
    case 'sort':
      return ''.join(sorted(word))
    case 'close':
      while (shorter := word.replace('()', '').replace('<>', '')) != word:
        word = shorter
      return word[::-1].translate(str.maketrans('(<', ')>'))
  return str(eval(question.rstrip('=')))  # an arithmetic expression of this file's own making


@pytest.mark.parametrize('task', KINDS, ids=lambda task: task.name)
def test_a_generated_problem_is_right(task):
  rng = random.Random(1)
  for _ in range(200):
    problem = task.problem(rng)
    assert problem.answer == solve(problem.question)
    assert problem.answer
  chain = dataclasses.replace(task, mode='chain', shots=2)
  first = chain.items()[0].requests[0]
  assert first == chain.items()[0].requests[0]  # the same every time
  *shots, question = first.context.split('\n')
  assert len(shots) == 2
  assert question not in [shot[: len(question)] for shot in shots]
  for line in (*shots, question + first.continuation.strip()):
    question, _, chain = line.partition('[')
    assert chain.rpartition(']')[2] == solve(question)


def test_the_columns_of_an_addition_are_its_chain():
  problem = generated_tasks.Arithmetic(digits=2).problem(random.Random(5))
  assert (problem.question, problem.steps, problem.answer) == ('89+42=', '9+2=11,8+4+1=13', '131')


def right_answer(request):
  """Finds every continuation certain, and writes a chain with the right answer."""
  if isinstance(request, LogLikelihood):
    return Likelihood(-0.5, len(request.continuation), True)
  question = request.context.split('\n')[-1]
  return Generation(f'[so]{solve(question)}', 5, True)


def wrong_answer(request):
  if isinstance(request, LogLikelihood):
    return Likelihood(-9.0, 3, False)
  return Generation(']7', 2, True)


def endless_answer(request):
  """The right answer, but the text does not stop after it."""
  answer = right_answer(request)
  return dataclasses.replace(answer, stopped=False) if isinstance(answer, Generation) else answer


def test_accuracy_is_of_the_answer_and_nats_are_beside_it():
  direct = generated_tasks.Arithmetic(examples=20)
  chain = dataclasses.replace(direct, mode='chain')
  for task in (direct, chain):
    result = task.run(Scripted(right_answer))
    assert result['metrics']['accuracy'] == 1.0
    assert result['metrics']['nats'] == 0.5
    assert task.run(Scripted(wrong_answer))['metrics']['accuracy'] == 0.0
  assert chain.run(Scripted(endless_answer))['metrics']['accuracy'] == 0.0


def test_choices_by_likelihood_and_by_likelihood_per_byte():
  answers = [Likelihood(math.log(p), 1, False) for p in (0.2, 0.3, 0.1)]
  judged = judge_choices(answers, ['a' * 40, 'bb', 'c'], right=1)
  assert judged == {
    'accuracy': 1.0, 'accuracy_per_byte': 0.0, 'choice_nats': pytest.approx(math.log(2))
  }  # fmt: skip


def test_a_failed_request_is_in_no_mean_and_is_counted(tmp_path):
  def some(request):
    return Failed('too long.') if '1' in request.context else Likelihood(-1.0, 2, True)

  task = generated_tasks.Arithmetic(examples=50)
  failing = sum('1' in item.requests[0].context for item in task.items())
  result = task.run(Scripted(some))
  assert (result['failed'], result['reasons']) == (failing, {'too long.': failing})
  assert result['metrics']['accuracy'] == 1.0
  assert f'  {failing} items failed: too long.' in suite.show(task.name, result)
  nothing = task.run(Scripted(lambda request: Failed('no.')))
  assert (nothing['metrics'], nothing['failed']) == ({}, 50)
  assert 'no item has an answer' in suite.show(task.name, nothing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Missing(Task):
  """A task without data."""

  name = 'missing'

  def items(self) -> list[Item]:
    raise UserError('there is no file x.jsonl.')

  def measure(self, item, answers):
    raise AssertionError


def test_a_suite_goes_on_where_it_was_and_past_a_task_without_data(tmp_path):
  tasks = (generated_tasks.Copying(examples=4), Missing(), generated_tasks.Sorting(examples=4))
  three = suite.Suite(tasks=tasks)
  calls = []
  identity = {'checkpoint': 'runs/a', 'step': 7}

  def dies(request):
    calls.append(request)
    if len(calls) > 6:
      raise KeyboardInterrupt
    return right_answer(request)

  with pytest.raises(KeyboardInterrupt):
    suite.run_suite(three, Scripted(dies), tmp_path, identity)
  # Cut within a line, as a kill does.
  kept = tmp_path / 'sorting-5-0shot-direct.answers.jsonl'
  kept.write_text(kept.read_text()[:-9])
  engine = Scripted(right_answer)
  lines = []
  summary = suite.run_suite(three, engine, tmp_path, identity, lines.append)
  assert engine.requests == 3  # of the sorting, where one of two answers was whole
  assert 'sorting-5-0shot-direct: 1 earlier answers are kept' in lines
  assert not kept.exists()
  row = json.loads((tmp_path / 'row.json').read_text())
  assert row == summary['row']
  assert row['step'] == 7
  assert row['eval/copying-5-0shot-direct/accuracy'] == 1.0
  assert row['eval/missing/error'] == 'there is no file x.jsonl.'
  assert row['eval/sorting-5-0shot-direct/failed'] == 0
  # Another checkpoint is another result.
  engine = Scripted(right_answer)
  suite.run_suite(three, engine, tmp_path, {**identity, 'step': 8})
  assert engine.requests == 8


def one_task(**settings):
  return suite.Suite(tasks=(generated_tasks.Copying(),), **settings)


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: one_task(begin='bos'), r"Suite\.begin: 'bos' is not an id, None or 'own'"),
    (lambda: one_task(name='a/b'), r"Suite\.name: 'a/b' names a folder"),
    (lambda: one_task(length=-4), r'Suite\.length: -4 must be 2 or more'),
    (lambda: one_task(length=0), r'Suite\.length: 0 must be 2 or more'),
    (lambda: suite.Suite(tasks=()), r'Suite\.tasks: must be one or more tasks'),
    (
      lambda: suite.Suite(tasks=2 * (generated_tasks.Copying(),)),
      'two of them are named copying-5',
    ),
    (
      lambda: generated_tasks.Copying(mode='cot'),
      r"Copying\.mode: 'cot' is not one of direct, chain",
    ),
    (lambda: generated_tasks.Arithmetic(operation='*'), r"Arithmetic\.operation: '\*' is not"),
    (lambda: generated_tasks.Sorting(length=0), r'Sorting\.length: 0 must be positive'),
    (lambda: generated_tasks.Sorting(examples=0), r'Sorting\.examples: 0 must be positive'),
  ],
)
def test_what_is_wrong_with_a_suite_is_told(make, message):
  with pytest.raises(Invalid, match=message):
    make()


def test_every_suite_of_the_project_builds():
  files = sorted((configs.ROOT / 'gin' / 'evaluation').glob('*.gin'))
  built = [configs.load(str(file), root='EVALUATION').build() for file in files]
  assert [len(each.tasks) for each in built] == [4, 9]
  assert all(len(set(each.labels)) == len(each.tasks) for each in built)


@pytest.fixture
def corpus(text_file, monkeypatch):
  """A corpus whose documents are read without TensorFlow; the command's test reads its own."""
  texts = [path.read_text() for path in sorted(text_file.parent.glob('*.txt'))][:8]
  monkeypatch.setattr(corpus_tasks, 'documents', lambda corpus, most: texts[:most])
  return TextFiles(files=str(text_file), validation_fraction=0.2)


def test_a_line_is_asked_for_among_lines_of_its_document(corpus):
  task = corpus_tasks.LineCloze(corpus=corpus, examples=5, context=200)
  texts = corpus_tasks.documents(corpus, 100)
  items = task.items()
  assert len(items) == min(5, len(texts))
  for item in items:
    choices, right = item.target
    context = item.requests[0].context
    (text,) = [text for text in texts if context + choices[right] in text]
    assert len(set(choices)) == 4
    assert all(choice in text for choice in choices)
    assert len(context) <= 200
    assert [request.continuation for request in item.requests] == [c + '\n' for c in choices]
  with pytest.raises(UserError, match='has 999 different lines of 12 characters; lower'):
    corpus_tasks.LineCloze(corpus=corpus, choices=999).items()


def test_perplexity_weighs_documents_by_their_tokens(corpus):
  task = corpus_tasks.Perplexity(corpus=corpus, examples=2, longest=100)
  assert [item.target for item in task.items()] == [100] * 2
  rows = [{'nats': 2.0, 'tokens': 1, 'bytes': 4}, {'nats': 4.0, 'tokens': 2, 'bytes': 5}]
  metrics = task.summarise(rows)
  assert metrics['nats_per_token'] == 2.0
  assert metrics['perplexity'] == pytest.approx(math.exp(2.0))
  assert metrics['bits_per_byte'] == pytest.approx(6.0 / math.log(2) / 9)


def test_bytes_are_the_ids_that_training_uses():
  encoding = ByteEncoding()
  assert encoding.encode('aé') == [100, 198, 172]
  assert encoding.decode([0, 100, 198, 172, 1, 300]) == 'aé'
  assert GenerateUntil('a').until == ('\n',)


def test_the_task_and_the_suite_of_the_page_work(tmp_path, monkeypatch):
  page = (configs.ROOT / 'docs' / 'evaluate.md').read_text()
  for block in re.findall(r'```python\n(.*?)```', page, flags=re.S):
    (tmp_path / re.match(r'# (\w+\.\w+)\n', block)[1]).write_text(block)
  monkeypatch.syspath_prepend(tmp_path)
  (task,) = configs.load(str(tmp_path / 'my_suite.gin'), root='EVALUATION').build().tasks
  sys.modules.pop('my_task')
  result = task.run(Scripted(lambda request: Likelihood(-2.0, 1, 'Rome' in request.continuation)))
  assert result['metrics'] == {
    'accuracy': 0.5, 'accuracy_stderr': 0.5, 'nats': 2.0, 'nats_stderr': 0.0
  }  # fmt: skip


SUITE = """
from __gin__ import dynamic_registration
from research.data import corpora
from research.evaluation import corpus_tasks
from research.evaluation import generated_tasks
from research.evaluation import suite
EVALUATION = @suite.Suite
suite.Suite:
  tasks = (@corpus_tasks.Perplexity(), @generated_tasks.Copying())
  batch_size = 4
  stride = 8
corpus_tasks.Perplexity:
  corpus = @corpora.TextFiles()
  examples = 4
corpora.TextFiles:
  files = '{files}'
  validation_fraction = 0.2
generated_tasks.Copying.examples = 8
"""


@pytest.fixture(scope='module')
def command(user_environment):
  """Runs a command of the project to its end."""

  def run(*words):
    return subprocess.run(
      [sys.executable, '-m', *words], cwd=configs.ROOT, capture_output=True, text=True,
      env=user_environment,
    )  # fmt: skip

  return run


@pytest.fixture(scope='module')
def trained(text_file, tmp_path_factory, command):
  """(a run that evaluated itself, its suite): 60 steps with two checkpoints."""
  folder = tmp_path_factory.mktemp('evaluated')
  (folder / 'suite.gin').write_text(SUITE.format(files=text_file))
  (folder / 'run.gin').write_text(SELF.format(root=configs.ROOT))
  done = command(
    'research.train', f'--gin_file={folder / "run.gin"}', f"--gin.FILES='{text_file}'",
    '--gin.Run.steps=60', '--gin.Run.checkpoint_every=30', '--gin.Run.eval_every=30',
    f'--workdir={folder / "run"}',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return folder / 'run', folder / 'suite.gin'


SELF = """
from __gin__ import dynamic_registration
from research.evaluation import generated_tasks
from research.evaluation import suite
from research.training import run
include '{root}/tests/gin/decoder.gin'
run.Run.evaluations = (@suite.Suite(),)
suite.Suite:
  tasks = (@generated_tasks.Copying(), @generated_tasks.Sorting())
  batch_size = 4
  during = True
generated_tasks.Copying.examples = 4
generated_tasks.Sorting.examples = 4
"""


@pytest.mark.slow
def test_a_run_has_the_columns_of_its_suites(trained, text_file):
  run, _ = trained
  row = json.loads((run / 'run.json').read_text())
  assert row['eval/copying-5-0shot-direct/items'] == 4
  assert 0 <= row['eval/sorting-5-0shot-direct/nats_per_token'] < 20
  rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
  (half,) = [r for r in rows if 'eval/copying-5-0shot-direct/nats' in r]
  assert half['step'] == 30
  # Asked more or less, it is the same run.
  settings = [f"FILES='{text_file}'", 'Run.steps=60', 'Run.eval_every=30']
  plain = configs.load('tests/gin/decoder.gin', settings)
  assert plain.build().identity() == (run / 'config.txt').read_text()


@pytest.mark.slow
def test_the_command_evaluates_a_run(trained, command, tmp_path):
  run, gin_file = trained
  evaluate = ('research.evaluate', f'--gin_file={gin_file}', f'--checkpoint={run}')
  done = command(*evaluate)
  assert done.returncode == 0, done.stderr
  row = json.loads((run / 'evaluation' / 'suite' / 'row.json').read_text())
  facts = json.loads((run / 'run.json').read_text())
  # The run's own validation is of the same documents, in rows that begin anew.
  ours = row[f'eval/perplexity-{TextFiles.name}/bits_per_byte']
  assert ours == pytest.approx(facts['bits_per_byte'], rel=0.1)
  assert (row['step'], row['length'], row['architecture']) == (60, 32, 'decoder')
  assert (row['begin'], row['template']) == (0, None)
  assert row['eval/copying-5-0shot-direct/items'] == 8
  again = command(*evaluate)
  # The same results, for which nothing is frozen again.
  assert 'perplexity' in again.stdout
  assert 'freezing' not in again.stderr
  assert done.stdout.endswith(again.stdout)
  every = command(*evaluate[:2], f'--workdir={run}', f'--out={tmp_path / "all"}')
  assert every.returncode == 0, every.stderr
  rows = [json.loads(line) for line in (tmp_path / 'all' / 'rows.jsonl').read_text().splitlines()]
  assert [r['step'] for r in rows] == [30, 60]
  assert rows[1]['params_total'] == facts['params_total']
  assert rows[1]['eval/copying-5-0shot-direct/nats'] == row['eval/copying-5-0shot-direct/nats']
  assert rows[0]['eval/copying-5-0shot-direct/nats'] != row['eval/copying-5-0shot-direct/nats']
  for words, message in (
    (['--gin.Suite.batch_size=0'], 'batch_size'),
    (['--gin.Suite.length=-4'], '--gin.Suite.length=-4: Suite.length: -4 must be 2 or more'),
    (['--gin.Suite.stride=0'], '--gin.Suite.stride=0: Suite.stride: 0 must be from 1'),
    (['--step=7'], 'has no checkpoint of step 7'),
    ([f'--hf={tmp_path}'], 'give one of --checkpoint, --hf and --workdir'),
  ):
    wrong = command(*evaluate, *words)
    assert wrong.returncode == 2
    assert message in wrong.stderr
    assert 'Traceback' not in wrong.stderr
  missing = command(*evaluate[:2], f'--checkpoint={tmp_path}')
  assert missing.returncode == 2
  assert 'holds no config.gin (of a run) and no model.gin' in missing.stderr


@pytest.mark.slow
def test_a_cluster_gives_the_rows_of_one_machine(trained, command, tmp_path, ray_hosts):
  run, gin_file = trained
  rows = []
  for engine in (['--engine=local'], ['--engine=ray', f'--address={ray_hosts.address}']):
    out = tmp_path / engine[0].partition('=')[2]
    evaluate = ('research.evaluate', f'--gin_file={gin_file}', f'--workdir={run}', f'--out={out}')
    done = command(*evaluate, *engine)
    assert done.returncode == 0, done.stderr
    rows.append((out / 'rows.jsonl').read_text())
  assert rows[0] == rows[1]
  assert '[4/4]' in done.stdout  # two checkpoints, two tasks
  wrong = command(*evaluate, '--engine=ray', '--address=127.0.0.1:1')
  assert wrong.returncode == 2
  assert 'no Ray head answers there' in wrong.stderr


@pytest.mark.slow
def test_killed_in_a_task_it_goes_on_with_the_next_request(trained, tmp_path, user_environment):
  run, gin_file = trained
  out = tmp_path / 'out'
  words = [
    sys.executable, '-m', 'research.evaluate', f'--gin_file={gin_file}', f'--checkpoint={run}',
    f'--out={out}', '--gin.Copying.examples=3000', '--gin.Suite.tasks=(@Copying(),)',
  ]  # fmt: skip
  process = subprocess.Popen(
    words, cwd=configs.ROOT, env=user_environment, stdout=subprocess.DEVNULL
  )
  kept = out / 'copying-5-0shot-direct.answers.jsonl'
  deadline = time.monotonic() + 120
  while not kept.exists() or kept.read_text().count('\n') < 20:
    assert time.monotonic() < deadline
    assert process.poll() is None, 'it ended before it could be killed'
    time.sleep(0.02)
  process.kill()
  process.wait()
  answered = kept.read_text().count('\n') - 1
  done = subprocess.run(
    words, cwd=configs.ROOT, env=user_environment, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  kept_count = re.search(r'([\d,]+) earlier answers are kept', done.stdout)[1]
  assert answered - 1 <= int(kept_count.replace(',', '')) < 3000
  resumed = json.loads((out / 'results.json').read_text())['tasks']['copying-5-0shot-direct']
  whole = subprocess.run(
    [*words[:-3], f'--out={tmp_path / "whole"}', *words[-2:]], cwd=configs.ROOT, env=user_environment,
    capture_output=True, text=True,
  )  # fmt: skip
  assert whole.returncode == 0, whole.stderr
  expected = json.loads((tmp_path / 'whole' / 'results.json').read_text())['tasks']
  assert resumed['metrics'] == expected['copying-5-0shot-direct']['metrics']
