"""cross_entropy and linear_cross_entropy with the classes in parts: processes agree with one that has all classes.

One file, because all cases run in processes that are started once.
"""

from __future__ import annotations

import copy
import datetime
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from braze.kernels import (
    CROSS_ENTROPY,
    LINEAR_CROSS_ENTROPY,
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    use_backend,
)
from braze.kernels.op import Call
from braze.kernels.ops import process_groups, vocab_parallel

from . import contract

N, D, C = 12, 8, 33
#: Parts that torch.chunk would make, such as it would not, and none at all.
PARTS = ((17, 16), (5, 28), (0, 33))

pytestmark = pytest.mark.xdist_group("vocab_parallel")

#: The dim of the classes, for each operator's arguments by place or name.
CLASS_DIMS: dict[str, dict[int | str, int]] = {
    "cross_entropy": {0: 1, 2: 0},
    "linear_cross_entropy": {1: 0, 3: 0, "class_weight": 0},
}


def _own(rank: int, parts: tuple[int, ...]) -> slice:
    return slice(sum(parts[:rank]), sum(parts[: rank + 1]))


def _part_of(t: Tensor | None, dim: int | None, own: slice) -> Tensor | None:
    """A leaf with the memory, and so the strides, of the whole."""
    if t is None:
        return None
    part = t.detach() if dim is None else t.detach()[(slice(None),) * dim + (own,)]
    return part.requires_grad_(t.requires_grad)


def _gathered(part: Tensor, dim: int, parts: tuple[int, ...]) -> Tensor:
    """The parts of all processes along ``dim``."""
    part = part.movedim(dim, 0)
    found = [part.new_empty(size, *part.shape[1:]) for size in parts]
    for rank, t in enumerate(found):
        if t.numel():
            dist.broadcast(t.copy_(part) if rank == dist.get_rank() else t, rank)
    return torch.cat(found).movedim(0, dim)


def _agrees(rank: int, case: contract.Case, parts: tuple[int, ...], backends: tuple[str, str]) -> None:
    dims = CLASS_DIMS[case.op.name]

    def part(call: Call) -> Call:
        own = _own(rank, parts)
        args = tuple(_part_of(t, dims.get(i), own) for i, t in enumerate(call.args))
        kwargs = {k: _part_of(v, dims.get(k), own) if isinstance(v, Tensor) else v for k, v in call.kwargs.items()}
        return Call(args, {**kwargs, "group": dist.group.WORLD})

    def whole(operand: Tensor, gradient: Tensor) -> Tensor:
        classes = 1 if case.op is CROSS_ENTROPY else 0
        if operand.shape[classes] != sum(parts):
            return gradient  # of hidden: whole in every process
        return _gathered(gradient, classes, parts)

    contract.check_in_parts(case, part, whole, backends[rank])


def _agree(rank: int, op: Any, variant: str) -> None:
    dims = {"N": N, "C": C} if op is CROSS_ENTROPY else {"N": N, "C": C, "D": D}
    for parts in PARTS:
        for dtype in (torch.float32, torch.bfloat16):
            for backends in (("triton", "triton"), ("eager", "triton")):
                case = contract.Case(op, dims, dtype, variant=variant)
                _agrees(rank, case, parts, backends)


def _agree_as_they_lie(rank: int) -> None:
    for layout in ("strided", "transposed", "expanded"):
        case = contract.Case(CROSS_ENTROPY, {"N": 5, "C": C}, torch.float32, layout=layout, cotangent_layout="strided")
        _agrees(rank, case, (17, 16), ("triton", "triton"))
        case = contract.Case(LINEAR_CROSS_ENTROPY, {"N": 5, "D": D, "C": C}, torch.float32, layout=layout)
        _agrees(rank, case, (17, 16), ("triton", "triton"))


def _agree_on_special_values(rank: int) -> None:
    for regime in ("tiny", "huge", "constant", "inf", "nan"):
        for backends in (("triton", "triton"), ("eager", "eager")):
            for variant in ("default", "smoothed"):
                case = contract.Case(CROSS_ENTROPY, {"N": 9, "C": C}, torch.float32, variant=variant, regime=regime)
                _agrees(rank, case, (17, 16), backends)


