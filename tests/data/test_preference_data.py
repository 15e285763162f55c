"""Preferences as files have them become pairs of segments, and what does not suit is told with its line."""

import json

import numpy as np
import pytest

from research.core.errors import Invalid, UserError
from research.data import objectives
from research.data.conversations import Unsuitable
from research.data.corpora import JsonLines, JudgedAnswers, PreferencePairs
from research.data.preferences import BAD, GOOD, read_judgement, read_preference
from research.data.streams import Stream

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import

USER = {'role': 'user', 'content': 'How far is it?'}
FAR = {'role': 'assistant', 'content': 'Far.'}
NEAR = {'role': 'assistant', 'content': 'Quite near.'}
SHAPES = [
  {'prompt': 'How far is it?', 'chosen': 'Far.', 'rejected': 'Quite near.'},
  {'prompt': [USER], 'chosen': [FAR], 'rejected': [NEAR]},
  {'chosen': [USER, FAR], 'rejected': [USER, NEAR]},
  {'prompt': 'How far is it?', 'chosen': [USER, FAR], 'rejected': [USER, NEAR], 'score': 3},
]


@pytest.mark.parametrize('record', SHAPES)
def test_the_usual_shapes_are_one(record):
  assert read_preference(record) == [(GOOD, [USER, FAR]), (BAD, [USER, NEAR])]


def test_an_answer_is_judged_by_true_or_false():
  record = {'prompt': 'How far is it?', 'completion': 'Far.', 'label': False}
  assert read_judgement(record) == [(BAD, [USER, FAR])]
  with pytest.raises(Unsuitable, match=r"a 'label' that is 1 and not true or false"):
    read_judgement({**record, 'label': 1})
  with pytest.raises(Unsuitable, match=r"has no 'completion' and 'label'"):
    read_judgement(SHAPES[0])


@pytest.mark.parametrize(
  ('record', 'why'),
  [
    ({'prompt': 'a', 'chosen': 'b'}, "has no 'chosen' and 'rejected'"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, 'one answer as both'),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': ' '}, r"empty turn.*\(of 'rejected'\)"),
    ({'prompt': 'a', 'chosen': 'b', 'rejected': 3}, "no list of turns in 'rejected'"),
    ({'chosen': 'b', 'rejected': 'c'}, "has no 'prompt', and 'chosen' begins"),
    ({'chosen': [USER, FAR], 'rejected': [FAR, NEAR]}, "no 'prompt'"),
    ({'chosen': [USER, FAR, USER, FAR], 'rejected': [USER, NEAR]}, 'differ before the last turn'),
    ({'prompt': [FAR], 'chosen': 'a', 'rejected': 'b'}, 'roles out of order'),
  ],
)
def test_what_does_not_suit_is_said(record, why):
  with pytest.raises(Unsuitable, match=why):
    read_preference(record)


def rows_of(records, tmp_path, length=128, kind=PreferencePairs, **fields):
  """What a stream of these records has on disk."""
  from tasks.writers import writer  # TensorFlow

  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  other = tmp_path / 'other.jsonl'  # what is in both splits is taken out of training
  other.write_text(
    json.dumps({'prompt': 'v', 'chosen': 'w', 'rejected': 'u', 'completion': 'w', 'label': True})
  )
  corpus = kind(files=str(path), validation_files=str(other), broken=fields.pop('broken', 'refuse'))
  stream = Stream(task=kind.name, corpus=corpus, lengths={'targets': length}, **fields)
  lines = []
  new = writer(stream, tmp_path / 'stream', tmp_path, lines.append)
  (tmp_path / 'stream').mkdir(exist_ok=True)
  new.shard(0, 0)
  facts = json.loads((tmp_path / 'stream' / 'pass0-00000.json').read_text())
  dtype = np.dtype([(k, d, (n,)) for k, d, n in facts['features']])
  table = np.fromfile(tmp_path / 'stream' / 'pass0-00000.bin', dtype)
  rows = {k.removeprefix('decoder_'): table[k].astype(np.int32) for k in dtype.names}
  return rows, facts, lines, new.vocabulary


