"""Seeds for what differs from row to row in training: the noise of an embedder, the sizes of nested models."""

import jax
import jax.numpy as jnp
from flax import nnx

from research.data.batches import ROW_SEEDS, Batch
from research.parallel.axes import shard


def are_needed(model: nnx.Module) -> bool:
  """Whether the embedder of a model adds noise, or one of its MLPs is nested."""
  if getattr(getattr(model, 'embedder', None), 'noise', 0.0):
    return True
  return any(getattr(part, 'nested', ()) for _, part in nnx.iter_modules(model))


def with_seeds(batch: Batch, step: jax.Array) -> Batch:
  """The batch with seeds for every row, uint32 [rows, 2]: twice the step, and twice the number of the row.

  Twice, because the two sides of a pair differ in the lowest bit. A run that resumes has the same seeds.
  """
  number = jnp.arange(len(batch['decoder_input_tokens']), dtype=jnp.uint32)
  seeds = jnp.stack([jnp.full_like(number, 2 * step.astype(jnp.uint32)), 2 * number], axis=1)
  return {**batch, ROW_SEEDS: shard(seeds, 'batch', None)}


def without_seeds(batch: Batch) -> Batch:
  """The batch without them, as other models read it."""
  return {key: x for key, x in batch.items() if key != ROW_SEEDS}
