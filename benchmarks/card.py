"""``python -m benchmarks.card``: all that needs a real card, in under ten minutes; without one it says so and ends.

======= ======= ==========================================================================================
check   seconds what has to hold
======= ======= ==========================================================================================
oracle  60      sums of ViT, GPT, LSTM and GRU are those of a float64 loop over single examples
vit-b   90      a step in bfloat16 is at most 1.3 of the compiled plain one, batch 64
gpt-2   90      the same of GPT-2, 128 tokens
memory  40      a step that does not fit is made of smaller physical batches
stack   40      ``stack_clients`` changes no result; seconds of a round with and without it
layers  150     tests of layers, clipping rules, optimizers and stacked clients
runs    100     tests of whole runs, and of two workers that share the card (``gpus_per_worker``)
======= ======= ==========================================================================================

Seconds are the most that a check may take. Each is a process of its own, so that neither its memory nor its failure
meets the next one. A check ends ``ok``,
``FAILED`` or ``skipped``, with figures or the reason. The command fails if any check did.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.contestants import CLIP_NORM, problem
from benchmarks.networks import GPT, Problem, next_token
from fed_dpsat.params import Params, trainable
from fed_dpsat.run.folder import RunFolder
from fed_dpsat.settings.config import RunConfig
from fed_dpsat.simulation import simulate
from fed_dpsat.step.clipping import FlatClipping
from fed_dpsat.step.generators import training_on
from fed_dpsat.step.gradients.loss import cross_entropy
from fed_dpsat.step.gradients.per_example import ModelLoss, clipped_gradient_sum
from fed_dpsat.step.placement import CPU, finish, is_card, moved, torch_device

ROOT = Path(__file__).parents[1]
TARGET = 1.3
"""Of the compiled plain step in bfloat16."""
SKIPPED = 3
"""The exit status of a check that says why it does not run."""


class Skipped(Exception):
    """Why a check does not run here."""


class Failed(Exception):
    """What does not hold."""


def private_step(made: Problem, engine: str = "auto", physical: int = 128, precision: str = "float32") -> Params:
    """The clipped sum of a batch."""
    loss, rule = ModelLoss(made.module, made.criterion, precision=precision), FlatClipping(clip_norm=CLIP_NORM)
    batch = made.inputs, made.targets
    total, _ = clipped_gradient_sum(
        loss, trainable(made.module), batch, rule, engine=engine, physical_batch_size=physical
    )
    return total


def one_by_one(made: Problem) -> Params:
    """The clipped sum of a batch in float64, example by example, by autograd alone."""
    module = copy.deepcopy(made.module).to(CPU).double()
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in params.items()}
    inputs, targets = made.inputs.to(CPU), made.targets.to(CPU)
    for i in range(len(inputs)):
        one = inputs[i : i + 1].double() if inputs.is_floating_point() else inputs[i : i + 1]
        loss = made.criterion(module(one), targets[i : i + 1]).sum()
        found = torch.autograd.grad(loss, list(params.values()))
        norm = torch.stack([g.norm() for g in found]).norm()
        for name, g in zip(params, found, strict=True):
            total[name] += g * min(1.0, CLIP_NORM / float(norm))
    return total


def difference(found: Params, wanted: Params) -> float:
    """The norm of the difference over that of ``wanted``."""
    pairs = [(found[name].to(CPU).double(), g.to(CPU).double()) for name, g in wanted.items()]
    off, size = (
        torch.stack(norms).norm() for norms in zip(*(((a - b).norm(), b.norm()) for a, b in pairs), strict=True)
    )
    return float(off / size)


def oracle(device: torch.device, names: tuple[str, ...] = ("vit", "gpt", "lstm", "gru"), size: int = 4) -> str:
    """Every engine in float32 within 1e-3, the planned one in bfloat16 within the digits of that.

    torch itself refuses an LSTM in bfloat16 on some machines.
    """
    said = []
    with training_on(device):
        for name in names:
            made = problem(name, size, 16, device)
            wanted = one_by_one(made)
            for engine, precision, bound in (
                ("planned", "float32", 1e-3),
                ("vmap", "float32", 1e-3),
                ("planned", "bfloat16", 0.2),
            ):
                if (name, precision) == ("lstm", "bfloat16"):
                    continue
                off = difference(private_step(made, engine, size, precision), wanted)
                said.append(f"{name} {engine} {precision} {off:.1e}")
                if not off <= bound:
                    raise Failed(f"{said[-1]} is above {bound}")
    return ", ".join(said)


def tests(*which: str) -> Callable[[torch.device], str]:
    """A check that runs tests of ``tests/step/placement``, of the real card alone."""

    def run(device: torch.device) -> str:
        for package in ("pytest", "xdist"):
            if importlib.util.find_spec(package) is None:
                raise Skipped(f"{package} is not installed")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-n",
            "0",
            "--tb=short",
            "-k",
            "cuda",
        ]
        done = subprocess.run(
            [*command, "-m", "slow or not slow", *which], cwd=ROOT, capture_output=True, text=True, check=False
        )
        last = done.stdout.strip().splitlines()[-1:] or ["no output"]
        if done.returncode:
            raise Failed(done.stdout[-3000:] + done.stderr[-500:])
        return last[0]

    return run


def vit_b(device: torch.device, size: int = 64) -> Problem:
    """ViT-B/16 of torchvision: 86 M parameters, images of 224x224."""
    from torchvision.models import vit_b_16

    torch.manual_seed(0)
    images, labels = torch.randn(size, 3, 224, 224), torch.randint(1000, (size,))
    return Problem(vit_b_16().to(device).train(), cross_entropy, images.to(device), labels.to(device))


def gpt_2(device: torch.device, size: int = 64, length: int = 128) -> Problem:
    """GPT-2 in its smallest size, 124 M parameters: of transformers, or the same sizes in plain PyTorch without it."""
    torch.manual_seed(0)
    module: nn.Module
    if importlib.util.find_spec("transformers"):
        import transformers

        from benchmarks.networks import OfTokens

        config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        module = OfTokens(transformers.GPT2LMHeadModel(config), masked=False)
    else:
        module = GPT(length, width=768, depth=12, heads=12, words=50257)
    tokens = torch.randint(1, 50257, (size, length)).to(device)
    return Problem(module.to(device).train(), next_token, tokens, tokens)


def step_of(build: Callable[[torch.device], Problem]) -> Callable[[torch.device], str]:
    """A check of the private step in bfloat16 against the compiled plain one."""
    return lambda device: against_compiled(build(device), device)


def against_compiled(made: Problem, device: torch.device, compiled: bool = True, repeats: int = 10) -> str:
    """Medians of steps that take turns, and what each adds to the card's memory."""
    params = [p for p in made.module.parameters() if p.requires_grad]
    network = torch.compile(made.module) if compiled else made.module

    def plain(module: Callable[[Tensor], Tensor]) -> object:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            outputs = module(made.inputs)
        return torch.autograd.grad(made.criterion(outputs.float(), made.targets).mean(), params)

    def private() -> object:
        with training_on(device):  # as the loop of a client
            return private_step(made, "planned", len(made.inputs), "bfloat16")

    torch.set_float32_matmul_precision("high")  # for what of the plain step is not bfloat16
    steps = {"compiled": lambda: plain(network), "eager": lambda: plain(made.module), "private": private}
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks = {}
    for name, step in steps.items():
        for _ in range(3):
            step()
        finish(device)
        peaks[name] = peak_mb(step, device)
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            finish(device)
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(found) for name, found in times.items()}
    ratio = medians["private"] / medians["compiled"]
    figures = ", ".join(f"{name} {1000 * medians[name]:.0f} ms {peaks[name]:.0f} MB" for name in steps)
    said = f"{type(made.module).__name__}: {ratio:.2f} of the compiled plain step (target {TARGET}): {figures}"
    if ratio > TARGET and is_card(device):
        raise Failed(said)
    return said


