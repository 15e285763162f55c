"""The endpoint under load: many clients at once against one by one.

    python experiments/speed/serve.py                              # a random LLaMA of 5M parameters
    python experiments/speed/serve.py --hf=FOLDER --minutes=10     # does the memory stay as it is?

Each of --clients asks once for --max_tokens greedy tokens in a stream; prompts have 10 to 1,000 tokens, evenly
on a logarithmic scale. First some of them ask one by one, then all at once. Throughput counts generated tokens;
times to the first token and between tokens are the clients'. Every request must be answered in full. The
server is a process of its own on this machine.
"""

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import httpx
import openai

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = ' '.join((ROOT / 'docs' / name).read_text() for name in ('serve.md', 'generate.md'))
SHORTEST, LONGEST = 10, 1000
ALONE = 12  # requests that are asked one by one


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--hf', metavar='FOLDER', help='a model; default: a random LLaMA')
  parser.add_argument('--clients', type=int, default=64)
  parser.add_argument('--slots', type=int, default=16)
  parser.add_argument('--max_tokens', type=int, default=32)
  parser.add_argument('--minutes', type=float, default=0, help='of load, to watch the memory')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    folder = flags.hf or write_model(pathlib.Path(temporary) / 'llama')
    prompts = make_prompts(folder, flags.clients)
    ours = [
      sys.executable, '-m', 'research.serve', f'--hf={folder}', '--name=model', '--port=8137', '--room=1200',
      f'--slots={flags.slots}', f'--queue={flags.clients * 2}', '--kept=0', '--template=plain',
    ]  # fmt: skip
    with started('isoflop', ours, 8137) as process:
      asyncio.run(measure('model', 8137, prompts, flags, process.pid))
      if flags.minutes:
        asyncio.run(watch('model', 8137, prompts, flags, process.pid))


def write_model(folder: pathlib.Path) -> pathlib.Path:
  """A random LLaMA with a tokenizer of bytes."""
  import tokenizers
  import transformers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate(['<|end|>', *alphabet])}
  text = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  text.decoder = tokenizers.decoders.ByteLevel()
  text.add_special_tokens(['<|end|>'])
  # The end has no place in the greedy answers of this model, so that all are of one length.
  config = transformers.LlamaConfig(
    vocab_size=len(vocab), hidden_size=256, intermediate_size=688, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.2,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
  )  # fmt: skip
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(folder)
  template = '{% for m in messages %}{{ m.content }}{% endfor %}'
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=text, eos_token='<|end|>', chat_template=template
  ).save_pretrained(folder)
  return folder


def make_prompts(folder, count: int) -> list[str]:
  """Texts of 10 to 1,000 tokens, none of which begins as another does."""
  import tokenizers

  text = tokenizers.Tokenizer.from_file(str(pathlib.Path(folder) / 'tokenizer.json'))
  chance, prompts = random.Random(0), []
  for number in range(count):
    length = round(SHORTEST * (LONGEST / SHORTEST) ** (number / max(1, count - 1)))
    start = chance.randrange(len(TEXT) // 2)
    ids = text.encode(TEXT[start : start + 8 * length], add_special_tokens=False).ids[:length]
    prompts.append(text.decode(ids))
  chance.shuffle(prompts)
  return prompts


@contextlib.contextmanager
def started(name: str, command: list[str], port: int) -> Iterator[subprocess.Popen]:
  """A server that answers."""
  began = time.monotonic()
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
  process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
  try:
    while True:
      if process.poll() is not None:
        sys.exit(f'{name} ended with {process.returncode}')
      with contextlib.suppress(httpx.HTTPError):
        if httpx.get(f'http://127.0.0.1:{port}/health').status_code == 200:
          break
      time.sleep(0.2)
    print(f'{name}: ready after {time.monotonic() - began:.1f} s')
    yield process
  finally:
    process.terminate()
    process.wait()


def client_of(port: int) -> openai.AsyncOpenAI:
  return openai.AsyncOpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0)


class Asked:
  """One streamed answer: when its pieces came."""

  def __init__(self):
    self.began, self.times, self.finish, self.tokens = time.monotonic(), [], None, 0

  @property
  def gaps(self) -> list[float]:
    return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> Asked:
  asked = Asked()
  stream = await client.chat.completions.create(
    model=model, messages=[{'role': 'user', 'content': prompt}], max_tokens=max_tokens, temperature=0,
    stream=True, stream_options={'include_usage': True}, timeout=600,
  )  # fmt: skip
  async for chunk in stream:
    asked.tokens = chunk.usage.completion_tokens if chunk.usage else asked.tokens
    for choice in chunk.choices:
      if choice.delta.content:
        asked.times.append(time.monotonic())
      asked.finish = choice.finish_reason or asked.finish
  return asked


async def measure(model: str, port: int, prompts: list[str], flags, pid: int) -> None:
  """Prints what was measured."""
  async with openai.AsyncOpenAI(
    base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0
  ) as client:
    longest, most = max(prompts, key=len), flags.max_tokens
    for prompt in (*prompts[:4], longest):  # what is compiled is compiled now
      await ask(client, model, prompt, most)
    await asyncio.gather(*(ask(client, model, prompt, most) for prompt in prompts[: flags.slots]))
    began = time.monotonic()
    alone = [await ask(client, model, prompt, most) for prompt in prompts[:ALONE]]
    alone_rate = sum(asked.tokens for asked in alone) / (time.monotonic() - began)
    before = memory(pid)
    began = time.monotonic()
    together = await asyncio.gather(*(ask(client, model, prompt, most) for prompt in prompts))
    rate = sum(asked.tokens for asked in together) / (time.monotonic() - began)
  lost = [asked for asked in together if asked.finish not in ('length', 'stop')]
  show('one by one', alone, alone_rate)
  show(f'{len(prompts)} at once', together, rate)
  print(f'  {rate / alone_rate:.2f} times as many tokens a second; {len(lost)} requests lost')
  print(f'  memory {before:,.0f} MiB before, {memory(pid):,.0f} MiB after')
  if lost:
    sys.exit('requests were lost')


async def watch(model: str, port: int, prompts: list[str], flags, pid: int) -> None:
  """Keeps the server under load, and prints its memory."""
  async with openai.AsyncOpenAI(
    base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0
  ) as client:
    deadline, rows = time.monotonic() + 60 * flags.minutes, []
    while time.monotonic() < deadline:
      await asyncio.gather(*(ask(client, model, prompt, flags.max_tokens) for prompt in prompts))
      rows.append(memory(pid))
    print(f'  memory over {flags.minutes:g} minutes, MiB: {json.dumps([round(x) for x in rows])}')


def show(name: str, answers: list[Asked], rate: float) -> None:
  first = sorted(asked.times[0] - asked.began for asked in answers if asked.times)
  gaps = sorted(gap for asked in answers for gap in asked.gaps)

  def high(values):
    return 1e3 * values[min(len(values) - 1, int(0.99 * len(values)))]

  print(
    f'  {name:12} {rate:7.1f} tokens/s; first token p50 {1e3 * statistics.median(first):.0f} ms, p99 '
    f'{high(first):.0f} ms; between tokens p50 {1e3 * statistics.median(gaps):.1f} ms, p99 {high(gaps):.1f} ms'
  )


def memory(pid: int) -> float:
  """MiB that a process holds."""
  status = pathlib.Path(f'/proc/{pid}/status').read_text()
  line = next(line for line in status.splitlines() if line.startswith('VmRSS'))
  return int(line.split()[1]) / 1024


if __name__ == '__main__':
  main()
