"""What is said of a Ray cluster that cannot be joined."""

import socket
import sys
import types

import pytest

from research.core.errors import Invalid, UserError
from research.parallel import ray_cluster


def test_without_the_extra_the_launcher_says_how_to_install_it(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ray', None)
  with pytest.raises(UserError, match=r'--launcher=ray needs Ray: uv sync --extra ray'):
    ray_cluster.connect('127.0.0.1:1', '--launcher=ray')


def test_an_address_where_no_head_answers_is_told(monkeypatch):
  # Ray itself is not asked, and takes seconds to import.
  absent = types.SimpleNamespace(is_initialized=lambda: False)
  monkeypatch.setitem(sys.modules, 'ray', absent)
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    port = closed.getsockname()[1]
  with pytest.raises(UserError, match=rf'--address=127.0.0.1:{port}: no Ray head answers there'):
    ray_cluster.connect(f'127.0.0.1:{port}', '--launcher=ray')
  with pytest.raises(UserError, match='give HOST:PORT of the head'):
    ray_cluster.connect('ray://head:10001', '--launcher=ray')


def test_other_versions_of_a_cluster_are_named():
  text = """Version mismatch: The cluster was started with:
    Ray: 2.58.0
    Python: 3.11.7
This process on node 10.0.0.2 was started with:
    Ray: 2.60.0
    Python: 3.11.7
"""
  said = ray_cluster._why_not_joined('--address=head:6379', RuntimeError(text))
  assert 'different versions (Ray 2.58.0 and 2.60.0); install the same Python' in said


def test_a_machine_outside_of_the_cluster_is_told():
  nowhere = ConnectionError('Could not find any running Ray instance. Please specify ...')
  said = ray_cluster._why_not_joined('--address=auto', nowhere)
  assert said.startswith('--address=auto: no Ray runs on this machine; start one with ray start')
  outside = RuntimeError("Can't find a node_ip_address.json file\n from /tmp/ray")
  said = ray_cluster._why_not_joined('--address=head:6379', outside)
  assert said == (
    "--address=head:6379: this machine could not join the cluster (Can't find a node_ip_address.json file from "
    '/tmp/ray); it must be a node of it: ray start --address=HOST:PORT.'
  )
  slow = RuntimeError('The current node timed out during startup.')
  said = ray_cluster._why_not_joined('--launcher=ray', slow, named=False)
  assert said.startswith('--launcher=ray: the cluster of this machine did not start (The current')


@pytest.mark.parametrize(
  ('resources', 'why'),
  [
    ({'TPU': -4}, "-4 of 'TPU' must be a positive number"),
    ({'TPU': 0}, "0 of 'TPU' must be a positive number"),
    ({'TPU': 'four'}, "'four' of 'TPU' must be a positive number"),
    ({'CPU': 2}, "'CPU' is not set here but by 'cpus'"),
  ],
)
def test_amounts_that_ray_would_refuse_are_told(resources, why):
  with pytest.raises(Invalid, match=rf'Needs\.resources: {why}'):
    ray_cluster.check_amounts(ray_cluster.Needs, 1, 0, resources)
