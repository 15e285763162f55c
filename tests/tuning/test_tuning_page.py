"""The commands of docs/tuning.md run; the last ones on a trained model."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from research.core import configs, storage
from research.tuning import merge

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / 'docs' / 'tuning.md').read_text()
BLOCKS = [block.strip().splitlines() for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL)]
INSTRUCT = BLOCKS[-1]
COMMANDS = [command for block in BLOCKS[:-1] for command in block]


def run(command: str, folder: pathlib.Path, environment: dict, *more: str) -> None:
  """Runs a command of the page, with `folder` in place of /tmp."""
  words = shlex.split(command.replace('/tmp/', f'{folder}/'))
  assert words[:4] == ['uv', 'run', 'python', '-m'], command
  more = more if words[4] == 'research.train' else ()
  done = subprocess.run(
    [sys.executable, '-m', *words[4:], *more],
    cwd=ROOT, env={**environment, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr


def test_every_file_it_names_is_there():
  for name in re.findall(r'gin/[\w/]+\.gin', PAGE):
    assert (ROOT / name).exists(), name
  named = set(re.findall(r'gin/tuning/\w+\.gin', PAGE))
  assert named == {f'gin/tuning/{path.name}' for path in (ROOT / 'gin' / 'tuning').iterdir()}


@pytest.mark.slow
def test_its_commands_run(text_file, user_environment, tmp_path):
  (tmp_path / 'files.gin').write_text(
    f"""
from __gin__ import dynamic_registration
from research.data import corpora
from research.data import streams
streams.Stream.corpus = @corpora.TextFiles()
corpora.TextFiles.files = '{text_file}'
corpora.TextFiles.validation_fraction = 0.2
"""
  )
  small = [f'--gin_file={tmp_path / "files.gin"}', '--gin.Run.steps=4']
  small += ['--gin.Run.eval_every=None', '--gin.Run.checkpoint_every=None']
  for command in COMMANDS:
    run(command, tmp_path, user_environment, *small)
  rows = {
    name: json.loads((tmp_path / name / 'run.json').read_text())
    for name in ('base', 'full', 'lora')
  }
  assert rows['full']['init/loss'] == rows['lora']['init/loss'] == rows['base']['loss']
  assert rows['lora']['params_learned'] < rows['lora']['params_total'] / 3
  assert (tmp_path / 'merged' / 'model.safetensors').is_file()
  config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
  assert config['r'] == 8


def conversations(count: int) -> list[dict]:
  """Conversations about made-up words: the assistant spells a word backwards, letter by letter."""
  random = np.random.default_rng(0)
  lines = []
  for _ in range(count):
    word = ''.join(random.choice(list('abcdefgh'), size=4))
    turns = [
      ('user', f'Spell {word} backwards.'),
      ('assistant', ' - '.join(reversed(word)).upper()),
    ]
    lines.append({'messages': [{'role': role, 'content': text} for role, text in turns]})
  return lines


@pytest.mark.slow
def test_a_trained_model_is_tuned_on_a_set_of_ones_own(smollm2, user_environment, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  (tmp_path / 'downloaded').symlink_to(smollm2)
  (tmp_path / 'chats.jsonl').write_text('\n'.join(map(json.dumps, conversations(120))) + '\n')
  small = [
    '--gin.LENGTH=64', '--gin.Run.steps=8', '--gin.Run.batch_size=4', '--gin.Run.eval_every=4',
    '--gin.Run.checkpoint_every=None', '--gin.LEARNING_RATE=1e-3', '--gin.Run.log_every=1',
  ]  # fmt: skip
  for command in INSTRUCT:
    run(command, tmp_path, user_environment, *small)
  rows = storage.read_rows(tmp_path / 'instruct' / 'metrics.jsonl')
  held_out = [row['validation/loss'] for row in rows if 'validation/loss' in row]
  first = rows[0]['loss']
  assert held_out[-1] < held_out[0] < first
  assert held_out[-1] < 0.7 * first
  # The checkpoints take less than a twentieth of the model's parameters and moments in float32.
  files = (tmp_path / 'instruct' / 'checkpoints').rglob('*')
  saved_bytes = sum(path.stat().st_size for path in files if path.is_file())
  assert saved_bytes < 0.05 * 3 * 4 * 134.5e6
  # transformers computes from the merged folder what the run's own model computes.
  tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'tuned').eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'tuned')
  turns = conversations(1)[0]['messages']
  ids = tokenizer.apply_chat_template(turns, return_tensors='pt', return_dict=True)['input_ids']
  with torch.no_grad():
    theirs = tuned(ids).logits.numpy()
  np.testing.assert_allclose(our_logits(tmp_path / 'instruct', ids.numpy()), theirs, atol=2e-3)


def our_logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  """The logits of a run's model, with its adapters unmerged."""
  import jax
  from flax import nnx

  from research.checkpoints.pretrained import Pretrained
  from research.parallel.mesh import Mesh

  trained = Pretrained(folder=str(folder))
  with Mesh().use(jax.devices()[:1]):
    params = trained.params()
    graphdef = nnx.graphdef(trained.abstract)
    batch = {'decoder_input_tokens': tokens.astype(np.int32)}
    return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(batch)[0])(params))


def test_instruction_tuning_resolves(tmp_path):
  (tmp_path / 'chats.jsonl').write_text(json.dumps(conversations(1)[0]))
  (tmp_path / 'tokenizer.json').write_text('{}')
  (tmp_path / 'template.jinja').write_text('{{ messages }}')
  lines = [
    f"BASE='{tmp_path}'",
    f"FILES='{tmp_path}/chats.jsonl'",
    f"TOKENIZER='{tmp_path}/tokenizer.json'",
  ]
  lines.append(f"TEMPLATE='{tmp_path}/template.jinja'")
  files = ['gin/runs/instruct.gin', 'gin/models/llama/tiny.gin']
  run = configs.load(files, lines).tree().keywords
  assert run['learns'] == ('.*/lora_[ab]',)
  assert merge.has_weights(run['model'])
