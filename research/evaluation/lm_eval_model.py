"""An `Engine` as a model of EleutherAI's lm-eval (extra `eval`).

lm-eval splits its texts into tokens itself (`TemplateLM`), so that a request here is exactly the one that its
own Hugging Face backend would answer: the same ids, the same windows of a long text, the same cut on the left.
"""

import logging
import warnings

from research.core.errors import UserError
from research.data import conversations
from research.evaluation.engine import Engine
from research.evaluation.requests import Failed, GenerateUntil, Request, TokensLogLikelihood
from research.inference.sampling import Sampling

# lm-eval's own default where a task sets none.
MAX_TOKENS = 256
# Its names for the most tokens of a text, the first that is given counts (`normalize_gen_kwargs`).
MOST_TOKENS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')


def import_lm_eval():
  """The module `lm_eval`, its log kept to errors.

  Raises:
    UserError: it is not installed.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # of its dependencies, about themselves
      import lm_eval
      import lm_eval.api.model
      import lm_eval.tasks
  except ImportError as error:
    raise UserError(f'lm-eval is needed: uv sync --extra eval ({error}).') from None
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
  return lm_eval


def make_model(engine: Engine, progress=lambda done, of: None):
  """The engine as `lm_eval.api.model.TemplateLM`. It counts its `requests` and how many were `cut`."""
  lm_eval = import_lm_eval()
  from lm_eval import utils

  encoding, settings = engine.encoding, engine.settings

  class Model(lm_eval.api.model.TemplateLM):
    """Answers lm-eval's requests with an `Engine`."""

    backend = 'seq2seq' if settings.architecture == 'encoder_decoder' else 'causal'

    def __init__(self):
      super().__init__()
      self.requests = self.cut = 0

    # What lm-eval asks of a tokenizer.

    @property
    def eot_token_id(self) -> int:
      return encoding.end

    @property
    def prefix_token_id(self) -> int:
      ids = settings.begin, settings.start, encoding.end
      return next(i for i in ids if i is not None)

    @property
    def tokenizer_name(self) -> str:
      return str(settings.template)

    def tok_encode(self, string, add_special_tokens=None, **kwargs) -> list[int]:
      ids = encoding.encode(string)
      begins = settings.begin is not None and add_special_tokens is not False
      # An encoder-decoder's `begin` is what its decoder starts from.
      begins = begins and self.backend == 'causal'
      # A template may spell the beginning of the text itself.
      return [settings.begin, *ids] if begins and ids[:1] != [settings.begin] else ids

    def chat_template(self, chat_template=False) -> str | None:
      return settings.template if chat_template else None

    def apply_chat_template(self, chat_history, add_generation_prompt=True) -> str:
      return render_chat(settings.template, chat_history, add_generation_prompt)

    # What lm-eval asks of a model.

    def ask(self, requests: list[Request]) -> list:
      answers = engine.answer(requests, progress)
      self.requests += len(requests)
      failures = [answer.reason for answer in answers if isinstance(answer, Failed)]
      if failures:
        raise UserError(
          f'{len(failures)} of {len(answers)} requests failed, and lm-eval would average over them; the '
          f'first: {failures[0]}'
        )
      self.cut += sum(answer.cut > 0 for answer in answers)
      return answers

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, **kwargs):
      asked = [TokensLogLikelihood(tuple(context), tuple(end)) for _, context, end in requests]
      return [(answer.nats, answer.greedy) for answer in self.ask(asked)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
      asked, owners = [], []
      for number, request in enumerate(requests):
        windows = utils.get_rolling_token_windows(
          token_list=self.tok_encode(request.args[0]),
          prefix_token=self.prefix_token_id,
          max_seq_len=settings.length,
          context_len=1,
        )
        for context, end in map(utils.make_disjoint_window, windows):
          asked.append(TokensLogLikelihood(tuple(context), tuple(end)))
          owners.append(number)
      nats = [0.0] * len(requests)
      for owner, answer in zip(owners, self.ask(asked), strict=True):
        nats[owner] += answer.nats
      return nats

    def generate_until(self, requests, disable_tqdm=False):
      asked = [to_request(*request.args) for request in requests]
      return [answer.text for answer in self.ask(asked)]

  return Model()


def render_chat(template: str | None, messages: list[dict], add_generation_prompt: bool) -> str:
  """A conversation as text.

  Args:
    template: a file for `data.conversations.template`.
    add_generation_prompt: whether the assistant's turn begins at the end; else the last message is left open,
      so that the model goes on with it.

  Raises:
    UserError: there is no template, or it refuses these messages.
  """
  if template is None:
    raise UserError(
      'this model has no chat template: bind Suite.template to a file with one, or leave LmEval.chat out.'
    )
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
    UserError: it has an option that is not understood here.
  """
  options = dict(options)
  until = options.pop('until', None) or ()
  given = [options.pop(name) for name in MOST_TOKENS if name in options]
  max_tokens = next((n for n in given if n is not None), MAX_TOKENS)
  temperature = options.pop('temperature', None)
  # Without do_sample, a temperature alone decides, as in lm-eval.
  samples = options.pop('do_sample', temperature is not None and temperature > 0)
  filters = {name: options.pop(name) for name in ('top_k', 'top_p', 'min_p') if name in options}
  options.pop('num_beams', None) if options.get('num_beams') == 1 else None
  if options:
    raise UserError(f'{next(iter(options))} of generation_kwargs is not understood here.')
  sampling = Sampling()
  if samples:
    sampling = Sampling(temperature=1.0 if temperature is None else temperature, **filters)
  until = (until,) if isinstance(until, str) else tuple(until)
  return GenerateUntil(context, tuple(stop for stop in until if stop), max_tokens, sampling)
