"""Measures the endpoint under load: clients one by one and all at once, also beside `transformers serve`.

    python experiments/speed/serve.py                                  # a random LLaMA of 5M parameters
    python experiments/speed/serve.py --against --clients=16 --rounds=2
    python experiments/speed/serve.py --minutes=10                     # does the memory grow?

Each of --clients asks once, in a stream, for --max_tokens greedy tokens. The prompts have 10 to 1,000 tokens,
evenly spaced on a logarithmic scale. First some clients ask one by one, then all ask at once. The clients
measure the time to the first token and between tokens; throughput counts the generated tokens. A request whose
answer is not complete counts as lost.

Each server is a process of its own on this machine. --against adds two servers of transformers: one with its
defaults, and one with --continuous-batching. Only one server works at a time.

With --minutes eight clients ask all the time for answers of 32 tokens, and only the memory is measured.
"""

import argparse
import asyncio
import contextlib
import itertools
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
import numpy as np
import openai

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TEXT = ' '.join((ROOT / 'docs' / name).read_text() for name in ('serve.md', 'generate.md'))
SHORTEST, LONGEST = 10, 1000
ALONE = 12  # requests that come one by one
WATCHED_CLIENTS = 8
INTERVAL = 30  # seconds between two readings of the memory
WARM_UP = 120  # seconds of --minutes that the slope leaves out, because programs are still compiled


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument(
    '--hf', metavar='FOLDER', help='a model with a chat template; default: a random LLaMA'
  )
  parser.add_argument('--clients', type=int, default=64)
  parser.add_argument('--slots', type=int, default=16)
  parser.add_argument('--max_tokens', type=int, default=32)
  parser.add_argument('--rounds', type=int, default=1, help='how often all ask at once')
  parser.add_argument('--against', action='store_true', help='compare with `transformers serve`')
  parser.add_argument('--minutes', type=float, default=0, help='of load, to watch the memory')
  flags = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
    folder = str(flags.hf or write_model(pathlib.Path(temporary) / 'llama'))
    prompts = make_prompts(folder, flags.clients)
    command = [
      sys.executable, '-m', 'research.serve', f'--hf={folder}', '--name=model', '--port=8137', '--room=1200',
      f'--slots={flags.slots}', f'--queue={flags.clients * 2}',
    ]  # fmt: skip
    if flags.minutes:
      server = stack.enter_context(started('isoflop', command, 8137, 'model'))
      asyncio.run(watch(server, prompts, flags))
      return
    # Every round has the same prompts. With --kept=0 our server reads them again, as the others do.
    servers = [stack.enter_context(started('isoflop', [*command, '--kept=0'], 8137, 'model'))]
    if flags.against:
      program = str(pathlib.Path(sys.executable).parent / 'transformers')
      theirs = [program, 'serve', folder, '--port']
      more = [
        ('transformers serve', [*theirs, '8138'], 8138),
        ('with batching', [*theirs, '8139', '--continuous-batching'], 8139),
      ]
      servers += [stack.enter_context(started(*one, folder)) for one in more]
    asyncio.run(compare(servers, prompts, flags))


def write_model(folder: pathlib.Path) -> pathlib.Path:
  """Writes a LLaMA with random parameters and a tokenizer of bytes, and returns its folder."""
  import transformers

  # Greedy answers of this model never contain the end token, so that all have the same length.
  config = transformers.LlamaConfig(
    vocab_size=257, hidden_size=256, intermediate_size=688, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.2,
    tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=0,
  )  # fmt: skip
  transformers.set_seed(0)
  model = transformers.LlamaForCausalLM(config)
  model.save_pretrained(folder)
  write_tokenizer(folder)
  return folder


def write_tokenizer(folder: pathlib.Path) -> None:
  """Writes a tokenizer of 256 bytes and an end token, which is 0."""
  import tokenizers
  import transformers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {token: i for i, token in enumerate(['<|end|>', *alphabet])}
  text = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  text.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  text.decoder = tokenizers.decoders.ByteLevel()
  text.add_special_tokens(['<|end|>'])
  template = '{% for m in messages %}{{ m.content }}{% endfor %}'
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=text, eos_token='<|end|>', chat_template=template
  ).save_pretrained(folder)


