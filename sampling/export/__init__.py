"""Write a network for other programs: `graph` as TorchScript or ONNX, `diffusers_folder` for diffusers.

`denoiser` and `pipeline` are code of the folder for diffusers. Nothing here imports them. See docs/export.md.
"""
