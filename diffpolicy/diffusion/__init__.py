"""The mathematics of diffusion: schedules, denoisers, samplers, guidance and exact cases. Imports torch only.

With clean `x`, noise `eps` and diffusion time `t` (1 = noise, 0 = data): `x_t = alpha(t) x + sigma(t) eps`.
"""
