"""Every kernel once on small, odd shapes, for compute-sanitizer:
`compute-sanitizer --tool memcheck python tests/gpu/small_shapes.py`.

With PYTORCH_NO_CUDA_MEMORY_CACHING=1 every tensor is its own allocation, so that a step outside of it is seen.
"""

import pathlib
import sys

import torch

HERE = pathlib.Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]

import op_cases as tables  # noqa: E402

from ijckd_fast import head  # noqa: E402


def main(device: str) -> None:
    """Forward and backward of every op: every dtype but float64, maps and vectors, with and without BatchNorm."""

    def moved(x):
        return x.detach().to(device).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    runs = 0
    for dtype in (torch.float32, torch.bfloat16):
        for shape, norm, match in (
            ((3, 9, 5, 3), "train", "map"),
            ((2, 7, 3, 3), "eval", "pooled"),
            ((5, 9), "bias", "map"),
        ):
            leaves, keywords = tables.connector_inputs(shape, 67, norm=norm, match=match, dtype=dtype)
            leaves, keywords = ({k: moved(v) for k, v in d.items()} for d in (leaves, keywords))
            with torch.device(device):
                tables.run_connector(head.connector_match, leaves, keywords)
            runs += 1
        for sizes in ((3, 9, 1), (5, 7, 1031)):
            args = [moved(x) for x in tables.loss_inputs(*sizes, dtype)]
            tables.run_loss(head.classifier_loss, *args)
            runs += 1
    # channels that are multiples of 8: tensor-core tiles, small and large, anchored and with whole rows of logits
    for dtype in (torch.bfloat16, torch.float16) if device == "cuda" else (torch.bfloat16,):
        leaves, keywords = tables.connector_inputs((3, 24, 5, 3), 72, norm="train", match="map", dtype=dtype)
        leaves, keywords = ({k: moved(v) for k, v in d.items()} for d in (leaves, keywords))
        with torch.device(device):
            tables.run_connector(head.connector_match, leaves, keywords)
        for sizes, kl in (((5, 24, 203), 0.9), ((5, 24, 203), 0.0), ((130, 72, 8069), 0.0)):
            args = [moved(x) for x in tables.loss_inputs(*sizes, dtype)]
            tables.run_loss(head.classifier_loss, *args, kl=kl, gram=head.classifier_gram(args[1]))
            runs += 1
        for sizes in ((5, 8, 24, 203), (130, 24, 136, 1031)):
            leaves, args = ([moved(x) for x in xs] for xs in tables.projected_inputs(*sizes, dtype))
            tables.run_projected(head, leaves, *args, kl=0.0, gram=head.classifier_gram(args[0]))
            runs += 1
        runs += 1
    if device == "cuda":
        views_of_blocks()
        runs += 1
        torch.cuda.synchronize()
    print(f"{runs} runs on {device} done")


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


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "cuda")
