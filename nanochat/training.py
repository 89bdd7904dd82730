"""The steps that all training scripts share: one gradient step, the meter, the stop signal, saving and resuming.

The loop itself (data, model, the order of events) is in the script of each stage, or in finetune.py for the two
that share it. There is no Trainer class.
"""

from __future__ import annotations

import base64
import gc
import json
import math
import os
import platform
import signal
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from nanochat.checkpoint_manager import (
    checkpoint_dir,
    find_last_step,
    list_steps,
    load_checkpoint,
    load_optimizer,
    set_aside,
    verify,
)
from nanochat.common import Compute, UserError, atomic, print0, restarts
from nanochat.device import peak_flops, peak_memory
from nanochat.optim import MuonAdamW
from nanochat.saver import Saver
from nanochat.schedule import lr_multiplier, muon_momentum, weight_decay_multiplier

SMOOTHING = 0.9  # of the loss that is printed


def make_optimizer(model, settings: Namespace, lr_scale: float, weight_decay: float) -> MuonAdamW:
    """The optimizer with the learning rates of the flags, multiplied by `lr_scale`."""
    return MuonAdamW(
        model.param_groups(
            embedding_lr=settings.embedding_lr * lr_scale,
            unembedding_lr=settings.unembedding_lr * lr_scale,
            matrix_lr=settings.matrix_lr * lr_scale,
            scalar_lr=settings.scalar_lr * lr_scale,
            weight_decay=weight_decay,
        )
    )


def freeze_garbage() -> None:
    """Exclude the present objects from later garbage collections: a full one takes up to half a second of a step."""
    gc.collect()
    gc.freeze()


# -----------------------------------------------------------------------------
# One step


class LossScale(torch.amp.GradScaler):
    """Loss scaling for float16 (arXiv:1710.03740, section 3.2) that accepts float16 gradients, which our embeddings have.

    A step whose gradients overflow on any rank is skipped on all ranks.
    """

    def __init__(self, compute: Compute):
        super().__init__(compute.device.type, init_scale=2.0**15, growth_interval=1000)
        self.compute = compute

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, True)
        return {device: self.compute.sum(overflows) for device, overflows in found.items()}


def make_loss_scale(compute: Compute, state: dict | None) -> LossScale | None:
    """Loss scaling where the compute dtype needs it; `state` is that of a resumed run."""
    if compute.dtype != torch.float16:
        return None
    loss_scale = LossScale(compute)
    if state:
        loss_scale.load_state_dict(state)
    return loss_scale


def train_step(
    model, optimizer, batches, compute: Compute, loss_scale: LossScale | None = None, count: int | None = None
) -> torch.Tensor:
    """One update from the micro-batches of a step; returns the mean loss over their targets, in nats.

    `batches` are this rank's (inputs, targets), both (B, T), targets of -1 ignored. Every target weighs the same, whichever
    micro-batch and rank it belongs to. Without any target the step changes nothing and the loss is 0.
    `count` is the number of targets on all ranks where the caller knows it; then nothing here synchronises with a GPU.
    """
    if count is None:
        count = int(compute.sum(sum((targets >= 0).sum() for _, targets in batches)))
    if count == 0:
        return torch.zeros((), device=batches[0][0].device)
    losses = (model(inputs, targets, loss_reduction="sum") / count for inputs, targets in batches)
    return backward_and_step(losses, optimizer, compute, loss_scale)


def backward_and_step(
    losses: Iterable[torch.Tensor], optimizer, compute: Compute, loss_scale: LossScale | None = None
) -> torch.Tensor:
    """One update by the gradient of the sum of `losses` over all ranks; returns that sum.

    The losses are computed one at a time, so that only one micro-batch's activations are held. A rank may have none.
    """
    total = torch.zeros((), device=compute.device)
    for loss in losses:
        total = total + loss.detach()
        (loss_scale.scale(loss) if loss_scale else loss).backward()
        compute.heartbeat()
    if loss_scale:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # GradScaler needs a gradient to check
        loss_scale.unscale_(optimizer)
        loss_scale.step(optimizer)
        loss_scale.update()
    else:
        optimizer.step()
    optimizer.zero_grad()
    return compute.sum(total)


