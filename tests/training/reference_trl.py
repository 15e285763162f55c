"""TRL's own losses of preferences on the pairs of test_preferences.py: the numbers of its `TRL`.

    uv run --no-project --with trl==1.16.0 --with torch==2.13.0 python tests/training/reference_trl.py

Methods of TRL's trainers are called on a stand-in for the trainer, whose model returns these log-probabilities.
"""

import collections
import types

import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

# Of each pair, chosen and rejected: log p, the reference's log p, tokens, and scores by a head of scores.
PAIRS = (
  ((-12.181955, -16.216309), (-4.882849, -9.202354), (3, 5), (-2.004515, -2.813555)),
  ((-9.899279, -6.481019), (-5.083937, -5.004519), (4, 2), (-0.306005, -0.95725)),
  ((-2.884276, -7.9978), (-0.175704, -3.180136), (1, 3), (-1.612385, -0.719882)),
  ((-20.365108, -17.380006), (-10.30782, -8.516592), (6, 5), (0.426456, 2.662803)),
  ((-5.270762, -3.393252), (-2.550605, -2.086947), (2, 2), (-0.000239, 2.319654)),
  ((-14.294425, -10.081804), (-10.541972, -7.380658), (5, 4), (2.258391, -1.236906)),
)
KL = 0.5  # nats, of KTO


def column(i: int) -> torch.Tensor:
  """A quantity of all answers, the chosen ones first."""
  chosen = [pair[i][0] for pair in PAIRS]
  rejected = [pair[i][1] for pair in PAIRS]
  return torch.tensor(chosen + rejected)


def trainer(**settings) -> types.SimpleNamespace:
  """What the methods read of a trainer."""
  accelerator = types.SimpleNamespace(
    device='cpu', gather=lambda values: values, gather_for_metrics=lambda values: values
  )
  return types.SimpleNamespace(
    accelerator=accelerator, model=types.SimpleNamespace(training=False), aux_loss_enabled=False,
    ld_alpha=None, precompute_ref_logps=True, f_divergence_type='reverse_kl', loss_weights=[1.0],
    use_weighting=False, _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    _total_train_tokens=0, **settings,
  )  # fmt: skip


def answers() -> tuple:
  """(a model, its inputs): each answer's log p is spread over its tokens, after a prompt of one token."""
  lengths = column(2)
  mask = (torch.arange(8) >= 1) & (torch.arange(8) <= lengths[:, None])
  log_probs = mask[:, 1:] * (column(0) / lengths)[:, None]
  zeros = torch.zeros_like(log_probs)
  outputs = types.SimpleNamespace(
    log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
  )
  inputs = {'input_ids': mask.long(), 'attention_mask': mask.long(), 'completion_mask': mask.long()}
  return lambda **_: outputs, inputs


def dpo(loss: str, beta: float) -> torch.Tensor:
  model, inputs = answers()
  chosen, rejected = column(1).chunk(2)
  inputs |= {'ref_chosen_logps': chosen, 'ref_rejected_logps': rejected}
  return DPOTrainer._compute_loss(trainer(loss_types=[loss], beta=beta), model, inputs, False)


def kto() -> torch.Tensor:
  model, inputs = answers()
  good = torch.arange(2 * len(PAIRS)) < len(PAIRS)
  inputs |= {'ref_logps': column(1), 'label': good, 'ref_KL_logps': torch.zeros(1)}
  stand_in = trainer(
    loss_type='kto', beta=0.2, desirable_weight=1.5, undesirable_weight=0.5, calculate_KL=True,
    _compute_kl_logps=lambda model, batch: torch.tensor([KL]),
  )  # fmt: skip
  return KTOTrainer._compute_loss(stand_in, model, inputs, False)


def cpo(loss: str, log_probs: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
  stand_in = trainer(
    loss_type=loss, alpha=0.0, simpo_gamma=1.0, beta=beta, label_smoothing=smoothing
  )
  return CPOTrainer.cpo_loss(stand_in, *log_probs.chunk(2))[0].mean()


def orpo() -> torch.Tensor:
  chosen, rejected = (column(0) / column(2)).chunk(2)
  odds = ORPOTrainer.odds_ratio_loss(trainer(beta=0.1), chosen, rejected)[0]
  # The cross-entropy is the paper's, a mean over pairs. TRL takes one over all tokens, the prompts' too.
  return (-chosen - odds).mean()


def reward() -> torch.Tensor:
  outputs = types.SimpleNamespace(logits=column(3)[:, None])
  stand_in = trainer(args=types.SimpleNamespace(center_rewards_coefficient=0.05))
  inputs = {'margin': torch.tensor(0.3)}
  return RewardTrainer.compute_loss(stand_in, lambda **_: outputs, inputs)


def main() -> None:
  losses = {
    'kto': kto(),
    'dpo': dpo('sigmoid', 0.3),
    # The log-ratios in the place of log p: cDPO, and IPO over sums, are CPO's losses of them.
    'cdpo': cpo('sigmoid', column(0) - column(1), 0.3, 0.2),
    'ipo': cpo('ipo', column(0) - column(1), 0.1, 0.0),
    'ipo per token': dpo('ipo', 0.1),
    'simpo': cpo('simpo', column(0) / column(2), 2.0, 0.0),
    'orpo': orpo(),
    'bradley-terry': reward(),
  }
  for name, loss in losses.items():
    print(f'  {name!r}: {loss.item():.7g},')


if __name__ == '__main__':
  main()