def peak_mb(step: Callable[[], object], device: torch.device) -> float:
    """What ``step`` adds to a card's memory at its highest; 0 on a CPU."""
    if not is_card(device):
        return 0.0
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    finish(device)
    return float(torch.cuda.max_memory_allocated(device) - held) / 2**20


def stacked(device: torch.device, stacks: tuple[int, ...] = (1, 8, 32)) -> str:
    """Three rounds of 32 clients on the digits, alone and stacked: nearly the same model, and seconds of a round."""
    base = RunConfig(
        model="mlp",
        device=device.type,
        num_clients=32,
        num_rounds=3,
        local_steps=4,
        lr=0.1,
        noise_multiplier=1.0,
        target_epsilon=0.0,
        physical_batch_size=2048,
    )
    said, params = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for stack in stacks:
            out, ends = Path(folder) / str(stack), [time.perf_counter()]
            config = dataclasses.replace(base, stack_clients=stack)
            simulate(config, out, on_round=lambda line, ends=ends: ends.append(time.perf_counter()), progress=False)
            params[stack] = RunFolder(out, resume=True).load_checkpoint().params
            said.append(f"stack_clients={stack} {ends[-1] - ends[-2]:.2f} s a round")
            if (off := difference(params[stack], params[stacks[0]])) > 1e-3:
                raise Failed(f"stack_clients={stack} moves the model by {off:.1e} of its norm")
    return ", ".join(said)