def set_rates(optimizer, step: int, progress: float, warmup_steps: int, warmdown: float, final: float) -> float:
    """Set the rates of step `step` in the parameter groups; returns the learning-rate multiplier.

    `progress` in [0, 1] is the share of the run that is done; for the others see `lr_multiplier`.
    """
    lrm = lr_multiplier(step, progress, warmup_steps, warmdown, final)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lrm
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step, progress, warmdown)
            group["weight_decay"] = group["initial_weight_decay"] * weight_decay_multiplier(progress)
    return lrm


def due(step: int, every: int, last: bool = False) -> bool:
    """Whether something done every `every` steps and at the end is due (-1: at the end only, 0: never)."""
    return every != 0 and (last or (every > 0 and step > 0 and step % every == 0))


# -----------------------------------------------------------------------------
# Around the steps


class StopSignal:
    """SIGTERM and SIGINT request a stop after the current step or evaluation batch; a second SIGINT stops at once.

    >>> stop = StopSignal(compute)
    >>> while not stop.requested(): ...
    """

    def __init__(self, compute: Compute):
        self.compute, self.received = compute, False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number, frame):
        self.received = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.compute.is_main:
            with suppress(OSError):  # os.write, since print is not safe in a signal handler
                os.write(2, f"\n{signal.Signals(number).name}: stopping as soon as the state is saved\n".encode())

    def requested(self) -> bool:
        """Whether any rank has received a signal. A collective call: all ranks get the same answer."""
        return bool(self.compute.sum(torch.tensor(int(self.received))) > 0)


def guarded(what: str, evaluate: Callable, failures: list[str]):
    """The result of `evaluate()`; None, with one line printed and `failures` extended, where it fails.

    A failed evaluation never ends a training run.
    """
    try:
        return evaluate()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print0(f"error: {what} failed ({reason}); training continues")
        failures.append(what)


