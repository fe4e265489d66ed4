"""Networks: `nn.Module`s of plain sizes. A denoising network is `forward(x_t, t, cond) -> (B, Tp, Da)`."""
