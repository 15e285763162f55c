"""Models that somebody trained, converted: the loss on a story is that of transformers on the same files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from research.core import configs
from research.huggingface import inwards
from research.model import counts
from research.parallel.mesh import Mesh
from tests import trained

TOKENS = 1024
# Characters that Project Gutenberg's preface and the first lines of the story take.
START = 3000
# nats per token, of transformers 5.23 on the same files in float32.
LOSSES = {'smollm2': 3.41330, 'gemma3': 3.32569}


@pytest.mark.slow
@pytest.mark.parametrize('name', LOSSES)
def test_the_loss_on_a_story(name, request):
  folder = request.getfixturevalue(name)
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  ids = np.array(tokenizer.encode(trained.story()[START:]).ids[:TOKENS], np.int32)
  text, params = inwards.load(folder)
  gin = configs.Config('MODEL')
  gin._read(text, 'model.gin')

  with Mesh().use(jax.devices()[:1]):
    graphdef = nnx.graphdef(counts.abstract(gin.tree()))

    @jax.jit
    def loss(params, ids):
      logits = nnx.merge(graphdef, params)({'decoder_input_tokens': ids[None]})[0][0, :-1]
      picked = jnp.take_along_axis(logits, ids[1:, None], axis=-1)[:, 0]
      return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    assert float(loss(params, ids)) == pytest.approx(LOSSES[name], abs=1e-4)
