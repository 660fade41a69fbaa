"""For the tests of those who write a head."""

from lightning_atrous.testing.cases import HEAD_CASES, HeadCase
from lightning_atrous.testing.contract import check_head

__all__ = ["HEAD_CASES", "HeadCase", "check_head"]
