"""What must hold on every link: one suite of tests that each transport inherits."""

import pytest

pytest.register_assert_rewrite(
    *(
        f"{__name__}.{name}"
        for name in (
            "answers",
            "data",
            "errors",
            "hooks",
            "leaving",
            "lifecycle",
            "loops",
            "policy",
            "queueing",
        )
    )
)
