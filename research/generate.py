"""Generates text with a trained model.

    python -m research.generate --checkpoint=runs/tiny --prompt='def f(x):' --temperature=0.8
    python -m research.generate --hf=FOLDER --prompts=prompts.jsonl --out=answers.jsonl --top=5

--checkpoint is a run's workdir or a converted model's folder; --hf reads a Hugging Face folder without
converting it. --prompt=- reads the prompt from standard input. With --prompts the answers are JSON lines;
started again, the command answers only the prompts without an answer. --beams finds the likeliest answer;
--draft and --ngram speculate. --best_of=16 --reward=FILE.gin keeps the best of 16 answers.
"""

import pathlib
import sys

from research.core import cli

if __name__ == '__main__':
  from research.inference.flags import parse

  FLAGS = parse(__doc__)
  cli.use_huge_pages()

from research.core.describe import describe
from research.evaluation.generators import load
from research.inference import answers, terminal
from research.inference.flags import SAMPLING
from research.inference.sampling import Sampling
from research.parallel.mesh import Mesh
from research.reinforcement import best_of


def main(flags) -> None:
  """Generates as the flags say, on the first device."""
  import jax

  from research.training.program import keep_compiled

  sampling = Sampling(**{name: getattr(flags, name) for name in SAMPLING})
  settings = {
    'sampling': sampling, 'max_tokens': flags.max_tokens, 'stop': tuple(flags.stop), 'top': flags.top,
  }  # fmt: skip
  prompts = answers.read_prompts(pathlib.Path(flags.prompts)) if flags.prompts else []
  keep_compiled()
  choose = best_of.by_reward(flags.reward) if flags.reward else None
  samples = flags.best_of or flags.samples
  options = {
    name: getattr(flags, name) for name in ('int8', 'penalty', 'draft', 'ngram', 'guesses')
  }
  with Mesh().use(jax.devices()[:1]):
    generator = load(
      flags.checkpoint, hf=flags.hf, tokenizer_file=flags.tokenizer, room=flags.room,
      slots=flags.slots, together=flags.together, beam_count=flags.beams, **options,
    )  # fmt: skip
    if flags.interactive:
      terminal.converse(generator, samples, settings)
    elif flags.prompt is not None:
      prompt = sys.stdin.read() if flags.prompt == '-' else flags.prompt
      if choose:
        print(choose(prompt, generator([prompt], samples=samples, **settings))[0].text)
        return
      terminal.show(generator, prompt, samples, settings)
    else:
      source = {'source': generator.source, 'tokenizer': flags.tokenizer, 'beams': flags.beams}
      source |= {'samples': samples}
      if choose:
        source['kept'] = describe(choose)
      identity = answers.identity_of(settings | source | options)
      rows = answers.answer_all(
        generator, prompts, pathlib.Path(flags.out), identity,
        samples=samples, choose=choose, **settings,
      )  # fmt: skip
      print(f'{len(prompts)} prompts answered, {len(list(rows))} of them now: {flags.out}')


if __name__ == '__main__':
  cli.run(main, FLAGS)
