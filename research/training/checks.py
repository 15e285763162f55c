"""Checks that model, data, loss and devices fit together, before anything is compiled."""

import dataclasses

from research.core.errors import Invalid
from research.data.batches import Frozen
from research.model import counts
from research.parallel.axes import axis_size
from research.parallel.hosts import host_share
from research.parallel.mesh import Mesh
from research.training.run import Run


def check_fits(run: Run, vocab: int, inputs: tuple[str, ...], train: Frozen) -> None:
  """Raises Invalid where model, data, loss and devices do not fit together."""
  if vocab < train.vocab_size:
    owner = getattr(run.model, 'func', run.model)
    raise Invalid(
      owner,
      'vocab',
      f'{vocab} is less than the {train.vocab_size} tokens of the data; set it to that or more.',
    )
  missing = [name for name in inputs if f'{name}_input_tokens' not in train.features]
  if missing:
    raise Invalid(
      Run,
      'train',
      f'the model reads {missing[0]} tokens and {run.train.name} for this architecture has none.',
    )
  for key in run.loss.reads:
    if key not in train.features:
      why = f'{type(run.loss).__name__} reads {key}, and the rows of {run.train.name} have none.'
      raise Invalid(Run, 'loss', why)
  run.loss.check(vocab, run.train)
  check_divides(run)


def check_divides(run: Run) -> None:
  """Raises Invalid where the mesh in use does not divide the run's batches."""
  devices = axis_size('batch') * run.microbatches
  _, hosts = host_share()
  parts = axis_size('sequence')
  field = 'batch_size'
  for size, cut in reversed(run.batches.sizes()):
    if size * cut % devices:
      raise Invalid(
        Run, field, f'{size * cut} is not a multiple of {devices}, the devices a batch is split over '
        'times the microbatches.',
      )  # fmt: skip
    if size % hosts:
      raise Invalid(Run, field, f'{size} examples do not divide equally among {hosts} hosts.')
    for name, length in run.train.lengths.items():
      if length // cut % parts:
        why = f'{parts} does not divide the length {length // cut} of the {name}; '
        why += 'change Mesh.context or that length.'
        raise Invalid(Mesh, 'context', why)
    field = 'curriculum'


def count_of(run: Run) -> counts.Counts:
  """The counts of the run's model. FLOPs per token are the mean over the run: shorter rows cost less."""

  def count(cut: int) -> counts.Counts:
    return counts.count(run.model, {k: n // cut for k, n in run.train.lengths.items()})

  whole = count(1)
  total = run.batches.examples(run.steps)
  flops = {k: v for k, v in vars(whole).items() if k.startswith('flops_')}
  for steps, size, cut in run.curriculum:
    if cut > 1:
      short = count(cut)
      share = steps * size / total
      flops = {k: v + share * (getattr(short, k) - getattr(whole, k)) for k, v in flops.items()}
  return dataclasses.replace(whole, **flops)
