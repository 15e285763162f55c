"""One function for all members of a population, each device having its share of them."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def goes_one_by_one() -> bool:
  """Whether a device goes through its members one after the other.

  An accelerator is filled by all at once. A CPU is filled by one: products of a batch of small matrices are
  slow there, and one member fits into its cache.
  """
  return jax.devices()[0].platform == 'cpu'


def over_members(f: Callable) -> Callable:
  """(each member's arguments, shared arguments) -> f of them, for all members that are `active`.

  Args:
    f: takes a dict of a member's own arguments and one of shared arguments. Where it takes `state`, its first
      result is the new state.

  Returns:
    The function of arguments [places, ...]. What f makes of `state` stays as it was for members that are not
    active; other results are zero for them.
  """
  f = jax.jit(f)  # traced once

  def on_one_device(own, shared):
    active = own['active']

    def member(i, tree):
      return jax.tree.map(lambda x: x[i], tree)

    def zeros(x):
      return jnp.zeros((len(active), *x.shape), x.dtype)

    results = jax.tree.map(zeros, jax.eval_shape(f, member(0, own), shared))
    if 'state' in own:
      results = own['state'], *results[1:]
    if not goes_one_by_one():

      def if_active(own, results):
        return jax.lax.cond(own['active'], lambda: f(own, shared), lambda: results)

      return jax.vmap(if_active)(own, results)
    # The active ones first: the loop ends before the others.
    order = jnp.argsort(~active, stable=True)

    def one(i, results):
      # Each member is updated in its place, where the step before left it.
      mine = {**own, 'state': results[0]} if 'state' in own else own
      new = f(member(order[i], mine), shared)

      def put(all_members, x):
        return jax.lax.dynamic_update_index_in_dim(all_members, x, order[i], 0)

      return jax.tree.map(put, results, new)

    return jax.lax.fori_loop(0, jnp.sum(active), one, results)

  on_one_device.__name__ = f.__name__  # in logs and profiles
  specs = (jax.P('member'), jax.P())
  return jax.shard_map(on_one_device, in_specs=specs, out_specs=jax.P('member'), check_vma=False)
