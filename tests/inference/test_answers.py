"""Files of prompts and of answers: what is not understood is refused, and nothing that exists is lost."""

import json

import pytest

from research.core.errors import UserError
from research.inference import answers
from research.inference.answering import Answering
from research.inference.generator import Generator
from research.inference.tokenizer import Tokenizer

PROMPTS = ['first', 'second']


def row(number, prompt, identity='one') -> str:
  return json.dumps({'number': number, 'prompt': prompt, 'identity': identity}) + '\n'


@pytest.mark.parametrize(
  ('line', 'message'),
  [
    (b'{"prompet": "a"}', r'prompts\.jsonl:2: write a string, or an object with'),
    (b'3', r'prompts\.jsonl:2: write a string'),
    (b'""', r'prompts\.jsonl:2: the prompt is empty: give some text to continue\.'),
    (b'{"prompt": ""}', r'prompts\.jsonl:2: the prompt is empty: give some text to continue\.'),
    (b'{"prompt": null}', r'prompts\.jsonl:2: write a string'),
    (b'{', r'prompts\.jsonl:2: not JSON'),
    (b'{"prompt": "a", "temperature": 1}', r'prompts\.jsonl:2: "temperature" is a setting of all prompts'),
    (b'"\xff"', r'not UTF-8 \(byte 8\)'),
  ],
)  # fmt: skip
def test_a_file_of_prompts_names_the_line_that_is_wrong(line, message, tmp_path):
  path = tmp_path / 'prompts.jsonl'
  path.write_bytes(b'"fine"\n' + line + b'\n')
  with pytest.raises(UserError, match=message):
    answers.read_prompts(path)


@pytest.mark.parametrize('content', [b'', b'\n \n', None])
def test_a_file_without_prompts_is_refused(content, tmp_path):
  path = tmp_path / 'prompts.jsonl'
  if content is None:
    path.mkdir()
  else:
    path.write_bytes(content)
  with pytest.raises(UserError, match=r'has no prompts|directory'):
    answers.read_prompts(path)


def test_prompts_have_any_characters(tmp_path):
  """A mark at the start, ends of lines of Windows, an id, and characters that end lines only elsewhere."""
  path = tmp_path / 'prompts.jsonl'
  prompts = ['a\u2028b', 'naïve \U0001f600', 'c\x85d']
  lines = [json.dumps({'id': 7, 'prompt': prompt}, ensure_ascii=False) for prompt in prompts]
  path.write_bytes(('\ufeff' + '\r\n'.join(lines)).encode())
  assert answers.read_prompts(path) == prompts


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('notes\nof mine', r'out:1: this is no answer'),
    ('notes', r'out:1: this is no answer'),
    (row(0, 'first') + 'notes', r'out:2: this is no answer'),
    (row(0, 'other'), r'out:1 answers another prompt'),
    (row(5, 'first'), r'out:1 answers another prompt'),
    (row(0, 'first', 'two'), r'out:1 was written with other settings or another checkpoint'),
  ],
)
def test_a_file_of_something_else_stays_as_it_is(content, message, tmp_path):
  path = tmp_path / 'out'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    answers.answered(path, PROMPTS, 'one')
  assert path.read_text() == content


@pytest.mark.parametrize('length', [1, 12, 40])
def test_a_line_that_was_cut_off_is_removed(length, tmp_path):
  path = tmp_path / 'out'
  path.write_text(row(1, 'second') + row(0, 'first')[:length])
  assert answers.answered(path, PROMPTS, 'one') == {1}
  assert path.read_text() == row(1, 'second')


class Silent(Answering):
  """Stands for an engine that is asked nothing."""

  room, encoder_room, busy = 8, 0, False


def test_an_answer_file_that_cannot_be_written_is_a_sentence(tmp_path):
  generator = Generator(Silent(), Tokenizer(list, str, 3, ()))
  with pytest.raises(UserError, match=r'--out=.*: .*directory'):
    list(answers.answer_all(generator, [], tmp_path, 'one', samples=1))


@pytest.mark.parametrize(
  ('prompt', 'message'), [('', 'the prompt is empty'), ('a\udcff', 'character 1 is half of a pair')]
)
def test_a_prompt_that_is_no_text_is_refused(prompt, message):
  generator = Generator(Silent(), Tokenizer(list, str, 3, ()))
  with pytest.raises(UserError, match=message):
    generator.request(prompt)
