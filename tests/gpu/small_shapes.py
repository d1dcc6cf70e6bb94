"""Every kernel once on small, odd shapes: a first look at a GPU, and what compute-sanitizer runs:
`compute-sanitizer --tool memcheck python tests/gpu/small_shapes.py`. `--stage 1` keeps it to kernels up to that stage.

Every case is named before it runs, so that one that hangs or faults is the last one named. Results are compared with
reference.py in float64, roughly: tests/gpu/test_ops_cuda.py is for their errors. With PYTORCH_NO_CUDA_MEMORY_CACHING=1
every tensor is its own allocation, so that a step outside of it is seen.
"""

import argparse
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator

import torch

HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

import op_cases as tables  # noqa: E402

from ijckd_fast import head  # noqa: E402
from ijckd_fast.head import reference  # noqa: E402

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# the norm of a result's error, of its own norm or 1: rounding may switch a ReLU, which moves single elements by all of
# their value
TOLERANCE = {F32: 1e-3, BF16: 0.1, F16: 0.05}
Results = list[torch.Tensor]


def connector(shape, Ct: int, norm: str, match: str, dtype: torch.dtype) -> Callable[..., Results]:
    """A case: what a module's op makes of the tensors once they have been moved."""
    leaves, keywords = tables.connector_inputs(shape, Ct, norm=norm, match=match, dtype=dtype)
    return lambda module, move: tables.run_connector(
        module.connector_match, *({k: move(v) for k, v in d.items()} for d in (leaves, keywords))
    )


def loss(sizes, dtype: torch.dtype, *, gram: bool = False, **changed) -> Callable[..., Results]:
    """The same of the classifier's losses; gram: with G, which the reference has no use for."""
    args = tables.loss_inputs(*sizes, dtype)

    def run(module, move) -> Results:
        z, weight, *rest = map(move, args)
        given = {"gram": head.classifier_gram(weight)} if gram and module is head else {}
        return tables.run_loss(module.classifier_loss, z, weight, *rest, **given, **changed)

    return run


def projected(sizes, dtype: torch.dtype) -> Callable[..., Results]:
    """The same of the loss with a linear connector before it."""
    leaves, args = tables.projected_inputs(*sizes, dtype)

    def run(module, move) -> Results:
        weight, *rest = map(move, args)
        given = {"gram": head.classifier_gram(weight)} if module is head else {}
        return tables.run_projected(module, [move(x) for x in leaves], weight, *rest, kl=0.0, **given)

    return run


def class_maps(sizes, dtype: torch.dtype) -> Callable[..., Results]:
    """The same of class_map_loss; sizes: B, Ct, a map's side, K."""
    B, Ct, side, K = sizes
    args = tables.decided_class_map_inputs(B, Ct, (side, side), K, dtype)
    return lambda module, move: tables.run_class_maps(module, *map(move, args), **tables.CLASS_MAP_TERMS["all"])


def cases(device: str) -> Iterator[tuple[str, torch.dtype, Callable[..., Results]]]:
    """(name, dtype, case): every dtype but float64, maps and vectors, with and without BatchNorm."""
    maps = ((3, 9, 5, 3), "train", "map"), ((2, 7, 3, 3), "eval", "pooled"), ((5, 9), "bias", "map")
    for dtype, (shape, norm, match) in itertools.product((F32, BF16), maps):
        yield f"connector {shape} to 67, {norm}, {match}", dtype, connector(shape, 67, norm, match, dtype)
    for dtype, sizes in itertools.product((F32, BF16), ((3, 9, 1), (5, 7, 1031))):
        yield f"losses {sizes}", dtype, loss(sizes, dtype)
    for dtype, sizes in itertools.product((F32, BF16), ((2, 9, 5, 7), (3, 7, 4, 261))):
        yield f"class maps {sizes}", dtype, class_maps(sizes, dtype)
    # channels that are multiples of 8: tensor-core tiles, small and large, anchored and with whole rows of logits
    for dtype in (BF16, F16) if device == "cuda" else (BF16,):
        shape = (3, 24, 5, 3)
        yield f"connector {shape} to 72, train, map", dtype, connector(shape, 72, "train", "map", dtype)
        for sizes, kl in (((5, 24, 203), 0.9), ((5, 24, 203), 0.0), ((130, 72, 8069), 0.0)):
            yield f"losses {sizes}, gram, kl {kl}", dtype, loss(sizes, dtype, gram=True, kl=kl)
        for standardize in (False, True):
            name = f"losses (5, 24, 203), two rows of logits{', standardised' * standardize}"
            yield name, dtype, loss((5, 24, 203), dtype, **tables.SOFT, standardize=standardize)
        for sizes in ((3, 24, 4, 203), (30, 72, 7, 1031)):
            yield f"class maps {sizes}", dtype, class_maps(sizes, dtype)
        for sizes in ((5, 8, 24, 203), (130, 24, 136, 1031)):
            yield f"projection and losses {sizes}", dtype, projected(sizes, dtype)


def compare(name: str, found: Results, exact: Results, tolerance: float) -> str | None:
    """What is wrong, or None."""
    for i, (ours, wanted) in enumerate(zip(found, exact, strict=True)):
        norm = torch.linalg.vector_norm
        error, size = norm(ours.double() - wanted).item(), max(1.0, norm(wanted.double()).item())
        if wanted.is_floating_point() and not error <= tolerance * size:
            return f"{name}: result {i} is off by {error:.3g}, its norm is {size:.3g}"
    return None


def views_of_blocks() -> None:
    """Two views of an image of 24 x 31 in two tiles, of few taps, and two of one pixel, of many."""
    data = torch.randint(256, (8 * (4 + 2) * 3 * 4,), dtype=torch.uint8).cuda()
    files = torch.tensor([[data.data_ptr(), len(data)]]).cuda()
    # file, offset, length, checksum; height, width; crop; the whole image's size where it is resized first; flip
    crops = ([2, 1, 21, 30, 0, 0, 1], [-1, 3, 33, 33, 40, 37, 0]), ([0, 0, 24, 31, 0, 0, 0], [0, 0, 1, 1, 2, 2, 1])
    for side, pair in zip((33, 1), crops, strict=True):
        rows = torch.tensor([[0, 0, len(data), 0, 24, 31, *crop] for crop in pair]).cuda()
        out = torch.empty(2, side, side, 3, dtype=torch.bfloat16, device="cuda")
        torch.ops.ijckd.block_views_at(files, rows, 3, 3, [1.0, 2.0, 3.0], [0.1, 0.2, 0.3], out)
    torch.cuda.synchronize()


def main() -> int:
    """The exit status: 1 if a result was far off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2), default=2)
    args = parser.parse_args()
    if head.load_libraries() and args.device == "cuda":
        torch.ops.ijckd.limit_stage(args.stage)

    def moved(x):
        return x.detach().to(args.device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    def doubled(x):
        return x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    runs, wrong = 0, []
    for name, dtype, case in cases(args.device):
        name = f"{str(dtype).removeprefix('torch.')} {name}"
        print(name, flush=True)
        with torch.device(args.device):
            found = [x.cpu() for x in case(head, moved)]
        if fault := compare(name, found, case(reference, doubled), TOLERANCE[dtype]):
            wrong.append(fault)
            print(f"WRONG: {fault}", flush=True)
        runs += 1
    if args.device == "cuda":
        print("views of blocks", flush=True)
        views_of_blocks()
        runs += 1
    print(f"{runs} runs on {args.device} up to stage {args.stage}, {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
