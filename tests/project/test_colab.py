"""The notebooks run, small."""

import json
import pathlib

import matplotlib
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize('notebook', sorted(p.name for p in (ROOT / 'colab').glob('*.ipynb')))
def test_a_notebook_runs(notebook, tmp_path, monkeypatch, text_file, one_device):
  matplotlib.use('agg')
  cells = json.loads((ROOT / 'colab' / notebook).read_text())['cells']
  code = '\n\n'.join(''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code')
  # The same code on a small text, in a folder of its own.
  code = code.replace('FILES = None', f"FILES = '{text_file}'").replace('STEPS = 100', 'STEPS = 3')
  for name in ('research', 'gin', 'experiments'):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.chdir(tmp_path)
  exec(compile(code, notebook, 'exec'), {'__name__': 'notebook'})
