"""A model's own tokenizer: its ids as they are, and what stands in front of a text."""

import json

import pytest
import tokenizers

from research.core.errors import UserError
from research.evaluation.folder_encoding import FolderEncoding

VOCABULARY = {'<s>': 0, '</s>': 1, 'the': 2, 'law': 3, '?': 4}


def write(folder, begins: bool, config: dict, template: str | None = None):
  """A folder with a word tokenizer."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(VOCABULARY, unk_token='?'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.add_special_tokens(['<s>', '</s>'])
  if begins:
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
      single='<s> $A', special_tokens=[('<s>', 0)]
    )
  folder.mkdir()
  tokenizer.save(str(folder / 'tokenizer.json'))
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
