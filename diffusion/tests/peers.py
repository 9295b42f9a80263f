"""Schedulers of diffusers, made comparable: with tables in float64, and ours with the same betas.

diffusers counts its tables in float32, where 1 − ᾱ of the first steps has three or four digits
left. Both sides get the same numbers, so that what is compared are the formulas, to 1e-6.
"""

import numpy as np
import torch

from diffusion import Schedule


def float64(scheduler):
    """Their scheduler with its tables in float64."""
    scheduler.betas = torch.from_numpy(np.asarray(scheduler.betas, dtype=np.float64))
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def same_tables(scheduler) -> Schedule:
    """Our schedule with their betas."""
    schedule = Schedule("linear")
    schedule.alpha = scheduler.alphas_cumprod.sqrt()
    schedule.sigma = (1 - scheduler.alphas_cumprod).sqrt()
    return schedule


def assert_near(found, wanted) -> None:
    """To 1e-6 of the largest number, or of 1."""
    scale = max(1.0, wanted.abs().max().item())
    assert (found.double() - wanted.double()).abs().max().item() <= 1e-6 * scale
