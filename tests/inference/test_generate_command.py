"""The command on a Hugging Face folder: its text is that of transformers; conversations; flags that clash."""

import io
import json
import sys

import pytest

from research import generate
from research.inference import flags as flags_module
from research.training import program
from tests.huggingface import test_parity as parity

torch = pytest.importorskip('torch')
pytest.importorskip('transformers')
tokenizers = pytest.importorskip('tokenizers')

exported = parity.exported
PROMPT, MORE = 'w5 w9 w7', 6


@pytest.fixture(scope='module')
def folder(exported):
  """A tiny LLaMA with a vocabulary of whole words."""
  path = exported('llama')
  words = {f'w{i}': i for i in range(parity.VOCAB)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='w0'))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(path / 'tokenizer.json'))
  return path


@pytest.fixture
def run(folder, monkeypatch, capsys, one_device):
  """Runs the command within this process; what it printed."""
  monkeypatch.setattr(program, 'keep_compiled', lambda: None)

  def command(*flags) -> str:
    fixed = [f'--hf={folder}', f'--max_tokens={MORE}', '--room=32', '--slots=1']
    monkeypatch.setattr(sys, 'argv', ['generate', *fixed, *flags])
    generate.main(flags_module.parse(generate.__doc__))
    return capsys.readouterr()

  return command


@pytest.fixture(scope='module')
def expected() -> str:
  """What transformers says after the prompt."""
  ids = torch.tensor([[5, 9, 7]])
  with torch.no_grad():
    said = parity._reference('llama').generate(
      ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=MORE, eos_token_id=None,
      pad_token_id=0,
    )  # fmt: skip
  return ' '.join(f'w{int(i)}' for i in said[0, 3:])


def test_a_prompt_and_a_conversation(run, expected, monkeypatch):
  assert run(f'--prompt={PROMPT}').out.strip() == expected
  monkeypatch.setattr(sys, 'stdin', io.StringIO(f'{PROMPT}\n\n{PROMPT}\n'))
  printed = run('--interactive')
  assert [line.strip() for line in printed.out.splitlines()] == [expected, expected]
  assert printed.err.strip() == 'error: the prompt is empty: give some text to continue.'


@pytest.mark.slow
def test_guesses_and_beams_answer_a_file_of_prompts(run, expected, tmp_path):
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text(json.dumps({'prompt': PROMPT}) + '\n')

  def answers(*flags):
    out = tmp_path / f'{len(list(tmp_path.iterdir()))}.jsonl'
    assert (
      '1 prompts answered, 1 of them now' in run(f'--prompts={prompts}', f'--out={out}', *flags).out
    )
    return json.loads(out.read_text())['texts'][0].strip()

  assert answers('--ngram=1', '--guesses=2') == expected
  assert answers('--beams=1') == expected


@pytest.mark.slow
def test_the_model_guesses_for_itself(run, expected, folder):
  assert run(f'--prompt={PROMPT}', f'--draft={folder}', '--guesses=2').out.strip() == expected


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--beams=2', '--ngram=2'], 'give one of --beams and --ngram.'),
    (['--beams=2', '--temperature=1'], 'leave out --samples and --temperature.'),
    (['--ngram=2', '--top=3'], '--top does not work with --ngram'),
    (['--draft=somewhere', '--int8'], '--int8 does not work with --draft'),
    (['--prompts=file'], 'give one of --prompt, --prompts and --interactive.'),
    (['--top=3'], '--top is written to the answers of --prompts'),
    (['--penalty=wu'], '--penalty is of beams'),
    (['--guesses=2'], '--guesses needs --draft or --ngram'),
    (['--together=2'], '--together is for the many prompts of --prompts'),
    (['--together=0'], '--together=0 must be 1 or more.'),
    (['--together=9'], '--together=9 must be at most --slots=8'),
    (['--together=2', '--beams=2'], '--together does not work with --beams'),
    (['--samples=3'], '--samples gives different answers only with --temperature'),
    (['--top_p=0.9'], '--top_p needs --temperature above 0'),
    (['--prompt=b'], '--prompt is given twice'),
    (['--beam=2'], 'no flag --beam=2. Did you mean --beams'),
  ],
)
def test_flags_that_do_not_go_together_are_a_sentence(flags, message, monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['generate', '--hf=x', '--prompt=a', *flags])
  with pytest.raises(SystemExit):
    flags_module.parse('text')
  assert message in capsys.readouterr().err
