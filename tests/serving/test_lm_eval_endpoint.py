"""lm-eval's own client of endpoints gives what the adapter beside the model gives."""

import jax
import pytest

from research.evaluation import generated_tasks, lm_eval_model, loading
from research.evaluation.suite import Suite, make_engine
from research.parallel.mesh import Mesh

PAIRS = [('The cat', ' sat'), ('A', ' b c d e'), ('x = 1\ny =', ' 2'), ('', 'start'), ('abc', 'd')]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # lm-eval's and its dependencies' own
def test_the_same_numbers_through_the_endpoint(url, llama):
  pytest.importorskip('lm_eval')
  pytest.importorskip('tenacity')
  pytest.importorskip('transformers')
  from lm_eval.api.instance import Instance
  from lm_eval.models.openai_completions import LocalCompletionsAPI

  def asked(kind, arguments):
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]

  theirs = LocalCompletionsAPI(
    # It takes two tokens off for its windows.
    base_url=f'{url}/v1/completions', model='tiny', tokenizer=str(llama), max_length=129,
    tokenizer_backend='huggingface', num_concurrent=4,
  )  # fmt: skip
  opened = loading.open_hf(llama)
  suite = Suite(tasks=(generated_tasks.Copying(),), batch_size=2, length=127)
  with Mesh(data=1).use(jax.local_devices()[:1]):
    model = loading.abstract_model(opened.model)
    engine, _ = make_engine(
      suite, model, lambda: loading.read_params(opened), None, opened.tokenizer
    )
    ours = lm_eval_model.make_model(engine)
    for kind, arguments in (
      ('loglikelihood', PAIRS),
      ('loglikelihood_rolling', [('A longer text that is scored in windows. ' * 6,)]),
      ('generate_until', [('abc', {'until': ['zz'], 'max_gen_toks': 12, 'temperature': 0})]),
    ):
      requests = asked(kind, arguments)
      expected, found = getattr(ours, kind)(requests), getattr(theirs, kind)(requests)
      if kind == 'loglikelihood':
        assert [nats for nats, _ in found] == pytest.approx([n for n, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
      elif kind == 'generate_until':
        assert found == expected
      else:
        assert found == pytest.approx(expected, abs=1e-3)
