"""Conversations: every shape, the loss on the assistant alone, whole turns; errors by file and line."""

import json
import re

import numpy as np
import pytest

from research import freeze
from research.core.errors import Invalid, UserError
from research.data import batches, conversations
from research.data.corpora import Conversations, TextFiles
from research.data.objectives import Conversation
from research.data.streams import Stream
from research.data.vocabularies import Bytes, HuggingFaceTokenizer
from tasks import freezing

pytestmark = pytest.mark.filterwarnings('ignore')  # TensorFlow's own, at import

USER = {'role': 'user', 'content': 'ask'}
ANSWER = {'role': 'assistant', 'content': 'say'}
SHAPES = [
  {'messages': [USER, ANSWER]},
  {'conversations': [{'from': 'human', 'value': 'ask'}, {'from': 'gpt', 'value': 'say'}]},
  {'prompt': 'ask', 'completion': 'say'},
  {'instruction': 'ask', 'input': '', 'output': 'say'},
]
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
  "+ '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def silent(line):
  del line


@pytest.mark.parametrize('record', SHAPES)
def test_the_usual_shapes_are_the_same_messages(record):
  assert conversations.read_messages(record) == [USER, ANSWER]


def test_an_input_follows_its_instruction():
  record = {'instruction': 'add', 'input': '1 2', 'output': '3'}
  assert conversations.read_messages(record)[0]['content'] == 'add\n\n1 2'


UNSUITABLE = {
  'no shape': ({'text': 'x'}, r"has neither 'messages' nor 'conversations'"),
  'starts wrong': (
    {'messages': [ANSWER]},
    r'roles out of order: turn 1 is of the assistant, at the start',
  ),
  'twice': ({'messages': [USER, USER, ANSWER]}, r'turn 2 is of the user, after that of the user'),
  'late system': (
    {'messages': [USER, ANSWER, {'role': 'system', 'content': 'x'}]},
    r'turn 3 is of the system, after that of the assistant',
  ),
  'empty': (
    {'messages': [USER, {'role': 'assistant', 'content': ' '}]},
    r"turn 2, the assistant's",
  ),
  'no answer': ({'messages': [USER, ANSWER, USER]}, r'ends with a turn of the user'),
  'null': (
    {'messages': [USER, {'role': 'assistant', 'content': None}]},
    r'turn 2 that is null and not text',
  ),
  'role': ({'messages': [{'role': 'robot', 'content': 'x'}]}, r"unknown role 'robot'"),
  'list of text': ({'messages': ['x']}, r"turn 1 without 'role' and 'content'"),
  'none': ({'messages': []}, r'no list of turns'),
  'type': ({'prompt': 'x', 'completion': 3}, r"'completion' that is of type int"),
  'NUL': ({'prompt': 'x', 'completion': 'a\0'}, r'NUL character'),
}


def corpus_of(folder, records, **fields):
  path = folder / 'chats.jsonl'
  path.write_text(''.join(json.dumps(r) + '\n' for r in records))
  return Conversations(files=str(path), validation_fraction=1e-9, **fields)


@pytest.mark.parametrize('name', UNSUITABLE)
def test_what_does_not_suit_is_told_with_file_and_line(tmp_path, name):
  from tasks import files, readers

  record, message = UNSUITABLE[name]
  corpus = corpus_of(tmp_path, [SHAPES[0], record, SHAPES[2]])
  with pytest.raises(UserError, match=rf'chats\.jsonl: line 2 .*{message}'):
    list(readers.read(corpus, files.Dropped()))
  dropped = files.Dropped()
  skipping = corpus_of(tmp_path, [SHAPES[0], record, SHAPES[2]], broken='skip')
  assert len(list(readers.read(skipping, dropped))) == 2
  assert dropped.total() == 1


def frozen_of(folder, stream, log=silent):
  freezing.freeze([stream], folder / 'cache', log)
  return batches.Frozen(folder / 'cache' / 'streams' / stream.key(), stream)


def parts_of(frozen):
  """(text of the tokens, text of those with a loss) of every conversation in a stream of bytes."""
  batch = frozen.examples(range(len(frozen)))
  for row, segments in enumerate(batch['decoder_segment_ids']):
    for segment in range(1, segments.max() + 1):
      inside = segments == segment
      tokens = batch['decoder_target_tokens'][row][inside]
      learned = batch['decoder_loss_weights'][row][inside] > 0
      assert batch['decoder_input_tokens'][row][inside][0] == 0, (
        'no token of the conversation before'
      )
      assert (batch['decoder_positions'][row][inside] == np.arange(inside.sum())).all()
      as_text = lambda ids: bytes(3 if i == 1 else i - 3 for i in ids).decode()  # EOS as \x03
      yield as_text(tokens), as_text(tokens[learned])
  assert not batch['decoder_loss_weights'][batch['decoder_segment_ids'] == 0].any()


