"""An `Engine` as a model of EleutherAI's lm-eval (extra `eval`).

lm-eval splits its texts into tokens itself (`TemplateLM`), so that a request here is exactly the one that its
own Hugging Face backend answers: the same ids, the same windows of a long text, the same cut on the left.
"""

import logging
import warnings

from research.core.errors import UserError
from research.data import conversations
from research.evaluation import rows
from research.evaluation.callbacks import Progress, no_progress
from research.evaluation.engine import Engine
from research.evaluation.requests import GenerateUntil, Request, TokensLogLikelihood
from research.evaluation.task import check_none_failed
from research.inference.sampling import Sampling

NO_TEMPLATE = (
  'this model has no chat template: bind Suite.template to a file, or leave out LmEval.chat.'
)
# lm-eval's own default where a task sets none.
MAX_TOKENS = 256
# Its names for the most tokens of a text. The first one that is given counts (`normalize_gen_kwargs`).
MAX_TOKENS_NAMES = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


def import_lm_eval():
  """The module `lm_eval`, whose log shows errors only.

  Raises:
    UserError: it is not installed.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # its dependencies warn about themselves
      import lm_eval
      import lm_eval.api.model
      import lm_eval.tasks
  except ImportError as error:
    raise UserError(f'lm-eval is needed: uv sync --extra eval ({error}).') from None
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  return lm_eval


def make_model(engine: Engine, progress: Progress = no_progress):
  """The engine as a `lm_eval.api.model.TemplateLM`, with the attributes of `EngineModel`.

  Raises:
    UserError: lm-eval is not installed.
  """
  lm_eval = import_lm_eval()

  # The base class is known only here, because lm-eval is imported when it is needed.
  class Model(EngineModel, lm_eval.api.model.TemplateLM):
    pass

  return Model(engine, progress)


class EngineModel:
  """Answers lm-eval's requests with an `Engine`.

  Attributes:
    requests: how many requests were answered.
    cut: how many of them were cut on the left.
  """

  def __init__(self, engine: Engine, progress: Progress):
    super().__init__()
    self.engine = engine
    self.progress = progress
    self.backend = 'seq2seq' if engine.settings.architecture == 'encoder_decoder' else 'causal'
    self.requests = 0
    self.cut = 0

  # The methods that lm-eval expects of a tokenizer.

  @property
  def eot_token_id(self) -> int:
    return self.engine.encoding.end

  @property
  def prefix_token_id(self) -> int:
    return rows.first_id(self.engine.encoding, self.engine.settings)

  @property
  def tokenizer_name(self) -> str:
    return str(self.engine.settings.template)

  def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
    ids = self.engine.encoding.encode(string)
    # An encoder-decoder's `begin` is the first id of its decoder, which lm-eval's tokens do not show.
    if add_special_tokens is False or self.backend == 'seq2seq':
      return ids
    return rows.with_begin(ids, self.engine.settings)

  def chat_template(self, chat_template=False) -> str | None:
    return self.engine.settings.template if chat_template else None

  def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
    return render_chat(self.engine.settings.template, chat_history, add_generation_prompt)

  # The methods that lm-eval expects of a model.

  def ask(self, requests: list[Request]) -> list:
    answers = self.engine.answer(requests, self.progress)
    self.requests += len(requests)
    check_none_failed(answers, 'lm-eval')
    self.cut += sum(answer.cut > 0 for answer in answers)
    return answers

  def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
    ours = [
      TokensLogLikelihood(tuple(context), tuple(continuation))
      for _, context, continuation in requests
    ]
    return [(answer.nats, answer.greedy) for answer in self.ask(ours)]

  def loglikelihood_rolling(self, requests, disable_tqdm=False):
    from lm_eval import utils

    ours = []
    numbers = []  # of the text that each window belongs to
    for number, request in enumerate(requests):
      windows = utils.get_rolling_token_windows(
        token_list=self.tok_encode(request.args[0]),
        prefix_token=self.prefix_token_id,
        max_seq_len=self.engine.settings.length,
        context_len=1,
      )
      for context, continuation in map(utils.make_disjoint_window, windows):
        ours.append(TokensLogLikelihood(tuple(context), tuple(continuation)))
        numbers.append(number)
    nats = [0.0] * len(requests)
    for number, answer in zip(numbers, self.ask(ours), strict=True):
      nats[number] += answer.nats
    return nats

  def generate_until(self, requests, disable_tqdm=False):
    ours = [to_request(*request.args) for request in requests]
    return [answer.text for answer in self.ask(ours)]


def render_chat(template: str | None, messages: list[dict], add_generation_prompt: bool) -> str:
  """A conversation as text.

  Args:
    template: a file for `data.conversations.template`.
    add_generation_prompt: whether the assistant's turn begins at the end. If not, the text ends with the last
      message's own text, so that the model continues that message.

  Raises:
    UserError: there is no template, or it refuses these messages.
  """
  if template is None:
    raise UserError(NO_TEMPLATE)
  try:
    text = conversations.template(template)(messages, add_generation_prompt=add_generation_prompt)
  except conversations.Unsuitable as error:
    raise UserError(f'{template}: a conversation of this task {error}.') from error
  if add_generation_prompt:
    return text
  last = messages[-1]['content'].strip()
  return text[: text.rindex(last) + len(last)]


def to_request(context: str, options: dict) -> GenerateUntil:
  """lm-eval's request for a text as ours.

  Raises:
    UserError: an option is not supported.
  """
  options = dict(options)
  until = options.pop('until', None) or ()
  given = [options.pop(name) for name in MAX_TOKENS_NAMES if name in options]
  max_tokens = next((n for n in given if n is not None), MAX_TOKENS)
  temperature = options.pop('temperature', None)
  # lm-eval samples where a task sets a temperature above 0, even without do_sample.
  samples = options.pop('do_sample', temperature is not None and temperature > 0)
  filters = {name: options.pop(name) for name in ('top_k', 'top_p', 'min_p') if name in options}
  if options.get('num_beams') == 1:  # greedy, as without it
    del options['num_beams']
  if options:
    raise UserError(f'{next(iter(options))} of generation_kwargs is not supported: leave it out.')
  sampling = Sampling()
  if samples:
    sampling = Sampling(temperature=1.0 if temperature is None else temperature, **filters)
  until = (until,) if isinstance(until, str) else tuple(until)
  return GenerateUntil(context, tuple(stop for stop in until if stop), max_tokens, sampling)
