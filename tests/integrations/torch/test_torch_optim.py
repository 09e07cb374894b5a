"""tw.optim: real torch optimizers over the reducer of a DDP model."""

from __future__ import annotations

import copy
import io
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import thinwire.torch as tw
import torch
import torch.distributed as dist
from thinwire.errors import InvalidArgument, MismatchError, NotAvailable, PolicyError
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.torch.torch_ranks import run_ranks

FREEZE = 8
MAKERS: dict[str, tuple[str, Callable[..., torch.optim.Optimizer]]] = {
    "dgc": (
        "topk:0.05,values=q8",
        lambda p, r, **k: tw.optim.DGCSGD(p, r, **{"lr": 0.05, "weight_decay": 1e-3, **k}),
    ),
    "adam": ("onebit", lambda p, r, **k: tw.optim.OneBitAdam(p, r, freeze_step=FREEZE, **k)),
    "zero_one": (
        "onebit",
        lambda p, r, **k: tw.optim.ZeroOneAdam(
            p, r, var_freeze_step=FREEZE, kappa=2, local_step_scaler=6, local_step_clipper=4, **k
        ),
    ),
    "lamb": (
        "onebit",
        lambda p, r, **k: tw.optim.OneBitLAMB(
            p, r, freeze_step=FREEZE, **{"lr": 1e-2, "weight_decay": 1e-2, **k}
        ),
    ),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 40), nn.Tanh(), nn.Linear(40, 5)
    )


class Job:
    """A model with its reducer and optimizer, and batches that depend on (step, rank) alone."""

    def __init__(self, which: str, rank: int, module: nn.Module | None = None, **options: Any):
        policy, make = MAKERS[which]
        self.rank = rank
        self.model = DistributedDataParallel(module or network())
        self.reducer = tw.compress(self.model, options.pop("policy", policy))
        self.opt = make(self.model.parameters(), self.reducer, **options)

    def loss(self, step: int, scale: float = 1.0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + self.rank)
        parameter = next(self.model.parameters())
        x = torch.randn(16, 40, generator=generator)
        target = x[:, :5].argmax(dim=1)
        return scale * nn.functional.cross_entropy(
            self.model(x.to(parameter.dtype)).float(), target
        )

    def step(self, step: int) -> float:
        self.opt.zero_grad()
        loss = self.loss(step)
        loss.backward()
        self.opt.step()
        return loss.item()

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()]).clone()

    def same_on_all_ranks(self) -> bool:
        mine = self.weights()
        every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(every, mine)
        return all(torch.equal(other, mine) for other in every)


def job_trains(rank: int, size: int, which: str) -> None:
    job = Job(which, rank)
    assert isinstance(job.opt, torch.optim.Optimizer)
    losses = [job.step(step) for step in range(60)]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    if which == "zero_one":
        for step in range(60, 70):
            if job.opt.synchronised:
                break
            job.step(step)
    assert job.same_on_all_ranks()
    assert job.opt.steps == job.reducer.stats()["steps"]
    if which in ("adam", "lamb"):
        assert job.opt.frozen_after == FREEZE


@pytest.mark.parametrize("which", MAKERS)
def test_trains_and_keeps_replicas_equal(which: str) -> None:
    run_ranks(__file__, "job_trains", 3, which)


PLAIN: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "dgc": lambda p, **k: torch.optim.SGD(p, **{"lr": 0.05, "momentum": 0.9, **k}),
    "adam": lambda p, **k: torch.optim.AdamW(p, **{"weight_decay": 0.0, **k}),
    "zero_one": lambda p, **k: torch.optim.AdamW(p, **{"weight_decay": 0.0, **k}),
}


