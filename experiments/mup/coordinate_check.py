"""The coordinate check of muP: how much a few steps change the logits, by width.

    python experiments/mup/coordinate_check.py --figure=experiments/mup/coordinate_check.png

Under the standard parametrisation at one learning rate, the logits of wider models change more; under muP they
change alike at every width (Yang et al. 2022, arXiv:2203.03466, appendix D.1).
"""

import argparse
import pathlib
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
KINDS = 8
PARAMETRISATIONS = {'standard': 'gin/optimizers/adamw.gin', 'muP': 'gin/optimizers/mup_adamw.gin'}


def movement(optimizer: str, width: int, steps: int = 4, rate: float = 0.01) -> float:
  """Root mean square of the change of a tiny LLaMA's logits after `steps` steps on one batch."""
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from research.core import configs
  from research.parallel import mesh

  bindings = [f'EMBED={width}', f'MLP={2 * width}', f'HEADS={width // 16}', 'LAYERS=1']
  bindings += ['MUP_BASE=32'] if 'mup' in optimizer else []
  run = configs.load(['gin/runs/tiny.gin', optimizer], bindings).build()
  # Few kinds of token, as text has few frequent ones, so that a step's change for one serves others. With 256
  # different tokens most logits would move by chance, as width^-1/2 or width^1/2, whatever the rates.
  tokens = np.random.default_rng(0).integers(2, 2 + KINDS, (8, 33), np.int32)
  batch = {'decoder_input_tokens': tokens[:, :-1]}
  with mesh.Mesh().use(jax.devices()[:1]):
    module = run.model(rngs=nnx.Rngs(params=jax.random.key(0)))
    graphdef = nnx.graphdef(module)
    params = nnx.to_pure_dict(nnx.state(module))
    # The head starts at 0, as that paper advises: the effect of a random start falls with width in any
    # parametrisation.
    params['head']['kernel'] *= 0.0
    tx = run.optimizer(learning_rate=rate)
    logits = jax.jit(lambda params: nnx.merge(graphdef, params)(batch)[0])

    def loss(params):
      log_p = jax.nn.log_softmax(nnx.merge(graphdef, params)(batch)[0])
      hit = jax.nn.one_hot(tokens[:, 1:], log_p.shape[-1])
      return -jnp.mean(jnp.sum(log_p * hit, axis=-1))

    @jax.jit
    def step(params, opt):
      updates, opt = tx.update(jax.grad(loss)(params), opt, params)
      return jax.tree.map(jnp.add, params, updates), opt

    first = logits(params)
    opt = tx.init(params)
    for _ in range(steps):
      params, opt = step(params, opt)
    return float(jnp.sqrt(jnp.mean((logits(params) - first) ** 2)))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--widths', default='32,64,128,256')
  parser.add_argument('--figure', help='where to save the plot')
  flags = parser.parse_args()
  widths = [int(width) for width in flags.widths.split(',')]
  changes = {
    name: [movement(file, width) for width in widths] for name, file in PARAMETRISATIONS.items()
  }
  for name, values in changes.items():
    slope = np.polyfit(np.log(widths), np.log(values), 1)[0]
    shown = ', '.join(f'{width}: {value:.3f}' for width, value in zip(widths, values, strict=True))
    print(f'{name}: {shown}; grows as width^{slope:.2f}')
  if flags.figure:
    draw(widths, changes, flags.figure)


def draw(widths: list[int], changes: dict[str, list[float]], path: str) -> None:
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(5, 3.5))
  for name, values in changes.items():
    axes.loglog(widths, values, 'o-', label=name)
  axes.set(xlabel='width', ylabel='RMS change of the logits in 4 steps', xticks=widths)
  axes.set_xticklabels(widths)
  axes.set_yticks([1, 2, 4, 8], ['1', '2', '4', '8'])
  axes.minorticks_off()
  axes.legend()
  figure.tight_layout()
  figure.savefig(path, dpi=120)


if __name__ == '__main__':
  main()