def make_prompts(folder, count: int) -> list[str]:
  """Returns texts of SHORTEST to LONGEST tokens that begin at different places of the documents."""
  import tokenizers

  text = tokenizers.Tokenizer.from_file(str(pathlib.Path(folder) / 'tokenizer.json'))
  chance = random.Random(0)
  prompts = []
  for number in range(count):
    length = round(SHORTEST * (LONGEST / SHORTEST) ** (number / max(1, count - 1)))
    start = chance.randrange(len(TEXT) // 2)
    ids = text.encode(TEXT[start : start + 8 * length], add_special_tokens=False).ids[:length]
    prompts.append(text.decode(ids))
  chance.shuffle(prompts)
  return prompts


class Server:
  """A server that is ready.

  Args:
    name: its name in the output.
    model: its model's name in requests.
    port: where it listens on this machine.
    pid: its process.
  """

  def __init__(self, name: str, model: str, port: int, pid: int):
    self.name = name
    self.model = model
    self.pid = pid
    self.url = f'http://127.0.0.1:{port}/v1'

  def client(self) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=self.url, api_key='none', max_retries=0)

  @property
  def memory(self) -> float:
    """The resident memory of its process in MiB."""
    status = pathlib.Path(f'/proc/{self.pid}/status').read_text()
    line = next(line for line in status.splitlines() if line.startswith('VmRSS'))
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def started(name: str, command: list[str], port: int, model: str) -> Iterator[Server]:
  """Starts a server, and yields it when it is ready."""
  began = time.monotonic()
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'}
  process = subprocess.Popen(
    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  )
  try:
    while True:
      if process.poll() is not None:
        sys.exit(f'{name} ended with {process.returncode}: {" ".join(command)}')
      with contextlib.suppress(httpx.HTTPError):
        if httpx.get(f'http://127.0.0.1:{port}/health').status_code == 200:
          break
      time.sleep(0.2)
    print(f'{name}: ready after {time.monotonic() - began:.1f} s', flush=True)
    yield Server(name, model, port, process.pid)
  finally:
    process.terminate()
    process.wait()


class Answer:
  """A streamed answer: its text, and the times of its pieces."""

  def __init__(self):
    self.began = time.monotonic()
    self.times: list[float] = []
    self.finish = None
    self.tokens = 0
    self.text = ''

  @property
  def gaps(self) -> list[float]:
    return [after - before for before, after in itertools.pairwise(self.times)]