def out_of_memory(device: torch.device, build: Callable[[torch.device], Problem] = vit_b, small: int = 4) -> str:
    """With memory for half of a batch at most, ``physical_batch_size`` of the whole one still gives the sum."""
    made = build(device)
    size = len(made.inputs)
    with training_on(device):
        wanted = moved(private_step(made, physical=small), CPU)
        few, all_of_it = (peak_mb(lambda n=n: private_step(made, physical=n), device) for n in (small, size))
        torch.cuda.empty_cache()
        capacity = torch.cuda.get_device_properties(device).total_memory
        allowed = torch.cuda.memory_allocated(device) + (few + all_of_it) / 2 * 2**20
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / capacity), device)
        try:
            with heard() as lines:
                found = private_step(made, physical=size)
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            off = difference(private_step(made, physical=small), wanted)
            raise Failed(
                f"{all_of_it:.0f} MB do not fit, and the step ends ({str(error).splitlines()[0][:80]}); "
                f"physical_batch_size={small} takes {few:.0f} MB and gives the sum up to {off:.1e}"
            ) from None
    if (off := difference(found, wanted)) > 1e-3:
        raise Failed(f"the sum of smaller physical batches is off by {off:.1e}")
    if not (smaller := [line for line in lines if line.startswith("no memory for")]):
        raise Failed(f"{all_of_it:.0f} MB were not allowed, and the batch was not made smaller")
    return f"{all_of_it:.0f} MB did not fit; {smaller[-1]}; the sum is right up to {off:.1e}"


@contextmanager
def heard() -> Iterator[list[str]]:
    """What the package logs."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fed_dpsat").addHandler(handler)
    try:
        yield lines
    finally:
        logging.getLogger("fed_dpsat").removeHandler(handler)


PLACEMENT = "tests/step/placement"
CHECKS: dict[str, tuple[int, Callable[[torch.device], str]]] = {
    "oracle": (60, oracle),
    "vit-b": (90, step_of(vit_b)),
    "gpt-2": (90, step_of(gpt_2)),
    "memory": (40, out_of_memory),
    "stack": (40, stacked),
    "layers": (150, tests(f"{PLACEMENT}/test_on_a_card.py", f"{PLACEMENT}/test_placement.py")),
    "runs": (100, tests(f"{PLACEMENT}/test_cuda.py")),
}
"""Checks by name, the seconds that each may take, and in what order: those with figures first."""


def no_card() -> str:
    """Why nothing can be checked here, or nothing."""
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} sees no card on this machine"


def check(name: str, device: torch.device) -> int:
    """Run one check here, print what it says and return its exit status."""
    try:
        print(CHECKS[name][1](device))
    except Skipped as reason:
        print(reason)
        return SKIPPED
    except Failed as reason:
        print(reason)
        return 1
    return 0


def in_a_process(name: str, device: str) -> tuple[str, str]:
    """How a check ended, and what it said."""
    command = [sys.executable, "-m", "benchmarks.card", "--device", device, "--check", name]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=CHECKS[name][0], check=False)
    except subprocess.TimeoutExpired:
        return "FAILED", f"it takes more than {CHECKS[name][0]} s"
    said = done.stdout.strip() or done.stderr.strip()[-1500:]
    return {0: "ok", SKIPPED: "skipped"}.get(done.returncode, "FAILED"), said


def main() -> int:
    """All checks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=lambda t: t.split(","), default=list(CHECKS), help="checks, by commas")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if reason := no_card():
        print(f"skipped: {reason}")
        return 0
    if args.check:
        return check(args.check, torch_device(args.device))
    print(f"{torch.cuda.get_device_name(torch_device(args.device))}, torch {torch.__version__}", flush=True)
    failed = False
    for name in args.only:
        started = time.perf_counter()
        how, said = in_a_process(name, args.device)
        failed |= how == "FAILED"
        print(f"{name}: {how} ({time.perf_counter() - started:.0f} s): {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
