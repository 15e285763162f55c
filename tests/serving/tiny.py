"""Tiny models with a tokenizer of bytes, as Hugging Face folders, and a server of one within this process."""

import contextlib
import json
import pathlib
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from research.data import conversations
from research.evaluation.folder_encoding import FolderEncoding
from research.inference import tokenizer
from research.inference.answering import Answering, Event
from research.inference.generator import Generator
from research.inference.request import Completion
from research.inference.text import TextStream
from research.parallel.mesh import Mesh
from research.serving import server
from research.serving.app import make_app
from research.serving.metrics import Metrics
from research.serving.model_thread import ModelThread
from research.serving.served_model import ServedModel, open_served
from research.serving.vocabulary import Vocabulary

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
SPECIAL = ('<|endoftext|>', '<|im_start|>', '<|im_end|>')
# SmolLM2's, with tools as Qwen writes them.
TEMPLATE = (
  '{%- if tools %}<|im_start|>system\n<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>'
  '<|im_end|>\n{% endif %}'
  '{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}'
  '{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}'
  '<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
PLAIN_TEMPLATE = TEMPLATE.partition('{% endif %}')[2]
SIZES = {
  'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'num_key_value_heads': 2,
  'intermediate_size': 64, 'max_position_embeddings': 1024,
}  # fmt: skip


def write_llama(
  folder: pathlib.Path, template: str | None = TEMPLATE, seed: int = 0
) -> pathlib.Path:
  """A random LLaMA."""
  folder.mkdir(parents=True, exist_ok=True)
  vocab = write_tokenizer(folder, template)
  config = {
    'model_type': 'llama', 'architectures': ['LlamaForCausalLM'], 'hidden_act': 'silu', **SIZES,
    'vocab_size': vocab, 'rms_norm_eps': 1e-5, 'rope_theta': 1e4, 'tie_word_embeddings': True,
    'bos_token_id': None, 'eos_token_id': [2, 0],
  }  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(config))
  random = np.random.default_rng(seed)
  embed, mlp, key = 32, 64, 16

  def matrix(*shape):
    return random.normal(0, 0.3, shape).astype(np.float32)

  tensors = {'model.embed_tokens.weight': matrix(vocab, embed) * 3}
  for layer in range(SIZES['num_hidden_layers']):
    at = f'model.layers.{layer}.'
    attention = {'q': (embed, embed), 'k': (key, embed), 'v': (key, embed), 'o': (embed, embed)}
    tensors |= {f'{at}self_attn.{k}_proj.weight': matrix(*s) for k, s in attention.items()}
    sides = {'gate': (mlp, embed), 'up': (mlp, embed), 'down': (embed, mlp)}
    tensors |= {f'{at}mlp.{k}_proj.weight': matrix(*s) for k, s in sides.items()}
    for norm in ('input_layernorm', 'post_attention_layernorm'):
      tensors[f'{at}{norm}.weight'] = np.ones(embed, np.float32)
  tensors['model.norm.weight'] = np.ones(embed, np.float32)
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  return folder


def write_tokenizer(folder: pathlib.Path, template: str | None) -> int:
  """A tokenizer of bytes with SmolLM2's special tokens; how many ids it has."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in SPECIAL])
  tokenizer.save(str(folder / 'tokenizer.json'))
  config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': '<|im_end|>'}
  if template:
    config['chat_template'] = template
  (folder / 'tokenizer_config.json').write_text(json.dumps(config))
  return len(vocab)


@contextlib.contextmanager
def serving(
  folder: pathlib.Path | None = None,
  *,
  opened=None,
  most: int = 64,
  timeout: float = 60.0,
  key: str | None = None,
  origins: tuple[str, ...] = (),
  mesh: Mesh | None = None,
  devices: int = 1,
  **knobs,
) -> Iterator[str]:
  """The address of a server of a Hugging Face folder, or of what `opened()` gives, on a free port."""
  open_model = opened or (lambda: open_served(None, str(folder), name='tiny', **knobs))

  def in_use():
    return (mesh or Mesh()).use(jax.local_devices()[:devices])

  thread = ModelThread(open_model, in_use, most, Metrics())
  served = thread.start()
  app = make_app(
    served, thread, key=key, timeout=timeout, largest=2**20, only_loopback=True, origins=origins
  )
  ready, address = threading.Event(), []

  def announce(url):
    address.append(url)
    ready.set()

  running = server.Server(server.config_of(app, '127.0.0.1', 0, drain=10), thread, announce)
  background = threading.Thread(target=running.run)
  background.start()
  assert ready.wait(60)
  try:
    yield address[0]
  finally:
    running.should_exit = True
    background.join()
    thread.stop()


class Scripted(Answering):
  """Says what a function of the prompt's text says, a byte a step: a model whose answers a test knows.

  Args:
    say: the text after a prompt.
    pause: seconds of a step.
  """

  room, encoder_room = 4096, 0

  def __init__(self, vocabulary, say, pause: float = 0.0):
    self.vocabulary, self.say, self.pause = vocabulary, say, pause
    self.work: dict[int, tuple] = {}
    self.count = self.steps = 0

  def submit(self, request) -> int:
    text = self.say(self.vocabulary.decode(request.prompt))
    tokens = [*self.vocabulary.encoding.encode(text), self.vocabulary.ends[0]]
    stream = TextStream(self.vocabulary.decode, (), request.stop)
    self.work[self.count] = request, Completion(), tokens, stream
    self.count += 1
    return self.count - 1

  @property
  def busy(self) -> bool:
    return bool(self.work)

  def cancel(self, number: int) -> None:
    self.work.pop(number, None)

  def step(self) -> list[Event]:
    time.sleep(self.pause)
    self.steps += 1
    events = []
    for number, (request, completion, tokens, stream) in list(self.work.items()):
      token = tokens[len(completion.tokens)]
      completion.tokens.append(token)
      completion.logprobs.append(-0.1)
      completion.top.append([])
      text = '' if token in request.stop_tokens else stream.add(token)
      if token in request.stop_tokens or stream.stopped:
        completion.finish = 'stop' if stream.stopped else 'stop_token'
      elif len(completion.tokens) == request.max_tokens:
        completion.finish = 'length'
      if completion.finish:
        text += stream.finish()
        del self.work[number]
      events.append(Event(number, text, completion))
    return events


def scripted(
  folder: pathlib.Path, say, template: str = TEMPLATE, pause: float = 0.0
) -> ServedModel:
  """A served model that says what `say` says."""
  write_llama(folder, template)
  encoding = FolderEncoding(folder)
  vocabulary = Vocabulary(encoding, (), encoding.ends, whole=True)
  engine = Scripted(vocabulary, say, pause)
  text = tokenizer.of_folder(folder)
  return ServedModel(
    'tiny', vocabulary, text.encode, None, {}, encoding.size, engine.room,
    generator=Generator(engine, text), render=conversations.template(encoding.template),
  )  # fmt: skip
