"""Who samples the completions of a round: the learner's own devices, or hosts of a Ray cluster beside it.

The prompts of a round are divided into equal parts, each one batch. A completion depends on its prompt, its
seed and the parameters, and the last bits of its numbers on the shape of its batch. So a round is the same to
the bit, wherever its parts are sampled, if the devices are of one kind.
"""

import dataclasses
import functools
import pickle

import jax
import numpy as np

from research.core.errors import Invalid
from research.parallel import ray_cluster, ray_tasks
from research.parallel.mesh import Mesh
from research.reinforcement.prompts import Prompt
from research.reinforcement.sampler import Rows, Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samplers:
  """Samples the parts of a round one after the other, on the devices that learn.

  Attributes:
    parts: how many; more take less memory at once.
  """

  parts: int = 1

  def __post_init__(self):
    if not isinstance(self.parts, int) or self.parts < 1:
      raise Invalid(type(self), 'parts', f'{self.parts!r} must be a positive whole number.')

  def __call__(
    self, sampler: Sampler, params: dict, prompts: list[Prompt], seeds: np.ndarray
  ) -> Rows:
    """The rows of `sampler`, in the order of the prompts.

    Args:
      sampler: samples one part.
      params: of the policy.
      prompts: a multiple of `parts`.
      seeds: int32 [prompts, completions of each].
    """
    if self.parts == 1:
      return sampler(params, prompts, seeds)
    parts = self._divided(sampler, prompts, seeds)
    return Rows.joined([sampler(params, *part) for part in parts])

  def _divided(self, sampler, prompts, seeds) -> list[tuple[list[Prompt], np.ndarray, int]]:
    """(prompts, seeds, padded length) of each part."""
    # All parts have the shape that the longest prompt of the round needs.
    length = sampler.padded(prompts)
    size = len(prompts) // self.parts
    starts = range(0, len(prompts), size)
    return [(prompts[i : i + size], seeds[i : i + size], length) for i in starts]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnRay(Samplers):
  """Samples the parts of a round as tasks of a Ray cluster, which get the parameters through its object store.

  A part that is lost with its host is sampled again. The learner waits meanwhile: a round is on-policy.

  Attributes:
    address: HOST:PORT of the cluster's head, as for `launchers.ray.Ray`; this machine must be a node of it.
    cpus, gpus, resources: what the sampler of a part takes of a host; it uses one device.
  """

  address: str | None = None
  cpus: float = 1.0
  gpus: float = 0.0
  resources: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    super().__post_init__()
    ray_cluster.check_amounts(OnRay, self.cpus, self.gpus, self.resources)

  def __call__(
    self, sampler: Sampler, params: dict, prompts: list[Prompt], seeds: np.ndarray
  ) -> Rows:
    """As `Samplers`.

    Raises:
      UserError: the cluster cannot be joined, or has no host with what a sampler takes.
    """
    ray_cluster.connect(self.address, 'samplers.OnRay')
    import ray

    needs = ray_cluster.Needs(cpus=self.cpus, gpus=self.gpus, resources=self.resources)
    tasks = ray_tasks.Tasks('research.reinforcement.samplers', 'sample', needs)
    stored = ray.put(jax.device_get(params))
    kept = _pickled(sampler)
    parts = self._divided(sampler, prompts, seeds)
    calls = {i: (kept, stored, pickle.dumps(part)) for i, part in enumerate(parts)}
    values = ray_tasks.do_all(tasks, calls)
    return Rows.joined([pickle.loads(values[i]) for i in range(len(parts))])


@functools.lru_cache(maxsize=1)
def _pickled(sampler: Sampler) -> bytes:
  """The sampler as bytes, the same ones in every round."""
  # Python's pickle cannot: an activation of a model is a function that jax has wrapped.
  from ray import cloudpickle

  return cloudpickle.dumps(sampler)


def sample(sampler: bytes, params, part: bytes) -> bytes:
  """Samples one part on this host; returns its pickled rows.

  Args:
    sampler: a pickled `Sampler`.
    params: Ray's reference of the parameters.
    part: a pickled part of `Samplers._divided`.
  """
  import ray

  with Mesh().use(jax.local_devices()[:1]):
    return pickle.dumps(_unpickled(sampler)(ray.get(params), *pickle.loads(part)))


@functools.lru_cache(maxsize=1)
def _unpickled(sampler: bytes) -> Sampler:
  """One object for all rounds, so that its program is compiled once."""
  return pickle.loads(sampler)