class Meter:
    """Smooths the loss, measures time, and reports each step to the terminal, `metrics.jsonl` and wandb.

    `state` comes from the checkpoint of a resumed run. On a GPU a step is reported after the next one has been
    launched, so that the GPU never waits for its loss to be read; call `flush` before anything that is not training.
    """

    def __init__(
        self, compute: Compute, directory: Path, tokens_per_step: int, flops_per_token: int | None,
        wandb_run=None, state: dict | None = None,
    ):  # fmt: skip
        self.compute, self.wandb_run = compute, wandb_run
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak = peak_flops(compute.device)
        state = state or {"step": 0, "ema": 0.0, "weight": 0.0, "total_time": 0.0}
        self.ema = state["ema"]
        self.weight = state["weight"]
        self.total_time = state["total_time"]
        self.recent: list[float] = []  # the last step times, for the ETA
        self.lags = compute.device.type == "cuda"
        self.pending: tuple | None = None  # the step that is not reported yet
        self.path = directory / "metrics.jsonl"
        if compute.is_main:
            self._remove_lines_after(state["step"])

    def _remove_lines_after(self, step: int) -> None:
        """Remove what was logged after the checkpoint at `step`. Evaluations at that step are repeated, so they go, too."""
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        retained = []
        for line in lines:
            with suppress(ValueError):  # the last line may be incomplete
                values = json.loads(line)
                if values["step"] < step or values["step"] == step and "loss" in values:
                    retained.append(line + "\n")
        with atomic(self.path) as tmp:
            tmp.write_text("".join(retained))

    def state(self, step: int) -> dict:
        return {"step": step, "ema": self.ema, "weight": self.weight, "total_time": self.total_time}

    def start(self) -> None:
        if self.pending is None:
            self.started = time.perf_counter()

    def stop(
        self, step: int, progress: float, loss: torch.Tensor, lrm: float, epoch: int,
        tokens: int | None = None, **values: float,
    ) -> None:  # fmt: skip
        """Report step number `step` and further `values`, at once or (on a GPU) when the next step has been launched.

        `tokens`: of this step, where their number varies. Raises UserError when a loss is not finite.
        """
        self.flush()
        self.pending = (step, progress, loss, lrm, epoch, tokens, values)
        if not self.lags:
            self.flush()

    def flush(self) -> None:
        """Wait for the last step and report it, if it has not been reported."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self._report(*pending)

    def _report(self, step, progress, loss, lrm, epoch, tokens, values) -> None:
        loss = loss.item()  # waits for the device, so dt lasts from the end of one step to the end of the next
        now = time.perf_counter()
        dt, self.started = now - self.started, now
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} at step {step} (learning-rate multiplier {lrm:.3f}); "
                "resume from the last good checkpoint with --resume-from-step latest and a lower learning rate"
            )
        self.total_time += dt
        self.recent = self.recent[-19:] + [dt]

        # Exponential moving average; `weight` tends to 1 and removes the bias towards the initial 0
        self.ema = SMOOTHING * self.ema + (1 - SMOOTHING) * loss
        self.weight = SMOOTHING * self.weight + (1 - SMOOTHING)
        smooth = self.ema / self.weight

        tok_per_sec = (tokens or self.tokens_per_step) / dt
        known = self.peak and self.flops_per_token
        mfu = tok_per_sec * self.flops_per_token / (self.peak * self.compute.world_size) if known else None
        median = sorted(self.recent)[len(self.recent) // 2]
        eta = median * step * (1 - progress) / progress if progress > 0 else 0.0
        usage = {"tok_per_sec": tok_per_sec, "mfu": mfu, "peak_memory": peak_memory(self.compute.device)}
        self.log(step, loss=smooth, raw_loss=loss, lrm=lrm, dt=dt, epoch=epoch, **usage, **values)
        more = "".join(f"{name.replace('_', ' ')} {value:.3g} | " for name, value in values.items())
        print0(
            f"step {step:05d} ({100 * progress:.1f}%) | {more}loss {smooth:.4f} | lrm {lrm:.2f} | dt {1000 * dt:.0f} ms | "
            f"{tok_per_sec:,.0f} tok/s | mfu {'-' if mfu is None else f'{100 * mfu:.1f}%'} | epoch {epoch} | "
            f"total {self.total_time / 60:.1f} min | eta {eta / 60:.1f} min"
        )

    def log(self, step: int, **values) -> None:
        """Append one line to metrics.jsonl and send the same to wandb."""
        if self.compute.is_main:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, **values, "total_time": self.total_time}) + "\n")
            except OSError as error:  # a full disk does not end the run
                print0(f"error: step {step} is missing in {self.path}: {error}")
        if self.wandb_run:
            self.wandb_run.log({**values, "total_time": self.total_time}, step=step)

    def finish(self) -> None:
        self.flush()
        if self.wandb_run:
            self.wandb_run.finish()


# -----------------------------------------------------------------------------
# Saving, resuming, starting from another stage's model


def save_training(saver: Saver, step, model, optimizer, tokenizer, settings, meter, val_bpb, loader_state, loss_scale) -> None:
    """Save everything that a resumed run needs, in the background. Every rank calls this."""
    meta = {
        "model_config": asdict(model.config),
        "model_tag": saver.directory.name,
        "tokenizer": tokenizer.fingerprint(),
        "user_config": vars(settings),
        "val_bpb": val_bpb,
        "loader_state": loader_state,
        "loop_state": {
            "meter": meter.state(step),
            "loss_scale": loss_scale.state_dict() if loss_scale else None,
            "wandb_id": meter.wandb_run.id if meter.wandb_run else None,
        },
        "rng_state": {"cpu": base64.b64encode(torch.get_rng_state().numpy()).decode()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    saver.save(step, model.state_dict(), optimizer.state_dict(), meta, tokenizer)


def step_to_resume(directory: Path, requested: str, restarted: bool) -> int | None:
    """The step to resume from, or None for a new run. The only place that decides this.

    `requested` is --resume-from-step. A job that torchrun or Slurm has restarted resumes from its last checkpoint. A new
    run first moves what an earlier one left under this tag to TAG.old, and resuming from an explicit step moves the later
    checkpoints there, so that "latest" always belongs to this run.
    """
    if requested not in ("-1", "latest") and not requested.isdigit():
        raise UserError(f"--resume-from-step {requested!r} is neither a step nor 'latest'")
    if restarted and list_steps(directory):
        requested = "latest"
    if requested == "-1":
        if earlier := set_aside(directory):
            print0(f"moved the earlier run under this tag to {earlier}")
        return None
    if requested == "latest":
        return find_last_step(directory)
    verify(directory, int(requested), names=[])  # it exists
    if later := set_aside(directory, after=int(requested)):
        print0(f"moved the checkpoints of later steps to {later}")
    return int(requested)


def resume_training(saver: Saver, settings: Namespace, model, optimizer, tokenizer, compute: Compute) -> dict | None:
    """Load what `--resume-from-step` names into model and optimizer; returns its meta, or None for a new run.

    Raises UserError when the model, the tokenizer, or what determines the order of the data differs.
    """
    directory = saver.directory
    restarted = max(compute.gather(restarts())) > 0  # counted by node
    step = compute.on_main(lambda: step_to_resume(directory, settings.resume_from_step, restarted))
    if step is None:
        return None
    saved = verify(directory, step, names=[])
    before, now = saved["user_config"], vars(settings)
    place = f"step {step} in {directory}"
    if changed := differences(saved["model_config"], asdict(model.config)):
        raise UserError(f"{place} is of another model ({changed}); give the same flags, or another --model-tag")
    if saved["tokenizer"] != tokenizer.fingerprint():
        raise UserError(f"{place} was trained with another tokenizer; restore that one, or start a new run")
    for name in ("total_batch_size", "max_seq_len"):
        if before.get(name) != now[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{place} was trained with {flag} {before.get(name)}, not {now[name]}; give the same value")

    model_state, meta = load_checkpoint(directory, step, compute)
    model.load_state_dict(model_state)
    optimizer.load_state_dict(load_optimizer(directory, step, optimizer.state_dict(), compute.rank))
    rng_state = bytearray(base64.b64decode(meta["rng_state"]["cpu"]))
    torch.set_rng_state(torch.frombuffer(rng_state, dtype=torch.uint8))
    if changed := differences(before, now, ignored=("resume_from_step", "run", "device_batch_size", "examples")):
        print0(f"flags that differ from the saved run: {changed}")
    print0(f"resumed from {place}")
    return meta


def differences(before: dict, now: dict, ignored: tuple = ()) -> str:
    """What differs between two configs: {"depth": 4} and {"depth": 6} -> "depth 4 -> 6"."""
    changed = [name for name, value in now.items() if name not in ignored and before.get(name) != value]
    return ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in changed)


def inherit(args: Namespace, origin: dict) -> Namespace:
    """`args` with every flag that was not given (None) taken from the run that trained the model; its meta is `origin`."""
    saved, settings = origin.get("user_config", {}), Namespace(**vars(args))
    for name, value in vars(args).items():
        if value is None and name not in ("model_tag", "model_step"):
            if saved.get(name) is None:
                raise UserError(f"the model's checkpoint does not record its {name}; give --{name.replace('_', '-')}")
            setattr(settings, name, saved[name])
    settings.short_run, settings.examples = saved.get("short_run", 1.0), saved.get("examples", [])
    return settings


def warm_start(optimizer, stage: str, origin: dict, compute: Compute) -> None:
    """Start with the optimizer state of the run that trained the model, where it was saved."""
    directory, states = checkpoint_dir(stage, origin["model_tag"]), []

    def load() -> None:
        states.append(load_optimizer(directory, origin["step"], optimizer.state_dict(), compute.rank))

    try:
        compute.on_every_rank(load)  # on all ranks, or on none
    except UserError as error:
        print0(f"starting with a new optimizer state: {error}")
    else:
        optimizer.load_state_dict(states[0])
