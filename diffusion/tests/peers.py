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


class Timekeeper:
    """Asks `predict`, and counts the looks that are told another time than that of their noise."""

    def __init__(self, schedule: Schedule, predict):
        self.schedule, self.predict = schedule, predict
        self.n_look = self.n_wrong = 0

    def __call__(self, x, time, alpha, sigma):
        there = self.schedule.at(torch.as_tensor(time).reshape(1))
        right = all(torch.allclose(*both) for both in zip(there, (alpha, sigma), strict=True))
        self.n_look, self.n_wrong = self.n_look + 1, self.n_wrong + (not right)
        return self.predict(x, time, alpha, sigma)


def assert_near(found, wanted) -> None:
    """To 1e-6 of the largest number, or of 1."""
    scale = max(1.0, wanted.abs().max().item())
    assert (found.double() - wanted.double()).abs().max().item() <= 1e-6 * scale
