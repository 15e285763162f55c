"""Opens a trained model to generate text, from each kind of folder that `loading` reads."""

import dataclasses
import pathlib

from flax import nnx

from research.data.encoding import make_encoding
from research.evaluation import loading
from research.inference import beams, one_by_one, tokenizer
from research.inference.generator import Generator, make_generator
from research.inference.ngrams import Ngram

PENALTIES = {'length': beams.by_length, 'wu': beams.wu}


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model whose parameters were read.

  Attributes:
    model: with shapes in place of arrays.
    run: that trained it; None for a model that was not trained here.
    tokenizer_folder: the folder of such a model's tokenizer.
    source: the folder and the step, for the answers' identity.
  """

  model: nnx.Module
  params: dict
  run: object | None
  tokenizer_folder: pathlib.Path
  source: str


def load(
  checkpoint: str | None = None,
  *,
  hf: str | None = None,
  tokenizer_file: str | None = None,
  room: int = 0,
  slots: int = 8,
  together: int = 1,
  int8: bool = False,
  beam_count: int = 0,
  penalty: str = 'length',
  draft: str | None = None,
  ngram: int = 0,
  guesses: int = 4,
) -> Generator:
  """A model that generates, from a run's or a converted model's folder or from a Hugging Face folder.

  Call it, and use the generator, under a mesh: `with Mesh().use(jax.devices()[:1]): ...`. The arguments are
  the flags of the command; `beam_count` is --beams.

  Raises:
    UserError: there is no such model, the model is an encoder, or the tokenizer is not the model's.
  """
  opened = open_model(checkpoint, hf)
  graphdef = nnx.graphdef(opened.model)
  architecture = loading.architecture_of(opened.run, opened.model)
  search = None
  speculation = None
  if beam_count:
    search = one_by_one.Beams(graphdef, opened.params, beam_count, PENALTIES[penalty])
  elif ngram:
    guess = Ngram(ngram)
    speculation = one_by_one.Speculation(graphdef, opened.params, guess, guesses=guesses)
  elif draft:
    # The folder of a draft may be of either kind.
    is_hf = (pathlib.Path(draft) / 'config.json').is_file()
    draft_model = open_model(None, draft) if is_hf else open_model(draft, None, '--draft')
    speculation = one_by_one.Speculation(
      graphdef, opened.params, nnx.graphdef(draft_model.model), draft_model.params, guesses
    )
  text = tokenizer_of(opened, tokenizer_file, architecture)
  room = room or loading.length_of(opened.run, opened.model)
  return make_generator(
    opened.model, opened.params, text, architecture, room=room, slots=slots,
    together=together, int8=int8, beams=search, speculation=speculation, source=opened.source,
  )  # fmt: skip


def open_model(checkpoint: str | None, hf: str | None, flag: str = '--checkpoint') -> Opened:
  """Reads a model from the folder of a run or a converted model, or from Hugging Face's.

  Args:
    flag: that named the folder of `checkpoint`, for messages.
  """
  folder = loading.open_hf(hf) if hf else loading.open_folder(checkpoint, flag=flag)
  model = loading.abstract_model(folder.model)
  source = hf or f'{checkpoint} at step {folder.step}'
  return Opened(model, loading.read_params(folder), folder.run, folder.tokenizer, source)


def tokenizer_of(opened: Opened, file: str | None, architecture: str) -> tokenizer.Tokenizer:
  """The tokenizer: of `file` if given, else of the run's data, else in the folder of the weights."""
  if file:
    return tokenizer.of_file(pathlib.Path(file))
  if opened.run:
    encoding = make_encoding(loading.vocabulary_of(opened.run))
    return tokenizer.of_encoding(encoding, architecture == 'encoder_decoder')
  return tokenizer.of_folder(opened.tokenizer_folder)
