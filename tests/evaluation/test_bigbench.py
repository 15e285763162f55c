"""A trained model on BIG-bench's own files, through lm-eval and our engine: eight figures.

The files are in the source archive of a package of the Python index. It has no wheel, so it is no group of
pyproject.toml:

    pip download --no-deps --no-binary :all: bigbench==1.0.0      # 358 MB
    BIGBENCH=bigbench-1.0.0.tar.gz pytest -m slow -n 0 tests/evaluation/test_bigbench.py
"""

import json
import os
import pathlib
import tarfile

import pytest

from research.evaluation import lm_eval_model
from tests import trained
from tests.evaluation.test_lm_eval_tasks import engine_of

# Accuracy and accuracy by length, of the first 100 items after two solved ones, which lm-eval's own Hugging
# Face backend gave on torch for SmolLM2-135M-Instruct (4 bits dequantised).
REFERENCE = {
  'arithmetic/1_digit_addition': (0.59, 0.75),
  'arithmetic/2_digit_addition': (0.07, 0.59),
  'arithmetic/3_digit_addition': (0.04, 0.70),
  'hindu_knowledge': (0.32, 0.33),
}
ITEMS = 100
TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{input}}}}\\nA:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def write_task(archive: tarfile.TarFile, task: str, folder: pathlib.Path) -> str:
  """Writes the first items of a task as lm-eval reads them; the name of the task there."""
  path = f'bigbench-1.0.0/bigbench/benchmark_tasks/{task}/task.json'
  examples = json.load(archive.extractfile(path))['examples'][:ITEMS]
  name = task.rpartition('/')[2]
  rows = folder / f'{name}.jsonl'
  with rows.open('w') as file:
    for example in examples:
      choices = list(example['target_scores'])
      answer = choices.index(max(choices, key=example['target_scores'].get))
      row = {'input': example['input'], 'choices': choices, 'answer': answer}
      file.write(json.dumps(row) + '\n')
  (folder / f'{name}.yaml').write_text(TASK.format(name=name, rows=rows))
  return name


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # lm-eval's and its dependencies' own
def test_eight_figures_of_a_trained_model(tmp_path, monkeypatch):
  if 'BIGBENCH' not in os.environ:
    pytest.skip('BIGBENCH does not name the archive bigbench-1.0.0.tar.gz (see above)')
  lm_eval = pytest.importorskip('lm_eval')
  from lm_eval.tasks import TaskManager

  for name in ('HF_HOME', 'HF_DATASETS_CACHE'):
    monkeypatch.setenv(name, str(tmp_path / 'hub'))
  with tarfile.open(os.environ['BIGBENCH']) as archive:
    names = [write_task(archive, task, tmp_path) for task in REFERENCE]
  manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
  with engine_of(trained.smollm2(), 256) as engine:
    results = lm_eval.simple_evaluate(
      lm_eval_model.make_model(engine), tasks=names, num_fewshot=2, bootstrap_iters=0, task_manager=manager
    )['results']  # fmt: skip
  found = [(results[name]['acc,none'], results[name]['acc_norm,none']) for name in names]
  assert [tuple(round(value, 2) for value in pair) for pair in found] == list(REFERENCE.values())
