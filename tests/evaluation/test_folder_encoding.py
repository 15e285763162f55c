"""A model's own tokenizer: its ids as they are, and what stands in front of a text."""

import json

import pytest
import tokenizers

from research.core.errors import UserError
from research.data.encoding import HuggingFaceEncoding
from research.data.vocabularies import HuggingFaceTokenizer
from research.evaluation.folder_encoding import FolderEncoding
from research.inference import tokenizer

VOCABULARY = {'<s>': 0, '</s>': 1, 'the': 2, 'law': 3, '?': 4}


def write(folder, begins: bool, config: dict, template: str | None = None):
  """A folder with a word tokenizer."""
  words = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token='?'))
  words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  words.add_special_tokens(['<s>', '</s>'])
  if begins:
    words.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
    )
  folder.mkdir()
  words.save(str(folder / 'tokenizer.json'))
  (folder / 'config.json').write_text('{"eos_token_id": [1, 3]}')
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  if template:
    (folder / 'chat_template.jinja').write_text(template)
  return folder


def test_a_tokenizer_that_begins_every_text(tmp_path):
  config = {'bos_token': {'content': '<s>'}, 'eos_token': '</s>', 'chat_template': 'x'}
  encoding = FolderEncoding(write(tmp_path / 'a', True, config))
  assert encoding.encode('the law') == [2, 3]
  assert encoding.encode('<s>the') == [0, 2]  # where the text spells it
  assert encoding.decode([0, 2, 3, 1]) == 'the law'
  assert (encoding.begin, encoding.start, encoding.end, encoding.ends) == (0, 0, 1, (1, 3))
  assert encoding.size == 5
  assert encoding.template == str(tmp_path / 'a' / 'tokenizer_config.json')


def test_a_tokenizer_that_begins_none(tmp_path):
  config = {'bos_token': '<s>', 'eos_token': '</s>'}
  encoding = FolderEncoding(write(tmp_path / 'a', False, config, template='y'))
  assert (encoding.begin, encoding.start, encoding.end) == (None, 0, 1)
  assert encoding.template == str(tmp_path / 'a' / 'chat_template.jinja')
  plain = FolderEncoding(write(tmp_path / 'b', False, {}))
  assert (plain.begin, plain.start, plain.end, plain.template) == (None, 1, 1, None)


def test_a_folder_without_a_tokenizer_or_an_end_is_refused(tmp_path):
  with pytest.raises(UserError, match='has no tokenizer'):
    FolderEncoding(tmp_path)
  folder = write(tmp_path / 'a', True, {})
  (folder / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='names an end token'):
    FolderEncoding(folder)


def test_padding_and_truncation_of_the_file_change_no_text(tmp_path):
  """They are for a model's batches; all-MiniLM-L6-v2's file pads and cuts every text to 128 tokens."""
  folder = write(tmp_path / 'a', True, {'eos_token': '</s>'})
  file = str(folder / 'tokenizer.json')
  changed = tokenizers.Tokenizer.from_file(file)
  changed.enable_padding(length=4, pad_id=4)
  changed.enable_truncation(4)
  changed.save(file)
  assert len(changed.encode('the').ids) == len(changed.encode('the law ' * 9).ids) == 4
  frozen = HuggingFaceEncoding(HuggingFaceTokenizer(file))
  whole = tokenizer.of_folder(folder)
  for text in ('the', 'the law ' * 9):
    words = [VOCABULARY[word] for word in text.split()]
    assert whole.encode(text) == [0, *words]
    for encoding in (FolderEncoding(folder), frozen):
      assert encoding.encode(text) == words


def test_the_separator_of_a_bert_ends_its_texts(tmp_path):
  folder = write(tmp_path / 'a', False, {'sep_token': '</s>'})
  (folder / 'config.json').write_text('{}')
  assert FolderEncoding(folder).end == 1
