"""lm-eval through our engine gives what its own Hugging Face backend gives."""

import contextlib
import json

import jax
import pytest

from research.core.errors import UserError
from research.evaluation import generated_tasks, lm_eval_model, lm_eval_tasks, loading
from research.evaluation.requests import GenerateUntil
from research.evaluation.suite import Suite, make_engine
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from tests import trained

TEXT = 'the law of this run is that loss falls with compute and data , as 12 + 34 = 46 .'
WORDS = tuple(TEXT.split())
TASKS = {
  'choice': """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list:
  - metric: acc
  - metric: acc_norm
""",
  'rolling': """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
  'generation': """
output_type: generate_until
doc_to_text: "Say: {{question}} ->"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["\\n", " of"]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
""",
}
TEMPLATE = (
  "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
  '{% if add_generation_prompt %}<|assistant|>{% endif %}'
)


@pytest.fixture(scope='module')
def tasks(tmp_path_factory):
  """A folder of lm-eval tasks on a local file."""
  folder, rows = tmp_path_factory.mktemp('tasks'), []
  for i in range(9):
    words = [WORDS[(i * 5 + k * k) % len(WORDS)] for k in range(40)]
    rows.append({
      'question': ' '.join(words[:5]), 'text': ' '.join(words), 'answer': i % 3,
      'choices': [' '.join(words[5 + n : 7 + 2 * n]) for n in range(3)],
    })  # fmt: skip
  (folder / 'rows.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  for name, text in TASKS.items():
    head = f"""task: tiny_{name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder / 'rows.jsonl'}}}
test_split: test
fewshot_split: test
"""
    (folder / f'{name}.yaml').write_text(head + text)
  return folder


@pytest.fixture(scope='module')
def model_folder(tmp_path_factory):
  """A random LLaMA with a tokenizer that begins every text, and a chat template."""
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  tokenizers = pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('model')
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  special = ['<s>', '</s>', '<|user|>', '<|assistant|>', '<|system|>']
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=340, special_tokens=special,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
  )  # fmt: skip
  tokenizer.train_from_iterator([TEXT] * 4, trainer)
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 0)]
  )
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, bos_token='<s>', eos_token='</s>', pad_token='</s>',
    chat_template=TEMPLATE,
  ).save_pretrained(folder)  # fmt: skip
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.3, tie_word_embeddings=False,
    bos_token_id=0, eos_token_id=1, pad_token_id=1,
  )  # fmt: skip
  transformers.LlamaForCausalLM(config).eval().save_pretrained(folder)
  return folder


@contextlib.contextmanager
def engine_of(folder, length: int):
  """An engine of a Hugging Face folder's model, rows of `length`, cut on the left as lm-eval cuts."""
  opened = loading.open_hf(folder)
  suite = Suite(tasks=(generated_tasks.Copying(),), batch_size=4, length=length, too_long='cut')
  with Mesh(data=1).use(jax.local_devices()[:1]):
    model = loading.abstract_model(opened.model)
    engine, identity = make_engine(
      suite, model, lambda: loading.read_params(opened), None, opened.tokenizer
    )
    assert identity['begin'] == engine.encoding.begin
    yield engine


def compare_backends(engine, folder, tasks, plan, limit: int) -> int:
  """Asks lm-eval's tasks through our engine and through its own backend; how many requests were cut.

  Args:
    plan: (task, shots, whether it is a chat).
    limit: documents of each task.
  """
  lm_eval = pytest.importorskip('lm_eval')
  pytest.importorskip('accelerate', reason='of lm-eval on torch: docs/contributing.md')
  from lm_eval.models.huggingface import HFLM
  from lm_eval.tasks import TaskManager

  manager = TaskManager(include_path=str(tasks), include_defaults=False)
  length = engine.settings.length
  theirs = HFLM(
    pretrained=str(folder), max_length=length, batch_size=4, device='cpu', dtype='float32'
  )
  ours = lm_eval_model.make_model(engine)
  for name, shots, chat in plan:
    results = [
      lm_eval.simple_evaluate(
        model, tasks=[f'tiny_{name}'], num_fewshot=shots, bootstrap_iters=0, apply_chat_template=chat,
        task_manager=manager, limit=limit,
      )
      for model in (ours, theirs)
    ]  # fmt: skip
    compare(*(result['samples'][f'tiny_{name}'] for result in results), limit)
    mine, other = (result['results'][f'tiny_{name}'] for result in results)
    for key, value in other.items():
      assert mine[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)
  return ours.cut


