"""Which tokens a grammar allows, for tokenizers of each kind."""

import pytest
import tokenizers

from research.core.errors import UserError
from research.data import encoding, vocabularies

pytest.importorskip('llguidance')

from research.evaluation.folder_encoding import FolderEncoding
from research.serving import grammar
from research.serving import vocabulary as vocabulary_room
from research.serving.bodies import Tool
from research.serving.vocabulary import Vocabulary

SCHEMA = {'type': 'object', 'properties': {'a': {'type': 'integer'}}, 'additionalProperties': False}
TOOL = {'name': 'f', 'parameters': {'$ref': '#/$defs/x', '$defs': {'x': SCHEMA}}}


@pytest.fixture(scope='module', params=['bytes', 'tokenizer.json', 'a folder'])
def vocabulary(request, llama):
  folder = FolderEncoding(llama)
  if request.param == 'a folder':
    return Vocabulary(folder, (), folder.ends, whole=True)
  own = encoding.ByteEncoding()
  if request.param == 'tokenizer.json':
    file = vocabularies.HuggingFaceTokenizer(str(llama / 'tokenizer.json'), eos='<|im_end|>')
    own = encoding.HuggingFaceEncoding(file)
  return Vocabulary(own, (0,), (own.end,), whole=False)


def allows(rules: str, vocabulary: Vocabulary, text: str) -> bool:
  """Whether the grammar lets a text be said, a token at a time, and end there."""
  size = vocabulary.encoding.size + 5  # a model may have logits that no token has
  (mask,), said = grammar.masks(rules, vocabulary, size, 1), []
  for token in vocabulary.encoding.encode(text):
    allowed = mask(said)
    assert allowed.shape == (size,)
    assert not allowed[-5:].any()
    if not allowed[token]:
      return False
    said.append(token)
  return bool(mask(said)[list(vocabulary.ends)].all())


def test_a_schema(vocabulary):
  rules = grammar.of_schema(SCHEMA, 'x')
  assert allows(rules, vocabulary, '{"a": 12}')
  assert allows(rules, vocabulary, '{}')
  for text in ('{"a": 1', '{"a": "1"}', '{"b": 1}', ' {}', 'text'):
    assert not allows(rules, vocabulary, text)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
  ('forced', 'parallel', 'right', 'wrong'),
  [
    (True, False, [CALL], ['', 'text', f'{CALL}\n{CALL}', CALL.replace('1', '"1"')]),
    (True, True, [CALL, f'{CALL}\n{CALL}'], ['', f'{CALL} text']),
    (False, True, ['', 'text <b>é', CALL, f'text {CALL}\n{CALL} text'], [CALL.replace('"f"', '"g"')]),
  ],
)  # fmt: skip
def test_calls(forced, parallel, right, wrong, vocabulary):
  tool = Tool.model_validate({'type': 'function', 'function': TOOL})
  rules = grammar.of_calls([tool], forced=forced, parallel=parallel)
  assert [text for text in right if not allows(rules, vocabulary, text)] == []
  assert [text for text in wrong if allows(rules, vocabulary, text)] == []


def test_what_each_token_spells(vocabulary):
  text = 'aé\n <x>'
  ids = vocabulary.encoding.encode(text)
  assert b''.join(map(vocabulary.spell, ids)) == text.encode()
  assert vocabulary.spell(10**6) == b''
  assert set(vocabulary.ends) <= set(vocabulary.special)


def test_a_sentencepiece_model_spells_its_pieces(tmp_path):
  sentencepiece = pytest.importorskip('sentencepiece')
  text = tmp_path / 'text.txt'
  text.write_text('the cat and the hat sat on the mat\n' * 20)
  sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(tmp_path / 'm'), vocab_size=290, byte_fallback=True,
    hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    add_dummy_prefix=False,
  )  # fmt: skip
  own = encoding.SentencePieceEncoding(tmp_path / 'm.model')
  vocabulary = Vocabulary(own, (0,), (own.end,), whole=False)
  assert b''.join(map(vocabulary.spell, own.encode('the cat é'))) == 'the cat é'.encode()
  rules = grammar.of_schema(SCHEMA, 'x')
  assert allows(rules, vocabulary, '{"a": 1}')
  assert not allows(rules, vocabulary, '{"a": x}')


def tokenizer_of(model, decoder, special=()):
  tokenizer = tokenizers.Tokenizer(model)
  if decoder:
    tokenizer.decoder = decoder
  tokenizer.add_special_tokens(list(special))
  return tokenizer


WORDS = tokenizers.models.WordLevel({f'w{i}': i for i in range(6)}, unk_token='w0')
PIECES = tokenizers.models.WordPiece(
  {'[UNK]': 0, 'cat': 1, '##s': 2, 'a': 3, '.': 4}, unk_token='[UNK]'
)
UNIGRAM = tokenizers.models.Unigram(
  [('<pad>', 0), ('</s>', 0), ('<unk>', 0), ('\u2581cat', -1), ('s', -2), ('\u2581', -3)], unk_id=2
)
OTHERS = {
  'words': (tokenizer_of(WORDS, None), [3, 5, 0], b' w3 w5 w0'),
  'word pieces': (
    tokenizer_of(PIECES, tokenizers.decoders.WordPiece(), ['[UNK]']),
    [3, 1, 2, 4],
    b' a cats.',
  ),
  "T5's": (
    tokenizer_of(UNIGRAM, tokenizers.decoders.Metaspace(), ['<pad>', '</s>', '<unk>']),
    [3, 4, 3],
    b' cats cat',
  ),
}


@pytest.mark.parametrize('kind', OTHERS)
def test_tokens_without_bytes_of_their_own_are_what_they_add_to_a_text(kind):
  tokenizer, ids, text = OTHERS[kind]
  tokens, special = vocabulary_room._of_json(tokenizer.to_str())
  assert b''.join(tokens[i] for i in ids) == text
  # In the middle of a text they are what the tokenizer decodes.
  assert tokenizer.decode(ids * 2) == (text * 2).decode().lstrip()
  assert [tokens[i].decode() for i in special] == [tokenizer.id_to_token(i) for i in special]


def test_tokens_that_depend_on_their_neighbours_have_no_bytes():
  model = tokenizers.models.BPE({'a': 0, 'b</w>': 1, 'ab</w>': 2, 'c': 3, 'd': 4}, [])
  tokenizer = tokenizer_of(model, tokenizers.decoders.BPEDecoder())
  with pytest.raises(UserError, match='has no bytes of its own; logprobs'):
    vocabulary_room._of_json(tokenizer.to_str())


def test_a_conversation_of_a_run_is_split_turn_by_turn(llama):
  """The ids of a prompt are those that the run was trained on: segments one by one, its EOS between them."""
  own = encoding.ByteEncoding()
  vocabulary = Vocabulary(own, (0,), (own.end,), whole=False)
  ids = vocabulary.of_conversation(['<|user|>\nHi\n<|assistant|>\n', 'Yes\0\n', 'x'])
  expected = [0, *own.encode('<|user|>\nHi\n<|assistant|>\nYes'), own.end, *own.encode('\nx')]
  assert list(ids) == expected