@pytest.mark.parametrize('packing', [True, False])
def test_pairs_are_segments_side_by_side(packing, tmp_path):
  asked = {'role': 'user', 'content': 'And by train?'}
  long = {'chosen': [USER, FAR, asked, NEAR], 'rejected': [USER, FAR, asked, FAR]}
  records = [SHAPES[0], {'prompt': 'x', 'chosen': 'y', 'rejected': 'z'}, long]
  rows, *_, vocabulary = rows_of(records, tmp_path, length=256, packing=packing)
  texts = set()
  for row in range(len(rows['segment_ids'])):
    ids = rows['segment_ids'][row]
    count = ids.max()
    assert count % 2 == 0
    pair = []
    for segment in range(1, count + 1):
      here = np.flatnonzero(ids == segment)
      assert list(here) == list(range(here[0], here[0] + len(here)))
      target, given = rows['target_tokens'][row, here], rows['input_tokens'][row, here]
      assert list(given) == [0, *target[:-1]]  # each begins anew, and once
      assert list(rows['positions'][row, here]) == list(range(len(here)))
      learned = rows['loss_weights'][row, here].astype(bool)
      # One piece at the end, EOS with it: not a turn of the assistant's in the prompt.
      assert learned[-1]
      assert (np.diff(learned.astype(int)) != 0).sum() == 1
      assert target[-1] == vocabulary.eos_id
      pair.append(
        (vocabulary.decode(target[~learned].tolist()), vocabulary.decode(target[learned].tolist()))
      )
      if segment % 2 == 0:
        texts.add((*pair[-2], pair[-1][1]))
        assert pair[-2][0] == pair[-1][0]
  first = '<|user|>\nHow far is it?\n<|assistant|>\n'
  assert (first, 'Far.', 'Quite near.') in texts
  assert ('<|user|>\nx\n<|assistant|>\n', 'y', 'z') in texts
  assert {text[1:] for text in texts} == {
    ('Far.', 'Quite near.'),
    ('y', 'z'),
    ('Quite near.', 'Far.'),
  }


def test_a_template_gives_the_beginning_once(tmp_path):
  template = tmp_path / 'template.jinja'
  template.write_text(
    '{% if messages %}<s>{% endif %}{% for m in messages %}[{{ m.role }}]{{ m.content }}'
    '{% if m.role == "assistant" %}{{ eos_token }}{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}[assistant]{% endif %}'
  )
  task = objectives.Preferences(template=str(template))
  path = tmp_path / 'pairs.jsonl'
  path.write_text(json.dumps(SHAPES[0]) + '\n')
  from research.data import conversations
  from research.data.vocabularies import Bytes
  from tasks import chat, vocabularies

  vocabulary = vocabularies.build(Bytes(), tmp_path, None, print)
  document = json.dumps(read_preference(SHAPES[0])).encode() + b'\0here'
  (example,), dropped = chat.encode_preferences(vocabulary, task.template, 256, [document])
  assert not dropped
  text = vocabulary.decode([int(t) for t in example['targets'] if t != vocabulary.eos_id])
  assert (
    text == '<s>[user]How far is it?[assistant]Far.<s>[user]How far is it?[assistant]Quite near.'
  )
  learned = example['targets'][example['learned'] == 1]
  ends = learned == vocabulary.eos_id
  assert vocabulary.decode(learned[~ends].tolist()) == 'Far.Quite near.'
  assert ends[-1]
  assert ends.sum() == 2  # which `decode` would stop at
  assert conversations.EOS not in text


def test_pairs_that_do_not_fit_or_suit_are_counted_and_told(tmp_path):
  records = [SHAPES[0], {'prompt': 'x', 'chosen': 'y', 'rejected': 'z' * 300}]
  _, facts, lines, _ = rows_of(records, tmp_path)
  assert facts['left_out'] == {'left out, for they are longer than a row of 128': 1}
  assert any('pairs.jsonl: line 2: ' in line and 'more than a row of 128' in line for line in lines)
  folder = tmp_path / 'two'
  folder.mkdir()
  with pytest.raises(UserError, match=r'pairs\.jsonl.*line 2 has one answer as both'):
    rows_of([SHAPES[0], {**SHAPES[0], 'rejected': 'Far.'}], folder)


def test_an_objective_of_pairs_wants_pairs(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a"}\n')
  with pytest.raises(Invalid, match=r'preferences needs preferences \(corpora\.PreferencePairs\)'):
    Stream(task='preferences', corpus=JsonLines(files=str(path)))


def test_good_answers_have_odd_segments_and_bad_ones_even(tmp_path):
  texts = {'b': True, 'dddd': False, 'ff': True}
  records = [{'prompt': 'x', 'completion': c, 'label': good} for c, good in texts.items()]
  rows, *_, vocabulary = rows_of(records, tmp_path, kind=JudgedAnswers)
  (ids,), (targets,), (weights,) = (
    rows[key] for key in ('segment_ids', 'target_tokens', 'loss_weights')
  )
  found = {}
  for segment in set(ids.tolist()) - {0}:
    answer = vocabulary.decode(targets[(ids == segment) & (weights > 0)].tolist())
    found[answer] = segment % 2 == 1
  assert found == texts