@pytest.fixture
def own_hub(tmp_path, monkeypatch):
  """What is read once is kept in a folder of this test."""
  for name in ('HF_HOME', 'HF_DATASETS_CACHE'):
    monkeypatch.setenv(name, str(tmp_path / 'hub'))
  return tmp_path


@pytest.mark.slow
@pytest.mark.filterwarnings('default')  # lm-eval's and its dependencies' own
def test_the_same_numbers_as_the_hugging_face_backend(tasks, model_folder, own_hub):
  with engine_of(model_folder, 64) as engine:
    plan = (
      ('choice', 0, False), ('choice', 2, False), ('choice', 1, True), ('rolling', 0, False),
      ('generation', 2, False), ('generation', 0, True),
    )  # fmt: skip
    # With two shots some contexts do not fit, and both cut them alike.
    assert compare_backends(engine, model_folder, tasks, plan, 9)
    task = lm_eval_tasks.LmEval(
      task='tiny_choice', folder=str(tasks), shots=2, examples=5, chat=True
    )
    result = task.run(engine)
    assert task.name == 'lm-eval-tiny_choice-2shot-chat'
    assert (result['items'], result['requests']) == (5, 15)
    assert result['settings']['template'] == str(model_folder / 'chat_template.jinja')
    assert set(result['metrics']) >= {'acc', 'acc_norm', 'acc_stderr'}
    wrong = lm_eval_tasks.LmEval(task='tiny_chioce', folder=str(tasks)).run(engine)
    assert wrong['error'].startswith("lm-eval has no task 'tiny_chioce'. Did you mean")


@pytest.mark.slow
@pytest.mark.filterwarnings('default')
def test_the_same_numbers_of_a_model_that_somebody_trained(tasks, own_hub):
  folder = trained.smollm2()
  with engine_of(folder, 256) as engine:
    plan = (
      ('choice', 2, False), ('choice', 0, True), ('rolling', 0, False), ('generation', 2, False),
    )  # fmt: skip
    compare_backends(engine, folder, tasks, plan, 3)


def compare(ours: list[dict], theirs: list[dict], count: int) -> None:
  """Every document's answers: log-likelihoods to 1e-4, greedy flags and texts equal."""
  assert len(ours) == len(theirs) == count
  for mine, other in zip(ours, theirs, strict=True):
    assert mine['arguments'] == other['arguments']
    for a, b in zip(mine['resps'], other['resps'], strict=True):
      (a,), (b,) = a, b
      if isinstance(a, str):
        assert a == b
      elif isinstance(a, tuple | list):
        assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-4)
        assert str(a[1]) == str(b[1])
      else:
        assert float(a) == pytest.approx(float(b), rel=1e-4)


def test_what_lm_eval_asks_for_is_understood_or_refused():
  to_request = lm_eval_model.to_request
  options = {'until': '\n', 'max_gen_toks': 5, 'do_sample': False, 'temperature': 0.0}
  assert to_request('a', options) == GenerateUntil('a', ('\n',), 5)
  assert to_request('a', {'max_tokens': 7}) == GenerateUntil('a', (), 7)
  sampled = to_request('a', {'do_sample': True, 'temperature': 0.7, 'top_p': 0.9})
  assert sampled.sampling == Sampling(temperature=0.7, top_p=0.9)
  with pytest.raises(UserError, match='num_beams of generation_kwargs is not supported'):
    to_request('a', {'num_beams': 4})


def test_a_chat_is_left_open_where_the_model_goes_on_with_it(tmp_path):
  (tmp_path / 'template.jinja').write_text(TEMPLATE)
  messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Answer: '}]
  render = lm_eval_model.render_chat
  path = str(tmp_path / 'template.jinja')
  assert render(path, messages[:1], True) == '<|user|>Hi</s><|assistant|>'
  assert render(path, messages, False) == '<|user|>Hi</s><|assistant|>Answer:'
  with pytest.raises(UserError, match='no chat template'):
    render(None, messages, True)