def job_is_the_plain_optimizer(rank: int, size: int, which: str, nesterov: bool) -> None:
    options = {"weight_decay": 0.01} | ({"nesterov": True} if nesterov else {})
    job = Job(which, rank, **options)
    module = network()
    plain = PLAIN[which](module.parameters(), **options)
    for step in range(30):
        job.step(step)
        plain.zero_grad()
        generator = torch.Generator().manual_seed(1000 * step + rank)
        x = torch.randn(16, 40, generator=generator)
        nn.functional.cross_entropy(module(x), x[:, :5].argmax(dim=1)).backward()
        plain.step()
    expected = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(job.weights(), expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(job.weights(), torch.cat([p.flatten() for p in network().parameters()]))


@pytest.mark.parametrize(
    ("which", "nesterov"), [("dgc", False), ("dgc", True), ("adam", False), ("zero_one", False)]
)
def test_on_one_rank_it_is_the_plain_optimizer(which: str, nesterov: bool) -> None:
    run_ranks(__file__, "job_is_the_plain_optimizer", 1, which, nesterov)


def saved_and_read(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def job_resumes(rank: int, size: int, which: str) -> None:
    for at in (3, FREEZE + 1, FREEZE + 12):
        first = Job(which, rank)
        for step in range(at):
            first.step(step)
        weights = copy.deepcopy(first.model.module.state_dict())
        state = saved_and_read(first.opt.state_dict())
        for step in range(at, at + 12):
            first.step(step)
        second = Job(which, rank, network(seed=1), lr=0.123)
        second.model.module.load_state_dict(weights)
        second.opt.load_state_dict(state)
        assert second.opt.param_groups[0]["lr"] == first.opt.param_groups[0]["lr"]
        for step in range(at, at + 12):
            second.step(step)
        assert torch.equal(first.weights(), second.weights())
        one, two = first.opt.state_dict(), second.opt.state_dict()
        for index, slots in one["state"].items():
            for slot, value in slots.items():
                assert torch.equal(value, two["state"][index][slot])
        for key, value in one["ranks"][0]["reducer"]["residuals"].items():
            assert torch.equal(value, two["ranks"][0]["reducer"]["residuals"][key])


@pytest.mark.parametrize("which", MAKERS)
def test_resumes_bit_for_bit(which: str) -> None:
    run_ranks(__file__, "job_resumes", 2, which)


def pending(states: list[dict[str, Any]], kind: str) -> dict[str, torch.Tensor]:
    """(1/P) sum over workers + owners of what the ranks hold, by layer."""
    sums: dict[str, torch.Tensor] = {}
    for state in states:
        for key, values in state["reducer"]["residuals"].items():
            role, rest = key.split("/", 1)
            name, _, extent = rest.rpartition("/")
            begin, end = (int(x) for x in extent.split(":"))
            if role not in (kind, "owner") or (role == "owner" and kind != "worker"):
                continue
            total = sums.setdefault(name, torch.zeros(60 * 40, dtype=torch.float64))
            total[begin:end] += values.double() / (len(states) if role == kind else 1)
    return sums


def worth(state: dict[str, Any]) -> torch.Tensor:
    """How far the first weight would still go, over lr, were there no more gradients: what is
    pending, and what its momentum (0.9) adds up to."""
    total = pending(state["ranks"], "worker").get("0.weight", torch.zeros(2400))
    velocity = pending(state["ranks"], "worker.velocity").get("0.weight", torch.zeros(2400))
    own = state["state"].get(0, {}).get("momentum_buffer")
    if own is not None:
        velocity = velocity + own.double().flatten()
    return total + 0.9 / (1 - 0.9) * velocity


def job_begins(rank: int, size: int, which: str, folder: str) -> None:
    job = Job(which, rank)
    for step in range(FREEZE + 8):
        job.step(step)
    torch.save(job.opt.state_dict(), pathlib.Path(folder) / f"rank{rank}.pt")
    gathered = job.opt.gather_state_dict()
    if rank == 0:
        torch.save({"model": job.model.module.state_dict(), "opt": gathered}, f"{folder}/all.pt")


def job_goes_on(rank: int, size: int, which: str, folder: str) -> None:
    saved = torch.load(f"{folder}/all.pt", weights_only=True)
    job = Job(which, rank)
    job.model.module.load_state_dict(saved["model"])
    job.opt.load_state_dict(saved["opt"])
    now = job.opt.gather_state_dict()["ranks"]
    assert len(now) == size
    one = 1 in (size, len(saved["opt"]["ranks"]))
    for kind in ("worker", "worker.velocity") if not one else ():  # else they are the optimizer's
        before, after = pending(saved["opt"]["ranks"], kind), pending(now, kind)
        assert before.keys() == after.keys()
        for name in after:
            torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=1e-7)
    if which == "dgc":
        now_worth = worth(job.opt.gather_state_dict())
        torch.testing.assert_close(
            now_worth.double(), worth(saved["opt"]).double(), rtol=1e-5, atol=1e-5
        )
    losses = [job.step(step) for step in range(100, 130)]
    assert all(loss == loss for loss in losses)
    gathered = job.opt.gather_state_dict()
    if rank == 0:
        torch.save({"model": job.model.module.state_dict(), "opt": gathered}, f"{folder}/all.pt")


@pytest.mark.parametrize("which", ["dgc", "adam"])
def test_any_number_of_ranks_goes_on(which: str, tmp_path: pathlib.Path) -> None:
    run_ranks(__file__, "job_begins", 4, which, str(tmp_path))
    parts = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (2, 0, 3, 1)]
    offline = tw.gather_state_dicts(parts)
    online = torch.load(tmp_path / "all.pt", weights_only=True)["opt"]
    assert sorted(r["reducer"]["rank"] for r in offline["ranks"]) == [0, 1, 2, 3]
    assert [r["reducer"]["rank"] for r in online["ranks"]] == [0, 1, 2, 3]
    for size in (2, 4, 1, 2):
        run_ranks(__file__, "job_goes_on", size, which, str(tmp_path))