def _agree_at_the_edges(rank: int) -> None:
    for dims, parts in (({"N": 0, "C": 2}, (1, 1)), ({"N": 2, "C": 1}, (1, 0)), ({"N": 3, "C": 5001}, (4500, 501))):
        for op in (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY):
            case = contract.Case(op, dims if op is CROSS_ENTROPY else {**dims, "D": 3}, torch.float32)
            _agrees(rank, case, parts, ("triton", "triton"))


def _agree_compiled(rank: int) -> None:
    everything = contract.Case(CROSS_ENTROPY, {"N": N, "C": C}, torch.float32, variant="everything, N-D")
    _agrees(rank, everything, (17, 16), ("compile", "compile"))
    every_option = contract.Case(LINEAR_CROSS_ENTROPY, {"N": N, "D": D, "C": C}, torch.float32, variant="every option")
    _agrees(rank, every_option, (17, 16), ("compile", "triton"))


def _drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _head() -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a weight, and targets of which every third is ignored; in float64."""
    target = torch.arange(N) * 5 % C
    target[::3] = -100
    return _drawn(N, D, seed=0), _drawn(C, D, seed=1), target


#: Memory for two tokens' logits of 28 classes in float32.
TWO_TOKENS = 2 * 28 * 4


def _chunks_are_the_same_everywhere(rank: int) -> None:
    hidden, weight, target = _head()
    wanted_loss = F.cross_entropy(hidden.requires_grad_() @ weight.requires_grad_().mT, target)
    wanted = torch.autograd.grad(wanted_loss, [hidden, weight])
    own = _own(rank, (5, 28))
    for backend in ("triton", "eager"):
        h = hidden.detach().float().requires_grad_()
        w = weight.detach()[own].float().requires_grad_()
        with use_backend(backend):
            loss = linear_cross_entropy(h, w, target, memory_budget=TWO_TOKENS, group=dist.group.WORLD)
            dh, dw = torch.autograd.grad(loss, [h, w], retain_graph=True)
            again = torch.autograd.grad(loss, [h, w])
        torch.testing.assert_close(loss, wanted_loss.float())
        torch.testing.assert_close([dh, dw], [wanted[0].float(), wanted[1][own].float()])
        torch.testing.assert_close(again, (dh, dw), rtol=0, atol=0)


def _messages(rank: int) -> None:
    """Two, whose size does not depend on the classes; none for the gradient of logits, one for that of hidden."""
    from torch.distributed.tensor.debug import CommDebugMode

    sizes: list[int] = []
    plain = process_groups.all_reduce

    def counted(t: Tensor, *others: Any) -> Tensor:
        sizes.append(t.numel())
        return plain(t, *others)

    process_groups.all_reduce = counted
    try:
        seen = []
        for classes in (10, 1000):
            x, target = torch.randn(N, classes, requires_grad=True), torch.arange(N)
            with use_backend("triton"):
                with CommDebugMode() as forward:
                    loss = cross_entropy(x, target, label_smoothing=0.1, group=dist.group.WORLD)
                with CommDebugMode() as backward:
                    loss.backward()
            seen.append((sizes.copy(), forward.get_total_counts(), backward.get_total_counts()))
            sizes.clear()
        #: Peaks, and two numbers of each process; then three sums.
        assert seen == [([N + 4, 3 * N], 2, 0)] * 2
        hidden, weight, target = (t.float() if t.is_floating_point() else t for t in _head())
        hidden.requires_grad_()
        chunks = 4  # of two tokens: a third of twelve is ignored
        with use_backend("triton"):
            with CommDebugMode() as forward:
                loss = linear_cross_entropy(
                    hidden, weight[_own(rank, (5, 28))], target, memory_budget=TWO_TOKENS, group=dist.group.WORLD
                )
            with CommDebugMode() as backward:
                loss.backward()
        # One in advance says how many classes each process has.
        assert (forward.get_total_counts(), backward.get_total_counts()) == (1 + 2 * chunks, 1)
        assert sizes == [2 * 3] + [2 + 4, 2 * 2] * chunks + [N * D]
    finally:
        process_groups.all_reduce = plain


def _second_derivatives(rank: int) -> None:
    """Of the squared norm of all gradients, which every process knows; added up where each has a part."""
    hidden, weight, target = _head()
    bias, own = _drawn(C, seed=2), _own(rank, (5, 28))
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 5.0, "z_loss": 1e-2}

    def norm(parts: list[Tensor], copies: list[Tensor], group: Any) -> Tensor:
        total = torch.stack([g.square().sum() for g in parts]).sum()
        total = total if group is None else process_groups.added_up(total, group)
        return total + torch.stack([g.square().sum() for g in copies]).sum() if copies else total

    def of_linear(h: Tensor, w: Tensor, b: Tensor, group: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (h, w, b)]
        loss = linear_cross_entropy(leaves[0], leaves[1], target, leaves[2], group=group, **options)
        dh, *others = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(norm(others, [dh], group), leaves))

    def of_logits(x: Tensor, group: Any) -> Tensor:
        x = x.clone().requires_grad_()
        loss = cross_entropy(x, target, group=group, **options)
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(norm([dx], [], group), x)[0]

    with use_backend("eager"):
        dh, dw, db = of_linear(hidden, weight, bias, None)
        dx = of_logits(hidden @ weight.mT, None)
    wanted = [t.float() for t in (dh, dw[own], db[own], dx[:, own])]
    for backend in ("eager", "triton"):
        with use_backend(backend):
            linear = of_linear(hidden.float(), weight[own].float(), bias[own].float(), dist.group.WORLD)
            logits = of_logits((hidden @ weight.mT)[:, own].float(), dist.group.WORLD)
        torch.testing.assert_close([*linear, logits], wanted)


def _compiles_whole(rank: int) -> None:
    hidden, weight, target = _head()
    own = _own(rank, (5, 28))
    for reduction in ("mean", "none"):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        wanted = F.cross_entropy(leaves[0] @ leaves[1].mT, target, reduction=reduction)
        dh, dw = torch.autograd.grad(wanted.sum(), leaves)

        def loss(h: Tensor, w: Tensor, linear: bool, reduction: str = reduction) -> Tensor:
            options: dict[str, Any] = {"group": dist.group.WORLD, "reduction": reduction}
            if linear:
                return linear_cross_entropy(h, w, target, **options)
            return cross_entropy(process_groups.shared(h, dist.group.WORLD) @ w.mT, target, **options)

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for linear in (True, False):
            h, w = hidden.float().requires_grad_(), weight[own].float().requires_grad_()
            found = compiled(h, w, linear)
            torch.testing.assert_close(found, wanted.float())
            got = torch.autograd.grad(found.sum(), [h, w])
            torch.testing.assert_close(got, (dh.float(), dw[own].float()))


def _compiles_dtensors(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    hidden, weight, target = (t.float() if t.is_floating_point() else t for t in _head())
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = F.cross_entropy(leaves[0] @ leaves[1].mT, target)
    wanted.backward()
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager", fullgraph=True)
    for tokens, classes in (([Replicate()], [Shard(0)]), ([Shard(0)], [Replicate()])):
        h = distribute_tensor(hidden, mesh, tokens).requires_grad_()
        w = distribute_tensor(weight, mesh, classes).requires_grad_()
        loss = compiled(h, w, distribute_tensor(target, mesh, tokens))
        loss.backward()
        torch.testing.assert_close(loss.full_tensor(), wanted.detach())
        torch.testing.assert_close([h.grad.full_tensor(), w.grad.full_tensor()], [t.grad for t in leaves])


def _only_what_is_wanted(rank: int) -> None:
    hidden, weight, target = (t.float() if t.is_floating_point() else t for t in _head())
    own = _own(rank, (5, 28))
    learned = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    wanted = torch.autograd.grad(F.cross_entropy(learned[0] @ learned[1].mT, target), learned)
    h, w = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
    group = dist.group.WORLD
    with use_backend("triton"):
        loss = linear_cross_entropy(h, w.detach(), target, group=group)
        (dh,) = torch.autograd.grad(loss, h)
        (dw,) = torch.autograd.grad(linear_cross_entropy(h.detach(), w, target, group=group), w)
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(h, w, target, group=group), loss)
            assert not cross_entropy(h @ w.mT, target, group=group).requires_grad
    torch.testing.assert_close([dh, dw], [wanted[0], wanted[1][own]])


def _masked_vocabulary(rank: int) -> None:
    """All logits of one process −∞, or of both; and none, though what is ignored is NaN."""
    x = _drawn(5, C, seed=0).float()
    x[0, :17] = x[1, 17:] = x[2] = float("-inf")
    x[4] = float("nan")
    target = torch.tensor([20, 20, 7, 7, -100])
    own = _own(rank, (17, 16))
    for smoothing in (0.0, 0.1):
        whole = x.clone().requires_grad_()
        wanted = F.cross_entropy(whole, target, reduction="none", label_smoothing=smoothing)
        (dx,) = torch.autograd.grad(wanted.sum(), whole)
        for backend in ("triton", "eager"):
            part = x[:, own].clone().requires_grad_()
            with use_backend(backend):
                loss = cross_entropy(part, target, reduction="none", label_smoothing=smoothing, group=dist.group.WORLD)
                (found,) = torch.autograd.grad(loss.sum(), part)
            torch.testing.assert_close(loss, wanted, equal_nan=True)
            torch.testing.assert_close(found[:4], dx[:4, own], equal_nan=True)
            assert not found[4].any()


def _target_out_of_range(rank: int) -> None:
    x, target, own = torch.randn(3, C), torch.tensor([3, C, -1]), _own(rank, (5, 28))
    h, w = torch.randn(3, D), torch.randn(C, D)
    for backend in ("triton", "eager"):
        with use_backend(backend):
            with pytest.raises(IndexError, match=rf"target must be in \[0, {C}\) or ignore_index.*got {C}"):
                cross_entropy(x[:, own], target, group=dist.group.WORLD)
            with pytest.raises(IndexError, match=rf"target must be in \[0, {C}\) or ignore_index.*got {C}"):
                linear_cross_entropy(h, w[own], target, group=dist.group.WORLD)
    # As on a GPU, where the targets are not looked at.
    options: dict[str, Any] = {"label_smoothing": 0.0, "softcap": None, "z_loss": 0.0}
    for backend in ("triton", "eager"):
        by = vocab_parallel.pieces(backend)
        loss, known = vocab_parallel.losses(
            by.statistics, x[:, own], target, None, group=dist.group.WORLD, ignore_index=-100, **options
        )
        dx = vocab_parallel.logits_gradient(by.gradient, torch.ones(3), x[:, own], None, known, **options)
        assert loss.isnan().tolist() == dx.isnan().any(-1).tolist() == [False, True, True]


def _modules(rank: int) -> None:
    hidden, weight, target = (t.float() if t.is_floating_point() else t for t in _head())
    own, group = _own(rank, (5, 28)), dist.group.WORLD
    class_weight = torch.rand(C, generator=torch.Generator().manual_seed(3)) + 0.1
    wanted = F.cross_entropy(hidden @ weight.mT, target, class_weight, label_smoothing=0.1)
    loss = copy.deepcopy(CrossEntropyLoss(class_weight[own], label_smoothing=0.1, group=group))
    assert loss.group is group
    torch.testing.assert_close(loss(hidden @ weight[own].mT, target), wanted)
    head = LinearCrossEntropyLoss(D, len(weight[own]), weight=class_weight[own], label_smoothing=0.1, group=group)
    head = copy.deepcopy(head)
    assert head.group is group
    with torch.no_grad():
        head.linear.weight.copy_(weight[own])
    torch.testing.assert_close(head(hidden, target), wanted)


def _alone(rank: int) -> None:
    """In a group of one process: the same bits as with none, and no message."""
    groups = [dist.new_group([r]) for r in range(2)]
    hidden, weight, target = (t.float() if t.is_floating_point() else t for t in _head())
    x = hidden @ weight.mT
    assert torch.equal(cross_entropy(x, target, group=groups[rank]), cross_entropy(x, target))
    ours = linear_cross_entropy(hidden, weight, target, group=groups[rank])
    assert torch.equal(ours, linear_cross_entropy(hidden, weight, target))


def _refused(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, h, w, target = torch.randn(4, C), torch.randn(4, D), torch.randn(C, D), torch.arange(4)
    outside = dist.new_group([1 - rank])
    for group in ("world", outside):
        with pytest.raises(TypeError, match=r"cross_entropy: group must be a .*ProcessGroup with this process in it"):
            cross_entropy(x, target, group=group)
        with pytest.raises(TypeError, match=r"linear_cross_entropy: group must be a .*ProcessGroup"):
            linear_cross_entropy(h, w, target, group=group)
    with pytest.raises(ValueError, match="group need class indices as target"):
        cross_entropy(x, torch.softmax(x, -1), group=dist.group.WORLD)
    with pytest.raises(ValueError, match=r"hidden must be the same in all processes of group, got \[4, 8\], \[3, 8\]"):
        linear_cross_entropy(h[rank:], w, target[rank:], group=dist.group.WORLD)
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    classes = distribute_tensor(w, mesh, [Shard(0)])
    there, copied = distribute_tensor(h, mesh, [Replicate()]), distribute_tensor(target, mesh, [Replicate()])
    with pytest.raises(TypeError, match="group is for plain tensors"):
        linear_cross_entropy(there, classes, copied, group=dist.group.WORLD)
    with pytest.raises(TypeError, match="must be all DTensors or all plain ones, got Tensor, DTensor, Tensor"):
        linear_cross_entropy(h, classes, target)
    with pytest.raises(TypeError, match="must be all DTensors or all plain ones, got"):
        cross_entropy(distribute_tensor(x, mesh, [Shard(1)]), target)
    tokens = distribute_tensor(h, mesh, [Shard(0)])
    with pytest.raises(ValueError, match=r"must be \[Replicate\(\)\], got \[Shard\(dim=0\)\]"):
        linear_cross_entropy(tokens, classes, distribute_tensor(target, mesh, [Shard(0)]))
    square = dist.device_mesh.init_device_mesh("cpu", (2, 1))
    twice = distribute_tensor(x, square, [Shard(1), Shard(1)])
    with pytest.raises(ValueError, match=r"over one mesh dim only, but mesh dims \[0, 1\] shard them"):
        cross_entropy(twice, distribute_tensor(target, square, [Replicate(), Replicate()]))


def _second_derivatives_of_dtensors(rank: int) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    hidden, weight, target = _head()
    x = (hidden @ weight.mT).requires_grad_()

    def norm_derivative(x: Tensor, target: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(cross_entropy(x, target, label_smoothing=0.1), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    wanted = norm_derivative(x, target)
    there = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
    copied = distribute_tensor(target, mesh, [Replicate()])
    if torch.__version__ < "2.12":  # torch 2.11: what DTensor.to_local does backward has no derivative
        with pytest.raises(RuntimeError, match="to not have been used in the graph"):
            norm_derivative(there, copied)
        return
    torch.testing.assert_close(norm_derivative(there, copied).full_tensor(), wanted)


def _tokens_and_classes(rank: int) -> None:
    """Tokens over one dim of a mesh of 2 × 2, classes over the other."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2))
    hidden, weight, target = (t.float() if t.is_floating_point() else t for t in _head())
    class_weight = torch.rand(C, generator=torch.Generator().manual_seed(3)) + 0.1
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logits = leaves[0] @ leaves[1].mT
    logits.retain_grad()
    wanted = F.cross_entropy(logits, target, class_weight, label_smoothing=0.1)
    wanted.backward()
    tokens, classes = [Shard(0), Replicate()], [Replicate(), Shard(0)]
    t, cw = distribute_tensor(target, mesh, tokens), distribute_tensor(class_weight, mesh, classes)
    h = distribute_tensor(hidden, mesh, tokens).requires_grad_()
    w = distribute_tensor(weight, mesh, classes).requires_grad_()
    x = distribute_tensor(logits.detach(), mesh, [Shard(0), Shard(1)]).requires_grad_()
    for backend in ("triton", "eager"):
        with use_backend(backend):
            loss = cross_entropy(x, t, cw, label_smoothing=0.1)
            (dx,) = torch.autograd.grad(loss, x)
            ours = linear_cross_entropy(h, w, t, class_weight=cw, label_smoothing=0.1)
            dh, dw = torch.autograd.grad(ours, [h, w])
        torch.testing.assert_close([loss.full_tensor(), ours.full_tensor()], [wanted.detach()] * 2)
        torch.testing.assert_close(dx.full_tensor(), logits.grad)
        torch.testing.assert_close([dh.full_tensor(), dw.full_tensor()], [t.grad for t in leaves])
        assert tuple(dh.placements) == (Shard(0), Partial())
        assert tuple(dw.placements) == (Partial(), Shard(0))


CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    **{
        f"{op}, {variant}": (_agree, (op, variant))
        for op in (CROSS_ENTROPY, LINEAR_CROSS_ENTROPY)
        for variant in op.variants
    },
    "layouts": (_agree_as_they_lie, ()),
    "special values": (_agree_on_special_values, ()),
    "edges": (_agree_at_the_edges, ()),
    "compiled": (_agree_compiled, ()),
    "chunks": (_chunks_are_the_same_everywhere, ()),
    "messages": (_messages, ()),
    "second derivatives": (_second_derivatives, ()),
    "second derivatives of DTensors": (_second_derivatives_of_dtensors, ()),
    "torch.compile": (_compiles_whole, ()),
    "torch.compile of DTensors": (_compiles_dtensors, ()),
    "only what is wanted": (_only_what_is_wanted, ()),
    "masked vocabulary": (_masked_vocabulary, ()),
    "target out of range": (_target_out_of_range, ()),
    "modules": (_modules, ()),
    "a group of one": (_alone, ()),
    "refused": (_refused, ()),
}

CASES_OF_FOUR: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "tokens and classes": (_tokens_and_classes, ()),
}


def _check_all(rank: int, file: str, results: Any, processes: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    # A check that fails in one process leaves the others waiting.
    init = {"init_method": f"file://{file}", "timeout": datetime.timedelta(seconds=120)}
    dist.init_process_group("gloo", rank=rank, world_size=processes, **init)
    try:
        for name in names:
            check, arguments = (CASES | CASES_OF_FOUR)[name]
            try:
                check(rank, *arguments)
                results[rank, name] = "passed"
            except Exception:  # told to the test that asks for it
                results[rank, name] = traceback.format_exc()
    finally:
        dist.destroy_process_group()


def _outcomes(processes: int, cases: dict[str, Any]) -> dict[tuple[int, str], str]:
    with tempfile.TemporaryDirectory() as folder, mp.Manager() as manager:
        results = manager.dict()
        rendezvous = str(Path(folder) / "rendezvous")
        mp.spawn(_check_all, (rendezvous, results, processes, list(cases)), nprocs=processes)
        return dict(results)


@pytest.fixture(scope="module")
def of_two() -> dict[tuple[int, str], str]:
    return _outcomes(2, CASES)


@pytest.fixture(scope="module")
def of_four() -> dict[tuple[int, str], str]:
    return _outcomes(4, CASES_OF_FOUR)


@pytest.mark.parametrize("case", CASES)
def test_parts_agree_with_the_whole(of_two: dict[tuple[int, str], str], case: str) -> None:
    for rank in range(2):
        assert of_two[rank, case] == "passed", of_two[rank, case]


@pytest.mark.parametrize("case", CASES_OF_FOUR)
def test_four_agree_with_the_whole(of_four: dict[tuple[int, str], str], case: str) -> None:
    for rank in range(4):
        assert of_four[rank, case] == "passed", of_four[rank, case]
