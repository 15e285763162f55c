"""The GPU benchmark's LLaMA in PyTorch, as one writes it there: fused attention, bfloat16, fused AdamW."""

import torch
from torch import nn
from torch.nn import functional


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
  """Rotary positions (Su et al. 2021, arXiv:2104.09864) by halves; x: [batch, heads, length, head_dim]."""
  first, second = x.float().chunk(2, dim=-1)
  cosine, sine = angles.cos(), angles.sin()
  rotated = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
  return rotated.type_as(x)


class Layer(nn.Module):
  """Grouped-query attention and SwiGLU behind RMSNorms."""

  def __init__(self, embed: int, heads: int, kv_heads: int, mlp: int):
    super().__init__()
    self.head_dim = embed // heads
    self.heads, self.kv_heads = heads, kv_heads
    self.norm_1 = nn.RMSNorm(embed)
    self.norm_2 = nn.RMSNorm(embed)
    width = (heads + 2 * kv_heads) * self.head_dim
    self.qkv = nn.Linear(embed, width, bias=False)
    self.output = nn.Linear(embed, embed, bias=False)
    self.gate_up = nn.Linear(embed, 2 * mlp, bias=False)
    self.down = nn.Linear(mlp, embed, bias=False)

  def forward(self, x, angles):
    qkv = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
    q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
    q, k = rotate(q, angles), rotate(k, angles)
    y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    x = x + self.output(y.transpose(1, 2).flatten(-2))
    gate, up = self.gate_up(self.norm_2(x)).chunk(2, dim=-1)
    return x + self.down(functional.silu(gate) * up)


class Llama(nn.Module):
  """`forward` is the mean loss in nats per token."""

  def __init__(self, vocab: int, embed: int, layers: int, heads: int, kv_heads: int, mlp: int):
    super().__init__()
    self.tokens = nn.Embedding(vocab, embed)
    self.layers = nn.ModuleList([Layer(embed, heads, kv_heads, mlp) for _ in range(layers)])
    self.norm = nn.RMSNorm(embed)
    self.head = nn.Linear(embed, vocab, bias=False)
    half = embed // heads // 2
    self.register_buffer('frequencies', 10000.0 ** (-torch.arange(half) / half))
    for parameter in self.parameters():
      if parameter.ndim > 1:
        nn.init.normal_(parameter, std=0.02)

  def forward(self, tokens, targets):
    places = torch.arange(tokens.shape[1], device=tokens.device)
    angles = places[:, None] * self.frequencies
    x = self.tokens(tokens)
    for layer in self.layers:
      x = layer(x, angles)
    logits = self.head(self.norm(x))
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def step_function(shape: dict, device: str):
  """(`step(tokens, targets) -> loss`, number of parameters): loss, gradients, clipping to norm 1, AdamW."""
  torch.manual_seed(0)
  torch.set_float32_matmul_precision('high')
  model = Llama(**shape).to(device)
  parameters = list(model.parameters())
  groups = [
    {'params': [p for p in parameters if p.ndim > 1], 'weight_decay': 0.1},
    {'params': [p for p in parameters if p.ndim == 1], 'weight_decay': 0.0},
  ]
  optimizer = torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), fused=True)
  loss_of = torch.compile(model)

  def step(tokens, targets):
    with torch.autocast(device, dtype=torch.bfloat16):
      loss = loss_of(tokens, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()

  return step, sum(p.numel() for p in parameters)
