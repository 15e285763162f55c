"""Makes a smaller model out of a trained one: fewer layers, heads, MLP units, or a narrower stream.

    python -m research.shrink --checkpoint=RUN --gin_file=RUN/config.gin --gin.MLP=96 --out=FOLDER

The gin file is the run's own, and the bindings give the smaller sizes. What goes is what matters least on some
examples of its training stream: layers by the loss without them, units by their activations (Muralidharan et
al. 2024, arXiv:2407.14679). --out gets config.gin, with the smaller sizes, a checkpoint from which a run heals
it (gin/tuning/heal.gin), and the tokenizer of a converted model.
"""

import itertools
import json
import pathlib
import re

from research.core import cli
from research.core.errors import UserError

# Lines of a resolved model that may differ: sizes (shrinking itself refuses some), how parameters would start,
# how layers are compiled, and which sizes are trained at once.
_SIZES = 'embed|mlp|heads|kv_heads|head_dim|repeats|vocab|experts'
MAY_DIFFER = rf'\s*(({_SIZES}) = \d+|(init|init_scale|stddev|scan|remat|nested) = .*)'


def main(flags) -> None:
  """Shrinks the checkpoint, and writes the smaller one."""
  import jax  # --help must not cost seconds

  from research.checkpoints.pretrained import Pretrained
  from research.core import configs, storage
  from research.data.batches import batch_at
  from research.data.cache import open_stream
  from research.huggingface import companions
  from research.model import counts
  from research.model.parameters import size
  from research.parallel import hosts
  from research.parallel.mesh import Mesh
  from research.training.checks import check_vocabulary
  from research.tuning import shrinking

  out = pathlib.Path(flags.out)
  if out.exists():
    raise UserError(f'--out={out} is there already; name a new folder.')
  config = configs.load(flags.gin_file, flags.gin)
  with config.explains():
    run = config.build()
    trained = Pretrained(folder=flags.checkpoint)
    original = trained.model
  check_same(original, run.model)
  frozen = open_stream(run.train)
  model, smaller = counts.abstract(original), counts.abstract(run.model)
  with config.explains():
    check_vocabulary(run, model.vocab, frozen)
  with Mesh().use(jax.devices()[:1]):
    batches = [
      hosts.place(batch_at(frozen, run.batch_size, run.seed, number))
      for number in range(flags.batches)
    ]
    params, kept = shrinking.shrink(model, smaller, trained.params(), batches)
  shrinking.write(out, params)
  companions.copy_companions(pathlib.Path(flags.checkpoint), out)
  storage.write_atomic(out / 'config.gin', config.text)
  storage.write_atomic(out / 'shrunk.json', json.dumps(kept.described(), indent=1) + '\n')
  before, after = size(model), size(smaller)
  print(f'{before:,.0f} parameters became {after:,.0f} ({after / before:.0%})')
  print(f'{kept.losses[0]:.4f} nats per token became {kept.losses[-1]:.4f}, before any healing')
  print(f'wrote {out}')


def check_same(original, smaller) -> None:
  """Refuses a smaller model that differs in more than sizes: its parameters would compute something else.

  Args:
    original, smaller: resolved models.
  """
  from research.core.describe import describe

  texts = [describe(model).splitlines() for model in (original, smaller)]
  both = [[line for line in lines if not re.fullmatch(MAY_DIFFER, line)] for lines in texts]
  for old, new in itertools.zip_longest(*both, fillvalue='nothing'):
    if old != new:
      raise UserError(
        f"the checkpoint's model has {old.strip()!r} where the gin files say {new.strip()!r}: name the "
        "run's own config.gin, and change sizes alone."
      )


def _flags():
  parser = cli.parser('shrink', __doc__)
  parser.add_argument(
    '--checkpoint', required=True, metavar='FOLDER', help='of a run, or converted'
  )
  parser.add_argument('--out', required=True, metavar='FOLDER', help='the smaller model to write')
  parser.add_argument(
    '--batches', type=int, default=4, help='of the training stream, to measure on (default 4)'
  )
  flags = cli.parse(parser)
  if flags.batches < 1:
    parser.error('--batches must be 1 or more.')
  return flags


if __name__ == '__main__':
  cli.run(main, _flags())
