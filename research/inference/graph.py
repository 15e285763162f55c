"""A model's graph as a static argument of compiled functions, without computing its hash in every call."""

import functools

from flax import nnx


class Graph:
  """A graph with a stored hash.

  jax.jit hashes and compares static arguments in every call. For a graph of 30 layers that takes longer than
  their products for one token. Make this once, with `graph_of`.
  """

  def __init__(self, graphdef: nnx.GraphDef):
    self.graphdef = graphdef
    self._hash = hash(graphdef)

  def __hash__(self) -> int:
    return self._hash

  def __eq__(self, other) -> bool:
    return self is other or (isinstance(other, Graph) and self.graphdef == other.graphdef)


@functools.cache
def graph_of(graphdef: nnx.GraphDef) -> Graph:
  """Returns the same `Graph` for equal graphs, so that comparing them takes no time either."""
  return Graph(graphdef)


def merge(graph: Graph | nnx.GraphDef, params: dict) -> nnx.Module:
  """Returns the model with these parameters."""
  return nnx.merge(graph.graphdef if isinstance(graph, Graph) else graph, params)
