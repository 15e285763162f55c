"""Runs of reinforcement learning that take a second a round."""

import dataclasses
import os
import pathlib

import numpy as np

from research.checkpoints import streamed
from research.checkpoints.pretrained import Pretrained
from research.checkpoints.starts import Checkpoint
from research.core import configs
from research.reinforcement.penalty import KL
from research.training import loop
from research.training.run import Run

SIZES = ('LAYERS=1', 'EMBED=16', 'HEADS=2')


def load(text_file, *bindings) -> configs.Config:
  """The run of tests/gin/reinforce.gin."""
  return configs.load('tests/gin/reinforce.gin', [f"FILES='{text_file}'", *bindings])


def train(run: Run, workdir, text: str = '') -> dict:
  with open(os.devnull, 'w') as silence:
    return loop.train(run, workdir, text, stream=silence)


def make_base(text_file, folder: pathlib.Path) -> None:
  """Trains `folder`/base, for two steps."""
  bindings = [f"FILES='{text_file}'", *SIZES, 'Run.steps=2']
  config = configs.load('tests/gin/decoder.gin', bindings)
  train(config.build(), folder / 'base', config.text)


def described(text_file, folder: pathlib.Path) -> Run:
  """Two rounds, each of two epochs of two updates. The base model is also the reference."""
  run = load(text_file).build()
  base = f'{folder}/base'
  rollouts = dataclasses.replace(
    run.train, updates=2, epochs=2, reference=Pretrained(folder=base), penalty=KL(target=1.0)
  )
  return dataclasses.replace(
    run, steps=8, checkpoint_every=4, microbatches=2, train=rollouts, init=Checkpoint(folder=base)
  )


def saved(workdir) -> dict[str, np.ndarray]:
  """The parameters of a run's last checkpoint, by name."""
  params = streamed.Params(workdir)
  return {name: np.asarray(params.piece(tuple(name.split('/')), ())) for name in params.shapes()}
