"""SiMix: which images are similar, so that the discriminator trains on mixtures of them (docs/methods/sbdc.md)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

import dnnlib
from archives.dataset import ImageDataset, to_float
from archives.workers import ordered_map
from torch_utils import distributed, misc
from training.noise_levels import LOWEST_SIGMA

__all__ = ["EMBEDDINGS", "clip_embedding", "nearest_partners"]

EMBEDDINGS = ("classifier", "clip", "pixels")
CLIP = ("ViT-B-32", "laion2b_s34b_b79k")  # architecture and weights, by open_clip's names
BATCH = 256
KEYS = 4096  # rows that all processes compare theirs with at a time
SPARE = 3  # candidates beyond the k nearest: the row itself, and those that rounding may have kept out


def nearest_partners(
    dataset: ImageDataset,
    embed: str,
    classifier: torch.nn.Module | None,
    device: torch.device,
    k: int = 2,
    held_out: torch.Tensor | None = None,
) -> np.ndarray:
    """Return the `k` nearest neighbors of each item among the data set's images, nearest first, int64 [N,k].

    A mirrored copy gets mirrored neighbors. `embed`: 'classifier' (penultimate features of `classifier` at the lowest
    sigma), 'clip' or 'pixels'. The images `held_out` are nobody's neighbors and have none (-1). Collective: every
    process computes a share, and all get the whole. UserError: fewer than k + 1 images, or a package that is not
    installed.
    """
    kept = torch.arange(dataset.num_raw)
    if held_out is not None:
        kept = kept[torch.isin(kept, held_out, invert=True)]
    if len(kept) <= k:
        raise dnnlib.UserError(f"{dataset.path} has {len(kept)} images to train on; similar ones need at least {k + 1}")

    @torch.no_grad()
    def embed_share() -> torch.Tensor:
        function = {
            "classifier": lambda: _classifier_embedding(classifier),
            "clip": lambda: clip_embedding(device),
            "pixels": lambda: _pixel_embedding,
        }[embed]()
        mine, features = kept[torch.tensor(distributed.share(len(kept)), dtype=torch.int64)], []
        with distributed.progress_bar(total=len(mine), desc="SiMix embedding", unit="img") as bar:
            for images in ordered_map(lambda part: dataset.images_on(device, part), mine.split(BATCH), workers=2):
                features.append(function(to_float(images)).to(torch.float32))
                bar.update(len(images))
        return torch.cat(features)

    found = nearest_rows(distributed.together(embed_share), len(kept), k).cpu().numpy()
    raw = np.full([dataset.num_raw, k], -1)
    raw[kept] = kept.numpy()[np.concatenate(distributed.all_gather_object(found))]
    copies = np.arange(len(dataset) // dataset.num_raw)[:, None, None] * dataset.num_raw
    return np.where(raw < 0, -1, raw + copies).reshape(-1, k)


def nearest_rows(own: torch.Tensor, count: int, k: int) -> torch.Tensor:
    """Return the numbers of the `k` rows nearest to each row of `own`, itself left out, int64 [n,k], nearest first.

    `own` float32 [n,d] is this process's share of a table with `count` > k rows. Collective: the table travels from
    process to process in blocks, so none holds more than its share and a block, and no [count,count] table exists.

    Blocks of |x|^2 + |y|^2 - 2 x.y choose candidates, a few more than needed because this form rounds. Their order
    comes from |x - y|, which hardly rounds.
    """
    d, mine = own.shape[1], distributed.share(count)
    center = distributed.all_reduce_sum(own.sum(dim=0)) / count  # small numbers round less
    numbers = torch.arange(mine.start, mine.stop, device=own.device)
    rows = misc.block_rows(KEYS, own.device)
    nearest = torch.full([len(own), k], torch.inf, device=own.device)
    found = torch.zeros([len(own), k], dtype=torch.int64, device=own.device)
    for owner in range(distributed.get_world_size()):
        theirs = distributed.share(count, owner)
        for first in theirs[::KEYS]:
            n = min(KEYS, theirs.stop - first)
            held = own[first - mine.start :][:n] if theirs == mine else own.new_empty([n, d])
            keys = distributed.broadcast(held.contiguous(), owner)
            centered = keys - center
            norms = centered.square().sum(dim=1)
            for start in range(0, len(own), rows):
                part = slice(start, start + rows)
                x = own[part]
                block = torch.addmm(norms, x - center, centered.T, alpha=-2)  # without |x|^2, the same in a row
                picked = block.topk(min(k + SPARE, n), dim=1, largest=False).indices.sort(dim=1).values
                exact = [torch.linalg.vector_norm(x - keys[column], dim=1) for column in picked.T]
                distance = torch.stack(exact, dim=1).masked_fill_(picked + first == numbers[part, None], torch.inf)
                # The sort is stable: equally near rows come in the order of their numbers.
                distance, order = torch.cat([nearest[part], distance], dim=1).sort(dim=1, stable=True)
                nearest[part] = distance[:, :k]
                found[part] = torch.cat([found[part], picked + first], dim=1).gather(1, order[:, :k])
    return found


def _classifier_embedding(classifier: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: classifier.features(images, torch.tensor(LOWEST_SIGMA, device=images.device))


def _pixel_embedding(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)


def clip_embedding(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from images [n,C,H,W] in [-1,1] to CLIP's features [n,d]. UserError without open_clip."""
    try:
        import open_clip  # optional dependency
    except ImportError:
        raise dnnlib.UserError("CLIP features need the package open_clip: pip install open_clip_torch") from None
    model = open_clip.create_model(CLIP[0], pretrained=CLIP[1], device=device).eval()
    size = model.visual.image_size
    mean = torch.tensor(model.visual.image_mean, device=device).reshape(-1, 1, 1)
    std = torch.tensor(model.visual.image_std, device=device).reshape(-1, 1, 1)

    def embed(images: torch.Tensor) -> torch.Tensor:
        images = images.expand(-1, 3, -1, -1) / 2 + 0.5
        images = torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True)
        return model.encode_image((images - mean) / std, normalize=True)

    return embed