def job_works_with_torch(rank: int, size: int, which: str) -> None:
    module = network()
    groups = [
        {"params": list(module[0].parameters()), "lr": 1e-3},
        {"params": [*module[2].parameters(), *module[4].parameters()]},
    ]
    model = DistributedDataParallel(module)
    policy, make = MAKERS[which]
    reducer = tw.compress(model, policy)
    opt = make(groups, reducer, lr=2e-3)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=5, gamma=0.5)
    job = Job.__new__(Job)
    job.rank, job.model, job.reducer, job.opt = rank, model, reducer, opt
    for step in range(16):
        opt.zero_grad()
        with model.no_sync():
            job.loss(2 * step).backward()

        def closure(step: int = step) -> torch.Tensor:
            loss = job.loss(2 * step + 1)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            return loss

        assert opt.step(closure) > 0
        scheduler.step()
    assert opt.param_groups[0]["lr"] == 1e-3 * 0.5**3
    assert reducer.stats()["steps"] == 16
    if which != "zero_one" or opt.synchronised:
        assert job.same_on_all_ranks()


@pytest.mark.parametrize("which", MAKERS)
def test_groups_schedulers_closures_clipping_accumulation(which: str) -> None:
    run_ranks(__file__, "job_works_with_torch", 2, which)


def job_scaler(rank: int, size: int, which: str, options: dict[str, Any]) -> None:
    scaled, plain = Job(which, rank, **options), Job(which, rank, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=6)
    for step in range(FREEZE + 8):
        plain.step(step)
        scaled.reducer.set_loss_scale(scaler.get_scale())
        scaled.opt.zero_grad()
        scaler.scale(scaled.loss(step)).backward()
        scaler.step(scaled.opt)
        scaler.update()
    assert scaler.get_scale() > 1024.0
    assert torch.equal(scaled.weights(), plain.weights())  # powers of two

    before, state = scaled.weights(), scaled.opt.state_dict()
    scaled.reducer.set_loss_scale(scaler.get_scale())
    scaled.opt.zero_grad()
    scaler.scale(scaled.loss(99, float("inf") if rank == 1 else 1.0)).backward()
    scaler.step(scaled.opt)
    scale = scaler.get_scale()
    scaler.update()
    assert torch.equal(scaled.weights(), before)
    assert scaled.opt.steps == state["ranks"][0]["numbers"]["steps"][0]
    assert scaler.get_scale() == scale / 2

    scaled.opt.zero_grad()
    scaler.scale(scaled.loss(100)).backward()
    with pytest.raises(InvalidArgument, match=r"set_loss_scale\(scaler.get_scale\(\)\)"):
        scaler.step(scaled.opt)


