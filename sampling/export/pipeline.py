"""Sample a denoiser of cleanscore with diffusers, by Heun's or Euler's method on EDM's noise levels.

Karras et al., NeurIPS 2022, Algorithm 1. With the same seeds it makes the same images as cleanscore's generate.py.
Part of cleanscore, Apache License 2.0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from PIL import Image

SOLVERS, OUTPUTS = ("heun", "euler"), ("pil", "np", "pt")


class CleanscorePipeline(DiffusionPipeline):
    """Makes images of the classes that a network was trained with. `id2label` maps their numbers, as text, to names."""

    def __init__(self, denoiser, scheduler, id2label: dict[str, str] | None = None):
        super().__init__()
        self.register_modules(denoiser=denoiser, scheduler=scheduler)
        self.register_to_config(id2label=id2label)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        class_labels: int | str | Sequence[int | str] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int = 18,
        solver: str = "heun",
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Return images.

        batch_size           how many, unless the classes or the generators are a list and say it
        class_labels         numbers or names of classes, one for all images or one per image; None: drawn
        generator            one torch.Generator per image makes an image independent of its batch
        num_inference_steps  each evaluates the network twice with Heun's method, once with Euler's; the last one once
        solver               heun or euler
        guidance_scale       s in D_0 + s (D_y - D_0), classifier-free guidance, for networks trained with label dropout
        output_type          pil; np: float32 [N,H,W,C] in [0,1]; pt: float32 [N,C,H,W] in [0,1]
        """
        for name, value, known in (("solver", solver, SOLVERS), ("output_type", output_type, OUTPUTS)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for given in (class_labels, generator):
            batch_size = len(given) if isinstance(given, (list, tuple)) else batch_size
        device, precise = self._execution_device, torch.float32 if self.device.type == "mps" else torch.float64
        generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * batch_size
        if len(generators) != batch_size:
            raise ValueError(f"{len(generators)} generators for {batch_size} images")
        channels, resolution, classes = self._format()
        shape = [channels, resolution, resolution]
        places = [device if g is None else g.device for g in generators]
        pairs = list(zip(generators, places, strict=True))
        x = torch.stack([torch.randn(shape, generator=g, device=place).to(device) for g, place in pairs])
        labels = self._labels(class_labels, pairs, classes, device)
        if labels is None and guidance_scale != 1:
            raise ValueError("guidance_scale: this network was trained without classes")
        self.scheduler.set_timesteps(num_inference_steps)
        levels = self.scheduler.sigmas[:-1].double().cpu()
        known = levels if isinstance(self.denoiser, UNet2DModel) else self.denoiser.net.round_sigma(levels)
        steps = [*known.tolist(), 0.0]

        def slope(x: torch.Tensor, sigma: float) -> torch.Tensor:
            denoised = self._denoise(x, sigma, labels)
            if labels is not None and guidance_scale != 1:
                plain = self._denoise(x, sigma, torch.zeros_like(labels))
                denoised = plain + guidance_scale * (denoised - plain)
            return (x - denoised.to(precise)) / sigma

        x = x.to(precise) * steps[0]
        for t, t_next in zip(self.progress_bar(steps[:-1]), steps[1:], strict=True):
            d = slope(x, t)
            x_next = x + (t_next - t) * d
            if solver == "heun" and t_next > 0:
                x_next = x + (t_next - t) * (d + slope(x_next, t_next)) / 2
            x = x_next
        images = self._convert(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _format(self) -> tuple[int, int, int]:
        """Return the channels and the size of the images, and the number of classes."""
        if isinstance(self.denoiser, UNet2DModel):
            config = self.denoiser.config
            return config.in_channels, config.sample_size, (config.num_class_embeds or 1) - 1
        net = self.denoiser.net
        return net.img_channels, net.img_resolution, net.label_dim

    def _denoise(self, x: torch.Tensor, sigma: float, labels: torch.Tensor | None) -> torch.Tensor:
        """Return D(x; sigma, labels). Around a UNet2DModel, whose last class is none, the scheduler preconditions."""
        if not isinstance(self.denoiser, UNet2DModel):
            return self.denoiser(x, torch.tensor(sigma, dtype=x.dtype, device=x.device), labels)
        numbers = None if labels is None else torch.where(labels.any(1), labels.argmax(1), labels.shape[1])
        x, at = x.to(self.denoiser.dtype), self.scheduler.precondition_noise(sigma).to(x.device)
        output = self.denoiser(self.scheduler.precondition_inputs(x, sigma), at, numbers).sample
        return self.scheduler.precondition_outputs(x, output, sigma)

    def _labels(self, wanted, pairs, classes: int, device: torch.device) -> torch.Tensor | None:
        """Return one-hot labels [N,classes], or None for a network without classes."""
        if not classes:
            if wanted is not None:
                raise ValueError("class_labels: this network was trained without classes")
            return None
        if wanted is None:
            numbers = [torch.randint(classes, [], generator=g, device=place).item() for g, place in pairs]
        else:
            wanted = list(wanted) if isinstance(wanted, (list, tuple)) else [wanted] * len(pairs)
            if len(wanted) != len(pairs):
                raise ValueError(f"{len(wanted)} class_labels for {len(pairs)} images")
            names = {name: int(number) for number, name in (self.config.id2label or {}).items()}
            numbers = [names.get(item, -1) if isinstance(item, str) else int(item) for item in wanted]
            for item, number in zip(wanted, numbers, strict=True):
                if not 0 <= number < classes:
                    known = f", {', '.join(names)}" if names else ""
                    raise ValueError(f"class_labels: {item!r} is unknown; known are 0 to {classes - 1}{known}")
        return torch.nn.functional.one_hot(torch.tensor(numbers, device=device), classes).float()

    @staticmethod
    def _convert(x: torch.Tensor, output_type: str):
        if output_type != "pil":
            x = (x / 2 + 0.5).clamp(0, 1).float()
            return x if output_type == "pt" else x.permute(0, 2, 3, 1).cpu().numpy()
        levels = (x * 127.5 + 128).clip(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(np.squeeze(image, 2) if image.shape[2] == 1 else image) for image in levels]
