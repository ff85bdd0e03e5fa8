"""Mixed-precision optimisation: fp32 master weights, bf16 compute weights, int4-rounded weights in some steps."""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers import Qwen2ForCausalLM

from .data import MicroBatch
from .model import is_quantizable, round_int4

BETAS = (0.9, 0.95)
MAX_GRADIENT_NORM = 1.0


def learning_rate(progress: float, step: int, peak: float, warmup_steps: int, decay_start: float) -> float:
    """Return a warm-up, stable, cosine-decay learning rate.

    Args:
        progress: how much of the run is done, 0..1.
        step: the optimizer step, for the linear warm-up.
        peak: the stable phase's rate.
        warmup_steps: steps until the peak.
        decay_start: the progress at which the decay to 1 % of the peak starts.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if progress <= decay_start:
        return peak
    done = min((progress - decay_start) / (1 - decay_start), 1.0)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_sum(model: Qwen2ForCausalLM, batch: MicroBatch) -> torch.Tensor:
    """Return the summed cross-entropy of a micro-batch's targets, in nats, as f32[].

    Logits are computed at the target positions only.
    """
    return F.cross_entropy(*target_logits(model, batch), reduction="sum")


def target_logits(model: Qwen2ForCausalLM, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return f32[num_targets, V] logits and i64[num_targets] targets."""
    device = model.device
    input_ids = torch.from_numpy(batch.input_ids).to(device, non_blocking=True)
    positions = torch.from_numpy(batch.positions).to(device, non_blocking=True)
    targets = torch.from_numpy(batch.targets).to(device, non_blocking=True)
    # Causal attention needs no mask on right-padded rows; saying so keeps the fastest attention kernel available.
    masks = {"full_attention": None}
    hidden = model.model(input_ids=input_ids, attention_mask=masks, use_cache=False).last_hidden_state  # [B, S, C]
    chosen = hidden.flatten(0, 1).index_select(0, positions)  # [num_targets, C]
    return F.linear(chosen, model.model.embed_tokens.weight).float(), targets


class MasterWeights:
    """fp32 master weights and their AdamW, for a model that computes in a narrower type.

    The model's parameters only ever hold a rounding of the masters: to the compute type, or, on the steps meant to
    make the model robust to quantization, first to int4 (the gradient passes the rounding unchanged).
    """

    def __init__(self, model: Qwen2ForCausalLM, compute_type: torch.dtype, weight_decay: float) -> None:
        self.names = [name for name, _ in model.named_parameters()]
        self.parameters = [parameter for _, parameter in model.named_parameters()]
        self.masters = [parameter.detach().clone().float().requires_grad_() for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.data = parameter.data.to(compute_type)
        decayed = [master for master in self.masters if master.ndim > 1]
        others = [master for master in self.masters if master.ndim == 1]
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=1e-8, fused=self.masters[0].is_cuda)

    @torch.no_grad()
    def publish(self, *, int4: bool = False) -> None:
        """Copy the masters into the model."""
        rounded: Iterable[torch.Tensor] = self.masters
        if int4:
            rounded = [
                round_int4(master) if is_quantizable(name) else master
                for name, master in zip(self.names, self.masters, strict=True)
            ]
        torch._foreach_copy_([parameter.data for parameter in self.parameters], list(rounded))

    def step(self, rate: float) -> torch.Tensor:
        """Take the model's gradients, clip them, update the masters; returns the gradient norm, f32[]."""
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = parameter.grad.float() if parameter.grad is not None else None
            parameter.grad = None
        norm = torch.nn.utils.clip_grad_norm_(self.masters, MAX_GRADIENT_NORM, foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return norm