@pytest.mark.parametrize(
    ("which", "options"),
    [("dgc", {}), ("dgc", {"clip": 0.1}), ("adam", {}), ("zero_one", {}), ("lamb", {})],
)
def test_grad_scaler(which: str, options: dict[str, Any]) -> None:
    run_ranks(__file__, "job_scaler", 2, which, options)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 40, 3)
        self.head = nn.Linear(40, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        images = x[:, :27].reshape(-1, 3, 3, 3).contiguous(memory_format=torch.channels_last)
        return self.head(self.conv(images).flatten(1))


def job_layouts(rank: int, size: int) -> None:
    torch.manual_seed(0)
    ours = Job("adam", rank, Images())
    torch.manual_seed(0)
    last = Job("adam", rank, Images().to(memory_format=torch.channels_last), policy="none")
    torch.manual_seed(0)
    plain = Job("adam", rank, Images(), policy="none")
    for step in range(FREEZE):
        for job in (ours, last, plain):
            job.step(step)
    torch.testing.assert_close(last.weights(), plain.weights(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.weights(), plain.weights(), rtol=1e-4, atol=1e-6)
    assert last.opt.state[last.model.module.conv.weight]["exp_avg"].stride()[1] == 1

    half = Job("adam", rank, network().to(torch.bfloat16), lr=1e-5)
    start = half.weights().float()
    for step in range(FREEZE + 30):
        half.step(step)
    masters = [half.opt.state[p]["master"].flatten() for p in half.model.parameters()]
    moved = (torch.cat(masters) - start).abs()
    assert 0 < moved.mean() < 1e-3  # less than most bf16 weights can show
    assert half.same_on_all_ranks()


def test_channels_last_and_bf16() -> None:
    run_ranks(__file__, "job_layouts", 2)


def job_refuses(rank: int, size: int) -> None:
    job = Job("adam", rank)
    other = network()
    for make in (tw.optim.OneBitAdam, tw.optim.ZeroOneAdam, tw.optim.OneBitLAMB, tw.optim.DGCSGD):
        with pytest.raises(
            InvalidArgument, match=r"parameter 0 of group 0, shape \[60, 40\] on cpu"
        ):
            make(other.parameters(), job.reducer)
        with pytest.raises(InvalidArgument, match=r"expected what thinwire\.torch\.compress"):
            make(other.parameters(), job.model)
    with pytest.raises(InvalidArgument, match="follows an optimizer already"):
        tw.optim.OneBitAdam(job.model.parameters(), job.reducer)
    with pytest.raises(NotAvailable, match="groups cannot be added later"):
        job.opt.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(InvalidArgument, match="without gradients reduced since the last one"):
        job.opt.step()
    job.step(0)
    with pytest.raises(InvalidArgument, match="without gradients reduced since the last one"):
        job.opt.step()

    with pytest.raises(InvalidArgument, match="expected a state of thinwire's optimizers"):
        job.opt.load_state_dict(torch.optim.Adam(other.parameters()).state_dict())
    state = job.opt.state_dict()
    with pytest.raises(InvalidArgument, match="got version 7"):
        job.opt.load_state_dict({**state, "thinwire": 7})
    lamb = Job("lamb", rank)
    with pytest.raises(InvalidArgument, match="cannot restore a state of OneBitAdam"):
        lamb.opt.load_state_dict(state)
    torch.manual_seed(0)
    wide = Job("adam", rank, nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 5), nn.Linear(5, 5)))
    wide_state = wide.opt.state_dict()
    before = wide.weights()
    with pytest.raises(InvalidArgument, match=r"parameter 1\.weight: expected shape"):
        wide.opt.load_state_dict(state)
    assert torch.equal(before, wide.weights())
    small = copy.deepcopy(wide_state)
    small["param_groups"][0]["params"] = small["param_groups"][0]["params"][:4]
    with pytest.raises(InvalidArgument, match=r"parameter groups of \[6\] parameters, got \[4\]"):
        wide.opt.load_state_dict(small)
    if size > 1:
        swapped = {**state, "ranks": [{**state["ranks"][0]}]}
        swapped["ranks"][0]["reducer"] = {**state["ranks"][0]["reducer"], "rank": 1 - rank}
        with pytest.raises(InvalidArgument, match=f"rank: expected {rank}, got {1 - rank}"):
            job.opt.load_state_dict(swapped)

    def fresh(policy: str) -> tuple[Any, Any]:
        model = DistributedDataParallel(network())
        return model.parameters(), tw.compress(model, policy)

    with pytest.raises(InvalidArgument, match="freeze_step: expected 1 or more, got 0"):
        tw.optim.OneBitAdam(*fresh("onebit"), freeze_step=0)
    with pytest.raises(PolicyError, match="expected no start="):
        tw.optim.OneBitAdam(*fresh("onebit,start=10"))
    with pytest.raises(InvalidArgument, match="no layer has a top-k codec"):
        tw.optim.DGCSGD(*fresh("q8"))
    with pytest.raises(InvalidArgument, match=r"beta1: expected a value in \[0, 1\), got 1"):
        tw.optim.OneBitAdam(*fresh("onebit"), betas=(1.0, 0.9))
    with pytest.raises(InvalidArgument, match="var_freeze_step"):
        tw.optim.ZeroOneAdam(*fresh("onebit"), var_freeze_step=0)

    untold = Job("adam", rank)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(untold.loss(0)).backward()
    scaler.unscale_(untold.opt)
    with pytest.raises(InvalidArgument, match="the reducer was not told"):
        scaler.step(untold.opt)


def test_refusals() -> None:
    run_ranks(__file__, "job_refuses", 2)


def job_ranks_differ(rank: int, size: int) -> None:
    job = Job("adam", rank, lr=1e-3 if rank == 0 else 2e-3)
    with pytest.raises((MismatchError, RuntimeError), match=r"lr=0\.002"):
        job.step(0)


def test_ranks_with_different_options_are_told_so() -> None:
    run_ranks(__file__, "job_ranks_differ", 2)