def test_the_assistants_turns_alone_carry_a_loss_and_only_whole_turns_are_kept(tmp_path, capsys):
  turns = [
    [part for i in range(n) for part in (
      {'role': 'user', 'content': f'ask {n} {i}'}, {'role': 'assistant', 'content': f'say {n} {i}'}
    )]
    for n in (1, 2, 3, 8)
  ]  # fmt: skip
  too_long = [USER, {'role': 'assistant', 'content': 'x' * 300}]
  # The same conversation on another line is the same document.
  corpus = corpus_of(tmp_path, [{'messages': m} for m in [*turns, too_long, turns[0]]])
  lines = []
  stream = Stream(task='conversation', corpus=corpus, vocabulary=Bytes(), lengths={'targets': 160})
  frozen = frozen_of(tmp_path, stream, lines.append)
  said = dict(parts_of(frozen))
  assert frozen.manifest['corpus']['documents'] == 5
  two = (
    '<|user|>\nask 2 0\n<|assistant|>\nsay 2 0\x03\n<|user|>\nask 2 1\n<|assistant|>\nsay 2 1\x03'
  )
  assert said[two] == 'say 2 0\x03say 2 1\x03'
  assert sorted(said.values()) == [
    'say 1 0\x03',
    'say 2 0\x03say 2 1\x03',
    'say 3 0\x03say 3 1\x03say 3 2\x03',
    'say 8 0\x03say 8 1\x03say 8 2\x03say 8 3\x03',  # 4 exchanges are 159 tokens, 5 would be 199
  ]
  (long_line,) = [line for line in lines if 'left out, for' in line]
  assert re.search(r'chats.jsonl: line 5: \d+ tokens are more than a row of 160', long_line)
  assert any('line 4: ' in line and 'shortened by whole turns' in line for line in lines)
  freeze.report(frozen, tmp_path / 'cache', show=0)
  told = capsys.readouterr().out
  assert '1 left out, for the first exchange is longer than a row of 160' in told
  assert '1 shortened by whole turns' in told


def chat_tokenizer(folder):
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers

  special = ['<|im_start|>', '<|im_end|>']
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate([*special, *alphabet])}, []))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(special)
  tokenizer.save(str(folder / 'tokenizer.json'))
  settings = {
    'chat_template': CHATML,
    'eos_token': '<|im_end|>',
    'tokenizer_class': 'PreTrainedTokenizerFast',
  }
  (folder / 'tokenizer_config.json').write_text(json.dumps(settings))


def test_a_tokenizers_template_gives_the_tokens_of_transformers(tmp_path):
  transformers = pytest.importorskip('transformers')
  chat_tokenizer(tmp_path)
  messages = [
    {'role': 'system', 'content': 'be brief'},
    USER,
    ANSWER,
    USER,
    {**ANSWER, 'content': 'more'},
  ]
  stream = Stream(
    task=Conversation(template=str(tmp_path / 'tokenizer_config.json')),
    corpus=corpus_of(tmp_path, [{'messages': messages}]),
    vocabulary=HuggingFaceTokenizer(file=str(tmp_path / 'tokenizer.json')),
    lengths={'targets': 256},
  )
  batch = frozen_of(tmp_path, stream).examples([0])
  used = batch['decoder_segment_ids'][0] > 0
  theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
  text = theirs.apply_chat_template(messages, tokenize=False)
  assert batch['decoder_target_tokens'][0][used].tolist() == theirs.encode(
    text, add_special_tokens=False
  )
  learned = batch['decoder_target_tokens'][0][batch['decoder_loss_weights'][0] > 0]
  assert theirs.decode(learned) == 'say<|im_end|>more<|im_end|>'


def test_a_message_cannot_spell_a_special_token(tmp_path):
  chat_tokenizer(tmp_path)
  stream = Stream(
    task='conversation',
    corpus=corpus_of(tmp_path, [{'prompt': 'a <|im_end|> b', 'completion': 'x'}]),
    vocabulary=HuggingFaceTokenizer(file=str(tmp_path / 'tokenizer.json')),
    lengths={'targets': 64},
  )
  with pytest.raises(UserError, match=r"line 1 spells the special token '<\|im_end\|>' in turn 1"):
    frozen_of(tmp_path, stream)


def test_templates_that_do_not_suit(tmp_path):
  path = tmp_path / 't.jinja'
  path.write_text('{% for m in messages %}{{ m.content }}{% endif %}')
  with pytest.raises(UserError, match=r't.jinja: the chat template is not jinja2'):
    conversations.template(str(path))
  path.write_text('{{ raise_exception("no systems here") }}')
  with pytest.raises(conversations.Unsuitable, match='no systems here'):
    conversations.segments([USER, ANSWER], conversations.template(str(path)))
  path.write_text('{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}')
  with pytest.raises(conversations.Unsuitable, match='changes with later turns'):
    conversations.segments([USER, ANSWER], conversations.template(str(path)))
  (tmp_path / 'tokenizer_config.json').write_text('{}')
  with pytest.raises(UserError, match='has no chat_template'):
    conversations.template(str(tmp_path / 'tokenizer_config.json'))
  with pytest.raises(Invalid, match=r'Stream.corpus: conversation needs conversations'):
    Stream(task='conversation', corpus=TextFiles(files=str(path)), lengths={'targets': 64})


def test_the_gin_file_of_conversations(tmp_path):
  corpus_of(tmp_path, SHAPES)
  files = str(tmp_path / 'chats.jsonl')
  (stream,) = freeze.configured(['gin/objectives/conversation.gin'], [f'FILES={files!r}'])
  assert stream.task == Conversation()
  assert (
    stream.key() != Stream(task='conversation', corpus=stream.corpus, lengths={'targets': 64}).key()
  )
