"""What the warm parent does with a vLLM that has less than the newest."""

from __future__ import annotations

from typing import Any

from sllm_vllm.node.warm_parent import override_kernels_once


class Platform:
    """As vLLM's: asked for a name that it has not, it says None."""

    def __getattr__(self, name: str) -> Any:
        return None


def test_kernels_are_overridden_in_the_parent_and_in_no_engine() -> None:
    class Overriding(Platform):
        num_calls = 0

        @classmethod
        def register_triton_kernel_overrides(cls) -> None:
            cls.num_calls += 1

    platform = Overriding()
    override_kernels_once(platform)
    platform.register_triton_kernel_overrides()
    assert Overriding.num_calls == 1


def test_a_platform_that_overrides_none_stays_as_it_is() -> None:
    platform = Platform()
    override_kernels_once(platform)
    assert platform.register_triton_kernel_overrides is None
