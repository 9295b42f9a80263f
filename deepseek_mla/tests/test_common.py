"""What every folder is tested for alike, see harness.py."""

from harness import *  # noqa: F403
