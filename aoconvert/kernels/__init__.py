"""An optional accelerator: torchao's own quantization compiled for this CPU. Without it everything works.

:class:`Kernels` is all that the engine knows; ``README.md`` says what it buys, costs and trusts.
"""

from aoconvert.kernels.checked import Kernels

__all__ = ["Kernels"]
