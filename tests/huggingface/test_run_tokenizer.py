"""The tokenizer of a run, written beside its export: transformers gives the ids of training."""

import io
import json

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from research.core import configs
from research.core.errors import UserError
from research.data import conversations
from research.data.encoding import make_encoding
from research.data.vocabularies import Bytes, HuggingFaceTokenizer, SentencePiece
from research.huggingface import companions, run_tokenizer

T = pytest.importorskip('transformers')
TEXTS = (*run_tokenizer.SAMPLES, 'law law\nrun', 'of  the\u00a0law', '<pad>')


@pytest.fixture(scope='module')
def bpe(tmp_path_factory):
  """A SentencePiece model as freezing trains one: lossless, with bytes for what it has no piece for."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the law of this run is a law of the loss'] * 50), model_writer=model,
    vocab_size=290, model_type='bpe', byte_fallback=True, normalization_rule_name='identity',
    add_dummy_prefix=False, remove_extra_whitespaces=False, bos_id=-1, pad_id=0, eos_id=1, unk_id=2,
    hard_vocab_limit=False, minloglevel=2,
  )  # fmt: skip
  file = tmp_path_factory.mktemp('vocabulary') / 'a.model'
  file.write_bytes(model.getvalue())
  return file


@pytest.fixture(scope='module', params=['<|endoftext|>', '!'])
def fast(request, tmp_path_factory):
  """A byte-level tokenizer.json whose id 0 is special (GPT-NeoX), or is text (GPT-2) and moves up by one."""
  first = [request.param, *sorted(pre_tokenizers.ByteLevel.alphabet())]
  vocab = {token: i for i, token in enumerate(dict.fromkeys([*first, 'th', 'the']))}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [('t', 'h'), ('th', 'e')]))
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.add_special_tokens(['<|endoftext|>'])
  end = tokenizer.token_to_id('<|endoftext|>')
  tokenizer.post_processor = processors.TemplateProcessing(
    '<|endoftext|> $A', None, [('<|endoftext|>', end)]
  )
  file = tmp_path_factory.mktemp('vocabulary') / 'tokenizer.json'
  tokenizer.save(str(file))
  return file


def check(vocabulary, folder):
  encoding = make_encoding(vocabulary)
  ids = run_tokenizer.write(folder, vocabulary, None)
  (folder / 'config.json').write_text('{"model_type": "llama"}')
  theirs = T.AutoTokenizer.from_pretrained(folder)
  for text in TEXTS[:-1]:
    assert theirs(text, add_special_tokens=False).input_ids == encoding.encode(text), text
    assert theirs.decode(encoding.encode(text), clean_up_tokenization_spaces=False) == text
  assert theirs.eos_token_id == ids['eos_token_id'] == encoding.end
  return theirs, ids


@pytest.mark.parametrize('several', [False, True])
def test_a_chat_template_goes_along(tmp_path, fast, several):
  source = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
  template = [{'name': 'default', 'template': source}, {'name': 'tool_use', 'template': 'tools'}]
  settings = {'chat_template': template if several else source, 'bos_token': '<|endoftext|>'}
  settings['unk_token'] = '<no such token>'
  file = tmp_path / 'tokenizer_config.json'
  file.write_text(json.dumps(settings))
  out = tmp_path / 'out'
  out.mkdir()
  run_tokenizer.write(out, HuggingFaceTokenizer(str(fast)), None)
  size = len(T.AutoTokenizer.from_pretrained(out))
  run_tokenizer.write_template(out, str(file))
  theirs = T.AutoTokenizer.from_pretrained(out)
  messages = [{'role': 'user', 'content': 'the law'}]
  assert theirs.apply_chat_template(messages, tokenize=False) == '<|endoftext|><user>the law'
  assert conversations.template(str(file))(messages) == '<|endoftext|><user>the law'
  assert len(theirs) == size


def test_bytes(tmp_path):
  run_tokenizer.write(tmp_path, Bytes(), None)
  theirs = T.AutoTokenizer.from_pretrained(tmp_path)
  assert theirs('é', add_special_tokens=False).input_ids == make_encoding(Bytes()).encode('é')


def test_a_tokenizer_json(tmp_path, fast):
  theirs, ids = check(HuggingFaceTokenizer(file=str(fast)), tmp_path)
  is_moved = theirs.pad_token == '<pad>'
  assert theirs('!').input_ids == [1]  # the second token, or the first moved up by one
  assert ids['pad_token_id'] == (0 if is_moved else None)
  assert theirs('the').input_ids == theirs('the', add_special_tokens=False).input_ids


def test_a_sentencepiece_model(tmp_path, bpe):
  _, ids = check(SentencePiece(file=str(bpe)), tmp_path)
  assert ids == {'eos_token_id': 1, 'pad_token_id': 0}


def test_a_sentencepiece_model_of_the_cache(tmp_path, bpe):
  assert run_tokenizer.write(tmp_path, SentencePiece(), bpe)['eos_token_id'] == 1
  with pytest.raises(UserError, match='not in the data cache any more'):
    run_tokenizer.write(tmp_path, SentencePiece(), None)


def test_what_has_no_equal_is_refused(tmp_path, bpe, monkeypatch):
  monkeypatch.setattr(run_tokenizer, 'merges', lambda pieces, vocab: [])
  with pytest.raises(UserError, match=r'has no equal in tokenizer.json'):
    run_tokenizer.write(tmp_path, SentencePiece(file=str(bpe)), None)


def test_another_class_is_named(tmp_path):
  with pytest.raises(UserError, match='NoneType is a vocabulary'):
    run_tokenizer.write(tmp_path, None, None)


@pytest.mark.parametrize('lost', [False, True])
def test_a_run_keeps_its_tokenizer_where_its_chat_template_is_lost(tmp_path, capsys, lost):
  chats = tmp_path / 'chats.jsonl'
  chats.write_text(
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
  )
  template = tmp_path / 'template.json'
  template.write_text('{"chat_template": "{{ messages }}"}')
  bindings = [f'FILES={str(chats)!r}', f'objectives.Conversation.template={str(template)!r}']
  config = configs.load(['gin/runs/tiny.gin', 'gin/objectives/conversation.gin'], bindings)
  (tmp_path / 'config.gin').write_text(config.text)
  out = tmp_path / 'out'
  out.mkdir()
  if lost:
    template.write_text('{}')
  ids = companions.write_companions(out, tmp_path, 300)
  written = json.loads((out / 'tokenizer_config.json').read_text())
  assert ids['eos_token_id'] == 1
  assert written.get('chat_template') == (None if lost else '{{ messages }}')
  assert ('chat template of' in capsys.readouterr().out) == lost
