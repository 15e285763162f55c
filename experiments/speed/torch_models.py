"""The benchmark's models in PyTorch, written as one writes them there, and their update step."""

import torch
from torch import nn
from torch.nn import functional


class Layer(nn.Module):
  """Pre-LayerNorm attention and MLP, with PyTorch's fused attention and one projection to q, k and v."""

  def __init__(self, embed: int, heads: int, mlp: int):
    super().__init__()
    self.heads = heads
    self.norm_1, self.norm_2 = nn.LayerNorm(embed), nn.LayerNorm(embed)
    self.qkv, self.output = nn.Linear(embed, 3 * embed), nn.Linear(embed, embed)
    self.up, self.down = nn.Linear(embed, mlp), nn.Linear(mlp, embed)

  def forward(self, x):
    split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
    q, k, v = map(split, self.qkv(self.norm_1(x)).chunk(3, dim=-1))
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + self.output(y.transpose(1, 2).flatten(-2))
    return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate='tanh'))


class Decoder(nn.Module):
  """GPT-2 with a tied head; `forward` is the mean loss in nats per token."""

  def __init__(self, vocab: int, positions: int, embed: int, layers: int, heads: int, mlp: int):
    super().__init__()
    self.tokens, self.positions = nn.Embedding(vocab, embed), nn.Embedding(positions, embed)
    self.layers = nn.ModuleList([Layer(embed, heads, mlp) for _ in range(layers)])
    self.norm = nn.LayerNorm(embed)
    nn.init.normal_(self.tokens.weight, std=0.02)
    nn.init.normal_(self.positions.weight, std=0.02)

  def forward(self, tokens, targets):
    x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
    for layer in self.layers:
      x = layer(x)
    logits = functional.linear(self.norm(x), self.tokens.weight)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class T5(nn.Module):
  """transformers' T5 1.1; `forward` is the mean loss in nats per target token."""

  def __init__(self, vocab: int, embed: int, layers: int, heads: int, head_dim: int, mlp: int):
    super().__init__()
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
      vocab_size=vocab, d_model=embed, d_kv=head_dim, d_ff=mlp, num_layers=layers, num_heads=heads,
      feed_forward_proj='gated-gelu', dropout_rate=0.0, decoder_start_token_id=0, use_cache=False,
    )  # fmt: skip
    self.model = T5ForConditionalGeneration(config)
    # 1.1 has a head of its own, which this version of transformers cannot be asked for.
    self.model.lm_head.weight = nn.Parameter(self.model.lm_head.weight.detach() * embed**-0.5)
    self.model.config.tie_word_embeddings = False

  def forward(self, inputs, targets):
    return self.model(input_ids=inputs, labels=targets).loss


MODELS = {
  'W1': lambda: Decoder(vocab=32000, positions=512, embed=256, layers=6, heads=8, mlp=1024),
  'W2': lambda: Decoder(vocab=512, positions=128, embed=64, layers=2, heads=4, mlp=256),
  'W3': lambda: T5(vocab=32128, embed=256, layers=4, heads=4, head_dim=64, mlp=512),
}


def step_function(workload: str, compiled: bool):
  """(`step(tokens or inputs, targets) -> loss`, number of parameters): loss, gradients, clipping, AdamW."""
  torch.manual_seed(0)
  model = MODELS[workload]()
  parameters = [p for p in model.parameters() if p.requires_grad]
  groups = [
    {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': 0.1},
    {'params': [p for p in parameters if p.ndim == 1], 'weight_decay': 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
  loss_of = torch.compile(model) if compiled else model

  def step(inputs, targets):
    loss = loss_of(torch.from_numpy(inputs), torch.from_numpy(targets))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss

  return step, sum(p.numel() for p in parameters)