async def ask(client: openai.AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> Answer:
  """Returns a greedy answer. It has no `finish` if it was lost."""
  answer = Answer()
  try:
    stream = await client.chat.completions.create(
      model=model, messages=[{'role': 'user', 'content': prompt}], max_tokens=max_tokens, temperature=0,
      stream=True, stream_options={'include_usage': True}, timeout=600,
    )  # fmt: skip
    async for chunk in stream:
      answer.tokens = chunk.usage.completion_tokens if chunk.usage else answer.tokens
      for choice in chunk.choices:
        if choice.delta.content:
          answer.times.append(time.monotonic())
          answer.text += choice.delta.content
        answer.finish = choice.finish_reason or answer.finish
  except openai.APIError as error:
    print(f'  a request was lost: {error}')
  return answer


async def compare(servers: list[Server], prompts: list[str], flags) -> None:
  """Measures each server with clients one by one and at once, and prints how the first compares."""
  one_by_one = {}
  rates = {}
  answers = {}
  for server in servers:
    one_by_one[server.name] = await measure_alone(server, prompts, flags)
  for _ in range(flags.rounds):
    for server in servers:
      rate, answers[server.name] = await measure_together(server, prompts, flags)
      rates.setdefault(server.name, []).append(rate)
  ours, *others = servers
  rate = statistics.mean(rates[ours.name])
  times = rate / one_by_one[ours.name]
  print(f'{ours.name}: {times:.2f} times as many tokens a second at once as one by one')
  for other in others:
    times = rate / statistics.mean(rates[other.name])
    pairs = zip(answers[ours.name], answers[other.name], strict=True)
    same = sum(a.text == b.text for a, b in pairs)
    print(f'{times:.2f} times the tokens a second of {other.name}; {same} texts are the same')
  lost = [answer for answer in answers[ours.name] if answer.finish not in ('length', 'stop')]
  if lost:
    sys.exit(f'{len(lost)} requests were lost')


async def measure_alone(server: Server, prompts: list[str], flags) -> float:
  """Returns the tokens a second of clients that ask one by one, after the server has compiled its programs."""
  async with server.client() as client:
    for prompt in (*prompts[:4], max(prompts, key=len)):
      await ask(client, server.model, prompt, flags.max_tokens)
    first = prompts[: flags.slots]
    await asyncio.gather(*(ask(client, server.model, p, flags.max_tokens) for p in first))
    began = time.monotonic()
    answers = [await ask(client, server.model, p, flags.max_tokens) for p in prompts[:ALONE]]
    return show(f'{server.name}, one by one', answers, time.monotonic() - began)


async def measure_together(server: Server, prompts: list[str], flags) -> tuple[float, list[Answer]]:
  """Returns the tokens a second of clients that all ask at once, and their answers."""
  before = server.memory
  async with server.client() as client:
    began = time.monotonic()
    requests = (ask(client, server.model, prompt, flags.max_tokens) for prompt in prompts)
    answers = await asyncio.gather(*requests)
    seconds = time.monotonic() - began
  rate = show(f'{server.name}, {len(prompts)} at once', answers, seconds)
  print(f'  memory {before:,.0f} MiB before, {server.memory:,.0f} MiB after', flush=True)
  return rate, answers


def show(name: str, answers: list[Answer], seconds: float) -> float:
  """Prints the figures of answers that took `seconds` together, and returns the tokens a second."""
  first = sorted(answer.times[0] - answer.began for answer in answers if answer.times)
  gaps = sorted(gap for answer in answers for gap in answer.gaps)
  rate = sum(answer.tokens for answer in answers) / seconds
  if not first or not gaps:
    sys.exit(f'{name}: no answer came')

  def milliseconds(values, share):
    return f'{1e3 * values[min(len(values) - 1, int(share * len(values)))]:.0f}'

  lost = sum(answer.finish not in ('length', 'stop') for answer in answers)
  times = ', '.join(
    f'{what} p50 {milliseconds(values, 0.5)} ms, p99 {milliseconds(values, 0.99)} ms'
    for what, values in (('first token', first), ('between tokens', gaps))
  )
  print(f'{name}: {rate:.1f} tokens/s; {times}; {lost} of {len(answers)} lost', flush=True)
  return rate


async def watch(server: Server, prompts: list[str], flags) -> None:
  """Keeps the server under load, and prints its memory every half minute and its slope at the end."""
  began = time.monotonic()
  rows = []  # (seconds, MiB)
  count = 0
  deadline = began + 60 * flags.minutes
  turns = itertools.cycle(prompts)

  async def keep_asking(client):
    nonlocal count
    while time.monotonic() < deadline:
      answer = await ask(client, server.model, next(turns), 32)
      if not answer.finish:
        sys.exit('a request was lost')
      count += 1

  async def look():
    while time.monotonic() < deadline:
      rows.append((time.monotonic() - began, server.memory))
      print(f'  {rows[-1][0]:4.0f} s: {rows[-1][1]:,.1f} MiB, {count} answers', flush=True)
      await asyncio.sleep(INTERVAL)

  async with server.client() as client:
    await asyncio.gather(look(), *(keep_asking(client) for _ in range(WATCHED_CLIENTS)))
  rows.append((time.monotonic() - began, server.memory))
  late = np.array([row for row in rows if row[0] >= min(WARM_UP, 30 * flags.minutes)])
  slope = 60 * np.polyfit(late[:, 0], late[:, 1], 1)[0]
  print(
    f'{count} answers in {rows[-1][0] / 60:.1f} minutes; memory {rows[0][1]:,.1f} MiB at first, '
    f'{late[0, 1]:,.1f} after {late[0, 0]:.0f} s, {late[-1, 1]:,.1f} in the end: '
    f'{slope:+.2f} MiB a minute after the first {late[0, 0]:.0f} s'
  )


if __name__ == '__main__':
  main()
